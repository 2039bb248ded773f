"""What the backward pass computes again instead of keeping it."""

from collections.abc import Callable

import jax
from jaxtyping import Array

# What enters a layer goes to the host's memory and comes back for the backward pass. All of the
# layer is computed again from it, the choice of rows included.
LAYER_INPUT = "layer_input"
OFFLOAD = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[LAYER_INPUT],
    offload_src="device",
    offload_dst="pinned_host",
)


def run_block(block: Callable, x: Array, rows: tuple, residual_scale: Array | None) -> Array:
    """Calls `block(x, *rows, residual_scale)`, with the block an argument that can be saved."""
    return block(x, *rows, residual_scale)


def rematerialised(function: Callable, policy: str) -> Callable:
    """Wraps a function so that its backward pass computes again what `policy` names.

    Args:
      function: of arrays.
      policy: `none`, `dots` (all but the matrix products), `save_attention` (all but what bears
        the name `attention`) or `full`.
    """
    if policy == "none":
        return function
    saved = {
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "save_attention": jax.checkpoint_policies.save_only_these_names("attention"),
        "full": None,
    }[policy]
    return jax.checkpoint(function, policy=saved)
