"""What the backward pass of a layer computes again instead of keeping it."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array

# What enters a layer goes to the host's memory and comes back for the backward pass. All of the
# layer is computed again from it, the choice of rows included.
LAYER_INPUT = "layer_input"


class RematPolicy(NamedTuple):
    """What is kept of a layer's forward pass, and what is computed again.

    Attributes:
      wrap: wraps a function so that its backward pass keeps what the policy says.
      again: `again(matrices, last, attention, unsaved)` returns the FLOPs of a layer that are
        computed again, given those of all its products with weights, of the last of them (which
        feeds no other), of attention, and of attention where its kernel saves nothing that the
        policy could keep.
      kept: `kept(D, F)` returns the values a token that a layer keeps on the device.
    """

    wrap: Callable[[Callable], Callable]
    again: Callable[[float, float, float, float], float]
    kept: Callable[[int, int], int]


def _keeping(policy: Callable | None) -> Callable[[Callable], Callable]:
    return functools.partial(jax.checkpoint, policy=policy)


REMAT_POLICIES = {
    "none": RematPolicy(
        lambda function: function,
        lambda matrices, last, attention, unsaved: 0.0,
        lambda D, F: 6 * D + 3 * F,
    ),
    "dots": RematPolicy(
        _keeping(jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
        lambda matrices, last, attention, unsaved: attention,
        lambda D, F: 4 * D + 2 * F,
    ),
    "save_attention": RematPolicy(
        _keeping(jax.checkpoint_policies.save_only_these_names("attention")),
        lambda matrices, last, attention, unsaved: matrices - last + unsaved,
        lambda D, F: 2 * D,
    ),
    "full": RematPolicy(
        _keeping(None),
        lambda matrices, last, attention, unsaved: matrices - last + attention,
        lambda D, F: D,
    ),
    "offload": RematPolicy(
        _keeping(
            jax.checkpoint_policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=[LAYER_INPUT],
                offload_src="device",
                offload_dst="pinned_host",
            )
        ),
        lambda matrices, last, attention, unsaved: matrices + attention,
        lambda D, F: 0,
    ),
}


def run_block(block: Callable, x: Array, rows: tuple, residual_scale: Array | None) -> Array:
    """Calls `block(x, *rows, residual_scale)`, with the block an argument that can be saved."""
    return block(x, *rows, residual_scale)


def rematerialised(function: Callable, policy: str) -> Callable:
    """Wraps a function of arrays so that its backward pass keeps what the policy says.

    Args:
      function: a function of arrays.
      policy: a name in `REMAT_POLICIES`.
    """
    return REMAT_POLICIES[policy].wrap(function)
