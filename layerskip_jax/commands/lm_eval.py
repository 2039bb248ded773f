"""layerskip lm-eval: EleutherAI's lm_eval, with the model `layerskip` known to it.

usage: layerskip lm-eval --model layerskip --model_args path=RUN,exit=8 --tasks ...

All arguments are lm_eval's own; see `layerskip_jax/evaluation/lm_eval.py` for the model's.
"""

import contextlib
import sys
from collections.abc import Iterator

from layerskip_jax.schema import UserError


def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    with lm_eval_needed("lm-eval"):
        from lm_eval.__main__ import cli_evaluate

        from layerskip_jax.evaluation import lm_eval as _registers  # noqa: F401
    before = sys.argv
    sys.argv = ["lm_eval", *argv]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return 0


@contextlib.contextmanager
def lm_eval_needed(what: str) -> Iterator[None]:
    """Raises UserError where the body cannot import lm-eval, which `what` needs."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"{what} needs its package, of a recent version ({error}); "
            "`pip install --upgrade lm_eval`"
        ) from error
