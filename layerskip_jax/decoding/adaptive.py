"""One token by as many layers as it needs: each row stops at the first exit that is sure.

Layers lie in segments between the candidate exits. A segment runs if any row still needs it; the
states of the other rows stay what they were where they stopped. What a token's skipped layers
leave in the cache is one of two things:

- `propagate` (CALM): keys and values computed from the exit's state, at once.
- `deferred`: nothing yet. The token waits with its state until a later token of its row runs
  deeper, or `room` tokens wait; then all of them run the skipped layers in one pass, as a
  verification does. Keys and values, and so the decisions of later tokens, are those of a model
  that runs every layer on every token.

A token that waits is seen by later ones in the layers that it did run: a later token goes on into
a segment only together with all of its row that wait for it. So of the tokens that wait, earlier
ones never ran fewer segments than later ones, and those that a segment is to run lie side by side.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from layerskip_jax.decoding.cache import Cache, head_logits, propagate, run_layers
from layerskip_jax.decoding.exit_policy import (
    POLICIES,
    Candidate,
    PolicyKind,
    falling_threshold,
    look,
)
from layerskip_jax.decoding.sampling import Sampling, choose
from layerskip_jax.decoding.sequences import Limits, SequenceState, append
from layerskip_jax.decoding.weights import DecoderLayer, DecoderWeights

SKIPPED_KV = ("propagate", "deferred")


class Depth(NamedTuple):
    """What a program for adaptive depth is compiled for.

    Attributes:
      policy: one of `POLICIES`.
      exits: the candidate exits E, ascending, each below L.
      kv: one of `SKIPPED_KV`.
      room: most tokens of a row that wait, for `deferred`.
      falling: whether the threshold falls along the text, see `falling_threshold`.
    """

    policy: str
    exits: tuple[int, ...]
    kv: str
    room: int
    falling: bool

    @property
    def kind(self) -> PolicyKind:
        """The policy."""
        return POLICIES[self.policy]

    @property
    def lookahead(self) -> int:
        """How far beyond the last new token a pass may write, at most."""
        return self.room + 1 if self.kv == "deferred" else 1

    def segments(self, num_layers: int) -> tuple[tuple[int, int], ...]:
        """Returns the first layer of each segment and the one after its last."""
        return tuple(itertools.pairwise((0, *self.exits, num_layers)))


class Waiting(NamedTuple):
    """The newest tokens of each row that have not run every layer, W = room + 1 slots.

    Attributes:
      states: of each the state after the segments that it ran, the oldest first; the newest token
        stands after the `count` that wait.
      ran: how many segments each ran.
      count: tokens that wait; what lies beyond is no token's.
    """

    states: Float[Array, "B W D"]
    ran: Int[Array, "B W"]
    count: Int[Array, "B"]


class DepthCounts(NamedTuple):
    """How deep a generation ran, after the tokens that the prompts gave.

    Attributes:
      left: by segment, tokens of each row that stopped after it.
      ran: by segment, passes through its layers, whatever their rows.
      passes: tokens that the batch took one after another.
    """

    left: Int[Array, "B N"]
    ran: Int[Array, "N"]
    passes: Int[Array, ""]


class _Row(NamedTuple):
    """What is known of the new token of each row, between segments."""

    read: Float[Array, "B 1 D"]
    logits: Float[Array, "B 1 V"] | None
    choice: Int[Array, "B 1"]
    streak: Int[Array, "B 1"]
    going: Bool[Array, "B"]
    left: Int[Array, "B"]


def no_waiting(depth: Depth, rows: int, model_dim: int, dtype: jnp.dtype) -> Waiting | None:
    """Returns what waits after the prompts: nothing; None where nothing ever does."""
    if depth.kv == "propagate":
        return None
    slots = depth.room + 1
    return Waiting(
        jnp.zeros((rows, slots, model_dim), dtype),
        jnp.zeros((rows, slots), jnp.int32),
        jnp.zeros(rows, jnp.int32),
    )


def no_depth_counts(depth: Depth, rows: int) -> DepthCounts:
    """Returns the counts before the first pass."""
    segments = len(depth.exits) + 1
    return DepthCounts(
        jnp.zeros((rows, segments), jnp.int32), jnp.zeros(segments, jnp.int32), jnp.int32(0)
    )


def projections(
    weights: DecoderWeights, cache: Cache, rows: int, depth: Depth
) -> Sequence[DecoderLayer]:
    """Returns the layers as `propagate` had best have them; once, before the loop over tokens.

    On one device without their queries, whose product it would throw away; on a mesh, where heads
    are split over devices, as they are. The first segment's are never skipped.
    """
    if depth.kv != "propagate" or cache.layers[0].on_mesh:
        return weights.layers
    skipped = [
        layer.without_queries(of_layer.kv_heads(rows), of_layer.v.shape[-1])
        for layer, of_layer in zip(weights.layers, cache.layers, strict=True)
    ]
    return [*weights.layers[: depth.exits[0]], *skipped[depth.exits[0] :]]


def next_token(
    weights: DecoderWeights,
    skipped: Sequence[DecoderLayer],
    cache: Cache,
    waiting: Waiting | None,
    sequences: SequenceState,
    limits: Limits,
    sampling: Sampling | None,
    threshold: Float[Array, ""],
    *,
    depth: Depth,
) -> tuple[SequenceState, Cache, Waiting | None, DepthCounts]:
    """Gives each row one token, by as many layers as the policy has it run.

    Args:
      weights: the model's weights.
      skipped: see `projections`.
      cache: the cache of all layers.
      waiting: the tokens that wait; None for `propagate`.
      sequences: those that are not done get a token.
      limits: when sequences end.
      sampling: None decodes greedily.
      threshold: the policy's.
      depth: the policy, the exits, and what becomes of skipped layers.

    Returns:
      The sequences, the cache, what waits now, and the counts of this token alone.
    """
    segments = depth.segments(len(weights.layers))
    position = sequences.position[:, None]
    x = weights.embedding[sequences.last][:, None]
    if depth.falling:
        threshold = falling_threshold(threshold, sequences.count, limits.max_new_tokens, depth.kind)
    if waiting is not None:
        waiting = _joined(waiting, x)
    row = _nothing_known(weights, x, ~sequences.done, depth)
    must_run = jnp.zeros_like(sequences.done)
    if waiting is not None:
        must_run = (waiting.count >= depth.room) & ~sequences.done

    def run(index, carry, width):
        """Runs a segment on all rows that need it, and looks at what its exit shows of them."""
        x, cache, waiting, row = carry
        first, last = segments[index]
        if waiting is None:
            after, cache = run_layers(weights, cache, x, position, first, last, row.going)
        else:
            active = row.going | must_run
            waiting, cache = _run_waiting(
                weights, cache, waiting, position, active, index, (first, last), width
            )
            after = _newest(waiting)
        is_last = index == len(segments) - 1
        row = _after_look(weights, x, after, row, threshold, depth, (index, last, is_last))
        return after, cache, waiting, row

    carry = run(0, (x, cache, waiting, row), 1)
    ran = [jnp.bool_(True)]
    for index in range(1, len(segments)):
        x, cache, waiting, row = carry
        needed = (row.going | must_run).any()
        ran.append(needed)
        if waiting is None:
            carry = _once(needed, functools.partial(run, index, width=1), carry)
            x, cache, _, row = carry
            cache = _once(
                ~needed,
                lambda cache, x=x, index=index: propagate(
                    skipped, cache, x, position, *segments[index]
                ),
                cache,
            )
            carry = x, cache, None, row
            continue
        widest = jnp.where(row.going | must_run, _width(waiting, index), 0).max()
        least = 0
        for width in widths(depth):
            fits = (least < widest) & (widest <= width)
            carry = _once(needed & fits, functools.partial(run, index, width=width), carry)
            least = width

    x, cache, waiting, row = carry
    logits = head_logits(weights, row.read) if row.logits is None else row.logits
    chosen = choose(logits, position + 1, sampling)
    counts = DepthCounts(
        left=(row.left[:, None] == jnp.arange(len(segments))) & ~sequences.done[:, None],
        ran=jnp.stack(ran),
        passes=jnp.int32(1),
    )
    counts = jax.tree.map(lambda n: n.astype(jnp.int32), counts)
    if waiting is not None:
        # What ran the last segment did so with all that waited before it.
        finished = _ran_newest(waiting) == len(segments)
        count = jnp.where(finished, 0, waiting.count + 1)
        waiting = waiting._replace(count=jnp.where(sequences.done, waiting.count, count))
    return append(sequences, chosen, jnp.ones_like(row.left), limits), cache, waiting, counts


def widths(depth: Depth) -> tuple[int, ...]:
    """Returns how many tokens of a row a segment may run at a time; the fewest that hold them."""
    return (*(width for width in (1, 2, 4) if width <= depth.room), depth.room + 1)


def _once(wanted: Bool[Array, ""], body, carry):
    """Runs `body` once or not at all; a loop, since a switch would copy the cache (on CPU)."""
    return jax.lax.while_loop(
        lambda state: state[0], lambda state: (jnp.bool_(False), body(state[1])), (wanted, carry)
    )[1]


def _nothing_known(
    weights: DecoderWeights, x: Float[Array, "B 1 D"], going: Bool[Array, "B"], depth: Depth
) -> _Row:
    rows = x.shape[0]
    zeros = jnp.zeros((rows, 1), jnp.int32)
    logits = None
    if depth.kind.reads_logits:
        logits = jnp.zeros((rows, 1, weights.embedding.shape[0]), jnp.float32)
    return _Row(jnp.zeros_like(x), logits, zeros, zeros, going, zeros[:, 0])


def _after_look(
    weights: DecoderWeights,
    x: Float[Array, "B 1 D"],
    after: Float[Array, "B 1 D"],
    row: _Row,
    threshold: Float[Array, "..."],
    depth: Depth,
    segment: tuple[int, int, bool],
) -> _Row:
    """Returns what is known of each row after a segment: its index, its exit, if it is the last."""
    index, exit_layer, is_last = segment
    read = weights.before_head(after, exit_layer)
    logits = head_logits(weights, read) if depth.kind.reads_logits else None
    before = None if index == 0 else Candidate(x, row.read, row.logits, row.choice, row.streak)
    shown = look(after, read, logits, before)
    going = jnp.zeros_like(row.going)
    if not is_last:
        score = depth.kind.score(weights, shown, before)[:, 0]
        going = row.going & ~depth.kind.is_sure(score, threshold)
    new = _Row(read, logits, shown.choice, shown.streak, going, jnp.full_like(row.left, index))

    def of_those_that_went(new, old):
        return jnp.where(row.going.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    return jax.tree.map(of_those_that_went, new, row)


def _joined(waiting: Waiting, x: Float[Array, "B 1 D"]) -> Waiting:
    """Returns what waits, with the new tokens after it."""
    newest = jnp.arange(waiting.ran.shape[1]) == waiting.count[:, None]
    return waiting._replace(
        states=jnp.where(newest[..., None], x, waiting.states),
        ran=jnp.where(newest, 0, waiting.ran),
    )


def _newest(waiting: Waiting) -> Float[Array, "B 1 D"]:
    return jnp.take_along_axis(waiting.states, waiting.count[:, None, None], axis=1)


def _ran_newest(waiting: Waiting) -> Int[Array, "B"]:
    return jnp.take_along_axis(waiting.ran, waiting.count[:, None], axis=1)[:, 0]


def _first(waiting: Waiting, index: int) -> Int[Array, "B"]:
    """Returns the slot of the oldest token of each row that has not run segment `index`."""
    slots = jnp.arange(waiting.ran.shape[1])
    return ((waiting.ran > index) & (slots <= waiting.count[:, None])).sum(axis=1)


def _width(waiting: Waiting, index: int) -> Int[Array, "B"]:
    """Returns how many tokens of each row a segment is to run, if the row runs it."""
    return waiting.count + 1 - _first(waiting, index)


def _run_waiting(
    weights: DecoderWeights,
    cache: Cache,
    waiting: Waiting,
    position: Int[Array, "B 1"],
    active: Bool[Array, "B"],
    index: int,
    layers: tuple[int, int],
    width: int,
) -> tuple[Waiting, Cache]:
    """Runs a segment on the tokens of the active rows that it is to run.

    Where a row has fewer than `width`, or runs none, what is written lies past its newest token:
    in slots that are written anew before anyone sees them.
    """
    slots = jnp.arange(waiting.ran.shape[1])
    first = jnp.where(active, _first(waiting, index), waiting.count + 1)
    taken = jnp.minimum(first[:, None] + jnp.arange(width), slots[-1])
    x = jnp.take_along_axis(waiting.states, taken[..., None], axis=1)
    positions = position - waiting.count[:, None] + first[:, None] + jnp.arange(width)
    x, cache = run_layers(weights, cache, x, positions, *layers)
    back = jnp.clip(slots - first[:, None], 0, width - 1)
    here = active[:, None] & (slots >= first[:, None]) & (slots <= waiting.count[:, None])
    return (
        waiting._replace(
            states=jnp.where(
                here[..., None],
                jnp.take_along_axis(x, back[..., None], axis=1),
                waiting.states,
            ),
            ran=jnp.where(here, index + 1, waiting.ran),
        ),
        cache,
    )
