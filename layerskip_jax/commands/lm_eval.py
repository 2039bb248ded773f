"""layerskip lm-eval: EleutherAI's lm_eval, with the model `layerskip` known to it.

usage: layerskip lm-eval --model layerskip --model_args path=RUN,exit=8 --tasks ...

All arguments are lm_eval's own; see `layerskip_jax/evaluation/lm_eval.py` for the model's.
"""

import sys

from layerskip_jax.schema import UserError


def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    try:
        from lm_eval.__main__ import cli_evaluate

        from layerskip_jax.evaluation import lm_eval as _registers  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"lm-eval needs its package, of a recent version ({error}); "
            "`pip install --upgrade lm_eval`"
        ) from error
    before = sys.argv
    sys.argv = ["lm_eval", *argv]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return 0
