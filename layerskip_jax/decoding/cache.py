"""The key/value cache, and running layers on new tokens over it.

Slot j of a row holds the keys and values of position j. Rows have lengths of their own. New
tokens are written where they belong and see only the slots up to their own position, so
whatever lies beyond, such as rejected drafts or the padding of a prompt, is never read and
is overwritten in time. A layer with a window keeps no more than that and what one pass may write
beyond a row's newest token: position j lies in slot j modulo their number.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from layerskip_jax.decoding.weights import DecoderLayer, DecoderWeights
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.model.rope import rope_tables
from layerskip_jax.ops.attention import cached_attention

# Up to so many rows are written one by one, in place; a scatter costs a CPU several times as
# much.
MOST_SLICES = 16


class LayerCache(NamedTuple):
    """Keys and values of one layer, T slots a row, heads first: a head's keys lie together.

    On a mesh `[B, K, T, h]`, to be split over rows and heads. On one device both lie as XLA's CPU
    backend multiplies them best. Rows and heads are one axis, as in its products: what was
    written and then reshaped for them it wrote twice, from a copy of the whole cache, for every
    layer and token. That goes for an axis of one too, which it drops: a single head of a single
    row has none. And keys are transposed, `[B K, h, T]` beside values of `[B K, T, h]`: a layer
    took 0.8 of the time for three to five rows, and no more for one.
    """

    k: Float[Array, "*BK m n"]
    v: Float[Array, "*BK T h"]

    @property
    def on_mesh(self) -> bool:
        """Whether rows and heads are two axes, and keys lie as values do."""
        return self.k.ndim == 4

    def kv_heads(self, batch: int) -> int:
        """Returns K, given B."""
        if self.on_mesh:
            return self.k.shape[1]
        return math.prod(self.k.shape[:-2]) // batch


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

    def is_cyclic(self, layer: int) -> bool:
        """Whether a layer has fewer slots than there are positions."""
        return self.layers[layer].v.shape[-2] < self.cos.shape[0]


def cache_slots(positions: int) -> int:
    """Returns the slots of a cache for so many positions.

    A whole number of 64: attention over 166 slots took twice as long as over 192 (CPU).
    """
    return -(-positions // 64) * 64


def layer_slots(config: ModelConfig, layer: int, positions: int, beyond: int) -> int:
    """Returns the slots of one layer's cache.

    Args:
      config: the model's; of a layer with a window its slots suffice.
      layer: its number, from 0.
      positions: of a row, all in all.
      beyond: the most tokens that a pass may write beyond a row's newest.
    """
    window = config.layer_kinds[layer].window
    return cache_slots(min(positions, window + beyond) if window else positions)


def empty_cache(
    config: ModelConfig,
    num_layers: int,
    batch_size: int,
    positions: int,
    beyond: int | None = None,
) -> Cache:
    """Returns a cache for so many positions a row; writing past it would be silent.

    Args:
      config: shapes.
      num_layers: layers that run.
      batch_size: B.
      positions: of a row, all in all.
      beyond: the most tokens that a pass may write beyond a row's newest, for layers with a window;
        None where one pass may write all.
    """
    rows: tuple[int, ...] = (batch_size, config.num_kv_heads)
    on_mesh = not jax.sharding.get_abstract_mesh().empty
    if not on_mesh:
        rows = () if math.prod(rows) == 1 else (math.prod(rows),)

    def layer(index: int) -> LayerCache:
        slots = layer_slots(config, index, positions, positions if beyond is None else beyond)
        values = jnp.zeros((*rows, slots, config.head_dim), config.compute_dtype)
        return LayerCache(values if on_mesh else values.swapaxes(-1, -2), values)

    cos, sin = rope_tables(jnp.arange(cache_slots(positions))[None], config)
    return Cache(tuple(map(layer, range(num_layers))), cos[0], sin[0])


def run_layers(
    weights: DecoderWeights,
    cache: Cache,
    x: Float[Array, "B S D"],
    positions: Int[Array, "B S"],
    first: int,
    last: int,
    going: Bool[Array, "B"] | None = None,
) -> tuple[Float[Array, "B S D"], Cache]:
    """Runs layers `first` to `last - 1` on new tokens, consecutive within each row.

    Args:
      weights: the model's weights.
      cache: written at `positions` in these layers.
      x: states before layer `first`.
      positions: the tokens' positions; all must lie within the cache.
      first: first layer to run.
      last: the layer to stop before.
      going: rows whose states change; the others keep theirs, and have its keys and values
        written. None: all.

    Returns:
      States after layer `last - 1`, and the cache.
    """
    cos, sin = cache.cos[positions], cache.sin[positions]
    layers = list(cache.layers)
    for index in range(first, last):
        layer = weights.layers[index]
        q, k, v = layer.project(x, cos, sin, layers[index].kv_heads(x.shape[0]))
        layers[index] = _with_new(layers[index], k, v, positions, cyclic=cache.is_cyclic(index))
        attended = cached_attention(q, *layers[index], positions, layer.kind.window)
        after = layer.finish(x, attended)
        x = after if going is None else jnp.where(going[:, None, None], after, x)
    return x, cache._replace(layers=tuple(layers))


def propagate(
    layers: Sequence[DecoderLayer],
    cache: Cache,
    x: Float[Array, "B S D"],
    positions: Int[Array, "B S"],
    first: int,
    last: int,
) -> Cache:
    """Writes keys and values of layers `first` to `last - 1`, as if they had left x as it is.

    One norm and two products a layer (CALM, section 3.2: state propagation).

    Args:
      layers: all of the model's; those that are written may lack their queries.
      cache: written at `positions` in these layers.
      x: the tokens' states, of the exit at which they stopped.
      positions: the tokens' positions.
      first: first layer to write.
      last: the layer to stop before.
    """
    cos, sin = cache.cos[positions], cache.sin[positions]
    written = list(cache.layers)
    for index in range(first, last):
        _, k, v = layers[index].project(x, cos, sin, written[index].kv_heads(x.shape[0]))
        written[index] = _with_new(written[index], k, v, positions, cyclic=cache.is_cyclic(index))
    return cache._replace(layers=tuple(written))


def _with_new(
    layer: LayerCache,
    k: Float[Array, "B K S h"],
    v: Float[Array, "B K S h"],
    positions: Int[Array, "B S"],
    *,
    cyclic: bool,
) -> LayerCache:
    return LayerCache(
        _write(layer.k, k, positions, transposed=not layer.on_mesh, cyclic=cyclic),
        _write(layer.v, v, positions, cyclic=cyclic),
    )


def read_head(
    weights: DecoderWeights, x: Float[Array, "B S D"], exit_layer: int | None = None
) -> Float[Array, "B S V"]:
    """Returns float32 logits of states after the first E layers, None for all L.

    Every exit shares norm and head; one that has an adapter reads through it.
    """
    exit_layer = len(weights.layers) if exit_layer is None else exit_layer
    return head_logits(weights, weights.before_head(x, exit_layer))


def head_logits(weights: DecoderWeights, z: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
    """Returns float32 logits of what `DecoderWeights.before_head` returned."""
    logits = weights.any_head(z, jnp.float32)
    return logits if weights.padding is None else logits + weights.padding


def read_draft_head(
    weights: DecoderWeights, x: Float[Array, "B S D"], exit_layer: int
) -> Float[Array, "B S V"]:
    """Returns logits to draft from; a token that the draft head does not have is at -inf."""
    if weights.draft_head is None:
        return read_head(weights, x, exit_layer)
    tokens, matrix = weights.draft_head
    logits = matrix(weights.before_head(x, exit_layer), jnp.float32)
    nothing = jnp.full((*x.shape[:2], weights.embedding.shape[0]), -jnp.inf)
    return nothing.at[..., tokens].set(logits, indices_are_sorted=True, unique_indices=True)


def _write(
    cache: Float[Array, "*BK m n"],
    new: Float[Array, "B K S h"],
    positions: Int[Array, "B S"],
    *,
    transposed: bool = False,
    cyclic: bool = False,
) -> Float[Array, "*BK m n"]:
    """Writes what is new of each row into its slots, which are the last axis if transposed.

    With `cyclic` the first slot follows on the last one.
    """
    batch, kv_heads = new.shape[:2]
    update = jax.lax.dynamic_update_slice
    if cyclic:
        update = functools.partial(_update_cyclic, axis=-1 if transposed else -2)
    if transposed:
        new = new.swapaxes(2, 3)
    if cache.ndim == 4:
        # On a mesh all rows at once, each where it lies; one by one, all devices would write all.
        return jax.vmap(
            lambda row, part, start: update(row, part, (jnp.int32(0), start, jnp.int32(0)))
        )(cache, new, positions[:, 0])
    parts = {2: new[:, 0], 3: new}[cache.ndim]  # of one row

    def write(cache, part, row, start):
        slot = (0, start) if transposed else (start, 0)
        of_row = {2: (), 3: (row * kv_heads,)}[cache.ndim]
        return update(cache, part, tuple(map(jnp.int32, (*of_row, *slot))))

    if batch <= MOST_SLICES:
        for row in range(batch):
            cache = write(cache, parts[row], row, positions[row, 0])
        return cache
    # One row after another here too, in a loop: a scatter would take several times as long.
    return jax.lax.fori_loop(
        0, batch, lambda row, cache: write(cache, parts[row], row, positions[row, 0]), cache
    )


def _update_cyclic(
    cache: Array, part: Array, start: tuple[Int[Array, ""], ...], *, axis: int
) -> Array:
    """Returns `dynamic_update_slice` where what goes beyond the end of `axis` goes on at its start.

    As many slots at the end, and then at the start, are written as the part has, with what they
    held where nothing is new.

    Args:
      cache: what is written.
      part: shorter along `axis`.
      start: an index a dimension; that of `axis` modulo its size.
      axis: -1 or -2.
    """
    size, new = cache.shape[axis], part.shape[axis]
    first = start[axis] % size

    def write(cache, begin, offset):
        """Writes slots from `begin` on; the part begins `offset` after it."""
        at = list(start)
        at[axis] = begin
        index = jnp.arange(new) - offset
        fresh = (index >= 0) & (index < new)
        fresh = fresh if axis == -1 else fresh[:, None]
        held = jax.lax.dynamic_slice(cache, at, part.shape)
        value = jnp.where(fresh, jnp.roll(part, offset, axis), held)
        return jax.lax.dynamic_update_slice(cache, value, at)

    begin = jnp.minimum(first, size - new)
    cache = write(cache, begin, first - begin)
    return cache if new == 1 else write(cache, jnp.int32(0), first - size)
