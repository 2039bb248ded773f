"""Rotary position embedding (RoFormer, section 3.2), in the half-split layout of Llama."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from layerskip_jax.model.config import ModelConfig


def rope_frequencies(config: ModelConfig) -> Float[Array, "h2"]:
    """Returns the angle of a step from one position to the next, of each pair, in float32."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling.kind == "none":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # Turns within the original context: few are divided, many are left alone.
    turns = float(scaling.original_length) * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def rope_tables(
    positions: Int[Array, "B S"], config: ModelConfig
) -> tuple[Float[Array, "B S h2"], Float[Array, "B S h2"]]:
    """Returns cos and sin, in float32, of each position times each of the h/2 frequencies."""
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(
    x: Float[Array, "B S H h"], cos: Float[Array, "B S h2"], sin: Float[Array, "B S h2"]
) -> Float[Array, "B S H h"]:
    """Rotates the pairs (x_i, x_{i + h/2}) of every head, computing in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
