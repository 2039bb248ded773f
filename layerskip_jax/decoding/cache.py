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

# Up to so many rows are written one by one, in place; a scatter costs a CPU several times as
# much.
MOST_SLICES = 16


class LayerCache(NamedTuple):
    """Keys and values of one layer, T slots a row, heads first: a head's keys lie together."""

    k: Float[Array, "B K T h"]
    v: Float[Array, "B K T h"]


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


def cache_slots(positions: int) -> int:
    """Returns the slots of a cache for so many positions.

    A whole number of 64: attention over 166 slots took twice as long as over 192 (CPU).
    """
    return -(-positions // 64) * 64


def empty_cache(config: ModelConfig, num_layers: int, batch_size: int, positions: int) -> Cache:
    """Returns a cache for so many positions a row; writing past it would be silent."""
    slots = cache_slots(positions)
    shape = (batch_size, config.num_kv_heads, slots, config.head_dim)
    zeros = jnp.zeros(shape, config.compute_dtype)
    cos, sin = rope_tables(jnp.arange(slots)[None], config)
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
        layer = weights.layers[index]
        q, k, v = layer.project(x, cos, sin, layers[index].k.shape[1])
        layers[index] = LayerCache(
            _write(layers[index].k, k, positions), _write(layers[index].v, v, positions)
        )
        x = layer.finish(x, cached_attention(q, *layers[index], positions))
    return x, cache._replace(layers=tuple(layers))


def read_head(weights: DecoderWeights, x: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
    """Returns float32 logits of states after any layer: every exit shares norm and head."""
    logits = weights.any_head(weights.final_norm(x), jnp.float32)
    return logits if weights.padding is None else logits + weights.padding


def read_draft_head(weights: DecoderWeights, x: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
    """Returns logits to draft from; a token that the draft head does not have is at -inf."""
    if weights.draft_head is None:
        return read_head(weights, x)
    tokens, matrix = weights.draft_head
    logits = matrix(weights.final_norm(x), jnp.float32)
    nothing = jnp.full((*x.shape[:2], weights.embedding.shape[0]), -jnp.inf)
    return nothing.at[..., tokens].set(logits, indices_are_sorted=True, unique_indices=True)


def _write(
    cache: Float[Array, "B K T h"], new: Float[Array, "B K S h"], positions: Int[Array, "B S"]
) -> Float[Array, "B K T h"]:
    starts, zero = positions[:, 0], jnp.int32(0)
    if cache.shape[0] <= MOST_SLICES:
        for row in range(cache.shape[0]):
            at = (jnp.int32(row), zero, starts[row], zero)
            cache = jax.lax.dynamic_update_slice(cache, new[row : row + 1], at)
        return cache
    return jax.vmap(
        lambda row, update, at: jax.lax.dynamic_update_slice(row, update, (zero, at, zero))
    )(cache, new, starts)
