"""Rotary position embedding (RoFormer, section 3.2), in the half-split layout of Llama."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rope_tables(
    positions: Int[Array, "B S"], head_dim: int, theta: float
) -> tuple[Float[Array, "B S h2"], Float[Array, "B S h2"]]:
    """Returns cos and sin, in float32, of each position times each of the h/2 frequencies."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = positions[..., None].astype(jnp.float32) * theta**-exponents
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(
    x: Float[Array, "B S H h"], cos: Float[Array, "B S h2"], sin: Float[Array, "B S h2"]
) -> Float[Array, "B S H h"]:
    """Rotates the pairs (x_i, x_{i + h/2}) of every head, computing in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
