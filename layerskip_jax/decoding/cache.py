"""The key/value cache, and running layers on new tokens over it.

Slot j of a row holds the keys and values of position j. Rows have lengths of their own. New
tokens are written where they belong and see only the slots up to their own position, so
whatever lies beyond, such as rejected drafts or the padding of a prompt, is never read and
is overwritten in time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from layerskip_jax.decoding.weights import DecoderWeights
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.model.rope import rope_tables
from layerskip_jax.ops.attention import cached_attention


class LayerCache(NamedTuple):
    """Keys and values of one layer, T slots a row."""

    k: Float[Array, "B T K h"]
    v: Float[Array, "B T K h"]


class Cache(NamedTuple):
    """The cache of the layers that run, and the rotary tables of its T positions.

    Attributes:
      layers: one `LayerCache` a layer.
      cos: cosines by position.
      sin: sines by position.
    """

    layers: tuple[LayerCache, ...]
    cos: Float[Array, "T h2"]
    sin: Float[Array, "T h2"]


def empty_cache(config: ModelConfig, num_layers: int, batch_size: int, slots: int) -> Cache:
    """Returns a cache of `slots` positions a row; writing past them would be silent."""
    shape = (batch_size, slots, config.num_kv_heads, config.head_dim)
    zeros = jnp.zeros(shape, config.compute_dtype)
    cos, sin = rope_tables(jnp.arange(slots)[None], config.head_dim, config.rope_theta)
    return Cache((LayerCache(zeros, zeros),) * num_layers, cos[0], sin[0])


def run_layers(
    weights: DecoderWeights,
    cache: Cache,
    x: Float[Array, "B S D"],
    positions: Int[Array, "B S"],
    first: int,
    last: int,
) -> tuple[Float[Array, "B S D"], Cache]:
    """Runs layers `first` to `last - 1` on new tokens, consecutive within each row.

    Args:
      weights: of the model.
      cache: written at `positions` in these layers.
      x: states before layer `first`.
      positions: of the tokens; all must lie within the cache.
      first: first layer to run.
      last: the layer to stop before.

    Returns:
      States after layer `last - 1`, and the cache.
    """
    cos, sin = cache.cos[positions], cache.sin[positions]
    layers = list(cache.layers)
    for index in range(first, last):
        block = weights.layers[index]
        q, k, v = block.project(x, cos, sin)
        layers[index] = LayerCache(
            _write(layers[index].k, k, positions), _write(layers[index].v, v, positions)
        )
        attended = cached_attention(q, layers[index].k, layers[index].v, positions)
        x = block.finish(x, attended)
    return x, cache._replace(layers=tuple(layers))


def read_head(weights: DecoderWeights, x: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
    """Returns float32 logits of states after any layer: every exit shares norm and head."""
    # Contracting with the embedding as it lies spares a transposed copy of a tied head.
    tied = weights.head is None
    return jnp.einsum(
        "bsd,vd->bsv" if tied else "bsd,dv->bsv",
        weights.final_norm(x),
        weights.embedding if tied else weights.head,
        preferred_element_type=jnp.float32,
    )


def _write(
    cache: Float[Array, "B T K h"], new: Float[Array, "B S K h"], positions: Int[Array, "B S"]
) -> Float[Array, "B T K h"]:
    if cache.shape[0] == 1:
        # One slice, updated in place; a scatter costs several times as much on a CPU.
        return jax.lax.dynamic_update_slice(cache, new, (0, positions[0, 0], 0, 0))
    return cache.at[jnp.arange(cache.shape[0])[:, None], positions].set(new)
