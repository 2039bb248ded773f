"""Self-speculative decoding: draft with the first layers, verify with the rest.

LayerSkip, section 4.3. One cycle, for each row of the batch on its own:

1. *Draft*: layers 0..E-1 and the head propose G tokens, one after another. The states after
   layer E-1 are kept (the exit cache), and so are the keys and values of those layers.
2. *Verify*: the last draft alone runs layers 0..E-1; then all G + 1 states run layers E..L-1
   in one pass. Every token that is fed passes every layer exactly once.
3. *Accept*: the drafts that the whole model would have chosen, up to the first that it would
   not, and one token of its own after them.

One set of weights and one cache serve both. Rejected positions need no undoing: the next
cycle overwrites them before it can see them. The tokens are those of plain decoding: greedy
ones, and with drafter-invariant sampling random ones too; rejection sampling gives tokens of
the same distribution instead.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from layerskip_jax.decoding.cache import Cache, read_draft_head, read_head, run_layers
from layerskip_jax.decoding.sampling import (
    Sampling,
    choose,
    draw,
    matching,
    processed,
    reject,
)
from layerskip_jax.decoding.sequences import Limits, SequenceState, append, stops_at
from layerskip_jax.decoding.weights import DecoderWeights

ACCEPTANCES = ("same_noise", "rejection")
# Drafts of up to so many layers in all are written out one after another, which spares a small
# model the loop; of larger ones the loop is nothing beside their layers, and it compiles faster.
MOST_UNROLLED = 32


class SpeculationCounts(NamedTuple):
    """What happened to the drafts of each row.

    A draft that nobody could have used, beyond an end token or the limit of new tokens,
    counts neither as drafted nor as rejected.

    Attributes:
      cycles: cycles in which the row was not done.
      drafted: drafts, G a cycle but for the last ones.
      accepted: drafts that became tokens.
      examined: by draft position, cycles in which all drafts before it were accepted.
      kept: by draft position, cycles in which it was accepted.
    """

    cycles: Int[Array, "B"]
    drafted: Int[Array, "B"]
    accepted: Int[Array, "B"]
    examined: Int[Array, "B G"]
    kept: Int[Array, "B G"]


class Drafts(NamedTuple):
    """What the first layers propose.

    Attributes:
      tokens: G a row.
      log_p: what they were drawn from, for rejection sampling; else None.
      exit_cache: states after layer E-1 of the newest token and of every draft.
    """

    tokens: Int[Array, "B G"]
    log_p: Float[Array, "B G V"] | None
    exit_cache: Float[Array, "B G1 D"]


@jax.named_scope("draft")
def draft(
    weights: DecoderWeights,
    cache: Cache,
    sequences: SequenceState,
    sampling: Sampling | None,
    *,
    exit_layer: int,
    draft_length: int,
    acceptance: str,
) -> tuple[Drafts, Cache]:
    """Proposes G tokens a row with layers 0..E-1 and the head: the first half of a cycle.

    Args:
      weights: the model's weights.
      cache: the cache of all layers.
      sequences: what is known of each.
      sampling: None decodes greedily.
      exit_layer: E, the layers that draft.
      draft_length: G, drafts a cycle.
      acceptance: for sampling, `same_noise` (drafter-invariant) or `rejection`.
    """

    def early_layers(token, cache, position):
        x = weights.embedding[token][:, None]
        return run_layers(weights, cache, x, position, 0, exit_layer)

    def propose(state, offset):
        token, cache = state
        position = sequences.position[:, None] + offset
        x, cache = early_layers(token, cache, position)
        logits = read_draft_head(weights, x)
        if acceptance == "rejection" and sampling is not None:
            log_p = processed(logits, sampling)
            token = draw(log_p, sampling, position + 1)[:, 0]
            return (token, cache), (token, log_p[:, 0], x[:, 0])
        token = choose(logits, position + 1, sampling)[:, 0]
        return (token, cache), (token, None, x[:, 0])

    start = (sequences.last, cache)
    unrolled = draft_length * exit_layer <= MOST_UNROLLED
    (last, cache), proposed = jax.lax.scan(
        propose, start, jnp.arange(draft_length), unroll=draft_length if unrolled else 1
    )
    tokens, log_p, states = jax.tree.map(lambda x: x.swapaxes(0, 1), proposed)
    last_state, cache = early_layers(last, cache, sequences.position[:, None] + draft_length)
    return Drafts(tokens, log_p, jnp.concatenate([states, last_state], axis=1)), cache


@jax.named_scope("verify")
def verify(
    weights: DecoderWeights,
    cache: Cache,
    sequences: SequenceState,
    drafts: Drafts,
    sampling: Sampling | None,
    *,
    exit_layer: int,
) -> tuple[Int[Array, "B G1"], Int[Array, "B"], Cache]:
    """Returns G + 1 tokens a row, how many drafts begin them, and the cache.

    One token more than the accepted drafts is the whole model's own; what follows is not.
    """
    positions = sequences.position[:, None] + jnp.arange(drafts.exit_cache.shape[1])
    num_layers = len(weights.layers)
    x, cache = run_layers(weights, cache, drafts.exit_cache, positions, exit_layer, num_layers)
    logits = read_head(weights, x)
    if drafts.log_p is not None:
        log_p = processed(logits, sampling)
        tokens, accepted = reject(drafts.tokens, drafts.log_p, log_p, positions + 1, sampling)
        return tokens, accepted, cache
    chosen = choose(logits, positions + 1, sampling)
    # The accepted drafts are the first of the chosen tokens, by definition of accepting.
    return chosen, matching(drafts.tokens, chosen), cache


@jax.named_scope("count")
def count_drafts(
    drafts: Int[Array, "B G"], accepted: Int[Array, "B"], sequences: SequenceState, limits: Limits
) -> SpeculationCounts:
    """Counts one cycle, given the sequences before it and how many drafts agreed."""
    index = jnp.arange(drafts.shape[1])
    ends = stops_at(sequences, drafts, limits.stop).astype(jnp.int32)
    ended_before = jnp.cumsum(ends, axis=1) - ends > 0
    room = limits.max_new_tokens - sequences.count
    usable = (index < room[:, None]) & ~ended_before & ~sequences.done[:, None]
    kept = usable & (index < accepted[:, None])
    examined = usable & (index <= accepted[:, None])
    return SpeculationCounts(
        cycles=(~sequences.done).astype(jnp.int32),
        drafted=usable.sum(axis=1),
        accepted=kept.sum(axis=1),
        examined=examined.astype(jnp.int32),
        kept=kept.astype(jnp.int32),
    )


def accept(
    sequences: SequenceState,
    drafts: Drafts,
    tokens: Int[Array, "B G1"],
    accepted: Int[Array, "B"],
    limits: Limits,
) -> tuple[SequenceState, SpeculationCounts]:
    """Gives the sequences their tokens: the last part of a cycle.

    Args:
      sequences: those that are not done get 1 to G + 1 tokens.
      drafts: what `draft` proposed.
      tokens: what `verify` chose.
      accepted: how many drafts begin them.
      limits: when sequences end.
    """
    counts = count_drafts(drafts.tokens, accepted, sequences, limits)
    return append(sequences, tokens, accepted + 1, limits), counts


def cycle(
    weights: DecoderWeights,
    cache: Cache,
    sequences: SequenceState,
    limits: Limits,
    sampling: Sampling | None,
    *,
    exit_layer: int,
    draft_length: int,
    acceptance: str,
) -> tuple[SequenceState, Cache, SpeculationCounts]:
    """Runs one cycle: drafts, verifies and accepts.

    Args:
      weights: the model's weights.
      cache: the cache of all layers.
      sequences: those that are not done get 1 to G + 1 tokens.
      limits: when sequences end.
      sampling: None decodes greedily.
      exit_layer: E, the layers that draft.
      draft_length: G, drafts a cycle.
      acceptance: for sampling, `same_noise` (drafter-invariant) or `rejection`.
    """
    drafts, cache = draft(
        weights, cache, sequences, sampling,
        exit_layer=exit_layer, draft_length=draft_length, acceptance=acceptance,
    )  # fmt: skip
    tokens, accepted, cache = verify(
        weights, cache, sequences, drafts, sampling, exit_layer=exit_layer
    )
    sequences, counts = accept(sequences, drafts, tokens, accepted, limits)
    return sequences, cache, counts
