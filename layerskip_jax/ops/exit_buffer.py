"""The states that the exits are scored on, each kept at the layer it comes from."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def _strata(x: Array, count: int) -> Array:
    return x.reshape(x.shape[0], count, -1, x.shape[-1])


def _take_positions(x: Float[Array, "B S D"], positions: Int[Array, "G m"]) -> Array:
    """Returns x at `positions`, of which stratum g of the window has the g-th row.

    Within each stratum on its own, so that no device needs the positions of another.
    """
    parts = _strata(x, len(positions))
    inside = positions - parts.shape[2] * jnp.arange(len(positions))[:, None]
    kept = jax.vmap(lambda part, index: part[:, index], (1, 0), 1)(parts, inside)
    return kept.reshape(x.shape[0], -1, x.shape[-1])


def _add_at_positions(x: Array, positions: Int[Array, "G m"], kept: Array) -> Array:
    """Adds to x what `_take_positions` took from it."""
    parts, kept = _strata(x, len(positions)), _strata(kept, len(positions))
    inside = positions - parts.shape[2] * jnp.arange(len(positions))[:, None]

    def add(part, index, kept):
        return part.at[:, index].add(kept, indices_are_sorted=True, unique_indices=True)

    return jax.vmap(add, (1, 0, 1), 1)(parts, inside, kept).reshape(x.shape)


@jax.custom_vjp
def keep_exit(
    x: Float[Array, "B S D"],
    buffer: Float[Array, "slots B M D"],
    slot: Int[Array, ""],
    positions: Int[Array, "G m"] | None,
) -> tuple[Float[Array, "B S D"], Float[Array, "slots B M D"]]:
    """Returns x, and the buffer with x at `positions` in `slot`, which may be past its end.

    A slot is filled once, over zeros that nothing else reads. So the gradient of the buffer
    passes through unchanged and is added to that of x at the layer that filled the slot.
    """

    def fill(buffer):
        kept = x if positions is None else _take_positions(x, positions)
        return jax.lax.dynamic_update_index_in_dim(buffer, kept, slot, axis=0)

    return x, jax.lax.cond(slot < buffer.shape[0], fill, lambda buffer: buffer, buffer)


def _keep_exit_forward(x, buffer, slot, positions):
    return keep_exit(x, buffer, slot, positions), (slot, positions)


def _keep_exit_backward(saved, gradients):
    slot, positions = saved
    d_x, d_buffer = gradients

    def add(d_x, d_buffer):
        d_kept = jax.lax.dynamic_index_in_dim(d_buffer, slot, axis=0, keepdims=False)
        if positions is None:
            return d_x + d_kept
        return _add_at_positions(d_x, positions, d_kept)

    is_kept = slot < d_buffer.shape[0]
    return jax.lax.cond(is_kept, add, lambda d_x, _: d_x, d_x, d_buffer), d_buffer, None, None


keep_exit.defvjp(_keep_exit_forward, _keep_exit_backward)
