"""Types of what a generator is asked, as someone without a type checker may give them."""

import jaxtyping
import numpy as np
import pytest

from layerskip_jax.generation.options import Request
from layerskip_jax.schema import ConfigError, require_whole
from tests.helpers import small_model


@pytest.fixture(autouse=True)
def unchecked():
    """The tests have beartype look at types first; users have not."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def check(**given):
    Request(**({"prompts": [[1, 2]], "max_new_tokens": 4} | given)).check(small_model())


@pytest.mark.parametrize(
    "given, message",
    [
        ({"max_new_tokens": 4.0}, "max_new_tokens=4.0 has type float; .*whole number, such as 4"),
        ({"max_new_tokens": True}, "max_new_tokens=True has type bool; it must be a whole number$"),
        ({"max_new_tokens": "4"}, "max_new_tokens='4' has type str"),
        ({"max_new_tokens": None}, "max_new_tokens=None has type NoneType"),
        ({"max_new_tokens": np.float32(4)}, r"max_new_tokens=.*4.0.* has type float32"),
        ({"seed": 1.5}, "seed=1.5 has type float; it must be a whole number$"),
        ({"top_k": 3.0, "temperature": 1.0}, "top_k=3.0 has type float"),
        ({"end_token": "</s>"}, "end_token='</s>' has type str"),
        ({"mode": "early_exit", "exit_layer": 2.0}, "exit_layer=2.0 has type float"),
        (
            {"mode": "self_speculative", "exit_layer": 2, "draft_length": "3"},
            "draft_length='3' has type str",
        ),
        ({"mode": "auto", "pairs": [(1, 2.0)]}, "a pair holds 2.0, which is no whole number"),
        ({"prompts": [[1], [2, 1.5]]}, "prompt 1 holds 1.5, which is no whole number; a text is"),
        ({"prompts": ["the cat"]}, "prompt 0 holds 't', which is no whole number"),
        ({"stop": ["x"]}, "a stop sequence holds 'x'"),
        ({"temperature": "0.5"}, "temperature='0.5' has type str; it must be a number"),
        ({"temperature": 0.5, "top_p": True}, "top_p=True has type bool"),
        ({"temperature": float("nan")}, "temperature=nan must be a number, finite"),
    ],
)
def test_a_value_of_another_type_is_named(given, message):
    with pytest.raises(ConfigError, match=message):
        check(**given)


def test_numbers_of_numpy_are_numbers():
    check(
        max_new_tokens=np.int8(4), seed=np.uint32(2**32 - 1), end_token=np.int64(1),
        temperature=np.float32(0.5), top_k=np.int32(3), prompts=np.array([[1, 2]]),
        stop=[np.array([3])],
    )  # fmt: skip
    check(mode="auto", pairs=[(np.int32(1), np.int64(2))])
    require_whole("limit", np.int64(0))
