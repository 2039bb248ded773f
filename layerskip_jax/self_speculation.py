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

Classic speculation with a second model is the same cycle: that model drafts with all of its layers
and a cache of its own (`draft_by_another`), and the whole model verifies, as if with E = 0.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from layerskip_jax.decoding.cache import Cache, read_draft_head, read_head, run_layers
from layerskip_jax.decoding.exit_policy import top_probability
from layerskip_jax.decoding.sampling import (
    Sampling,
    choose,
    contest,
    draw,
    lead,
    likeliest,
    matching,
    processed,
    reject,
)
from layerskip_jax.decoding.sequences import Limits, SequenceState, append, stops_at
from layerskip_jax.decoding.weights import DecoderWeights

ACCEPTANCES = ("same_noise", "rejection")
# What says how sure an exit is of a draft.
SURENESS = ("probability", "lead", "learned")
# Drafts of up to so many layers in all are written out one after another, which spares a small
# model the loop; of larger ones the loop is nothing beside their layers, and it compiles faster.
MOST_UNROLLED = 32


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["threshold"], meta_fields=["score"]
)
@dataclasses.dataclass(frozen=True)
class StopBelow:
    """When drafting ends early: after the first draft whose score is below the threshold.

    Attributes:
      threshold: a float32 in (0, 1), an array or traced; another value needs no other program.
      score: `probability` of the exit's likeliest token, before temperature, top-k and top-p;
        `lead` of the draft over the token that would be drafted else, p / (p + p of that one), as
        it is chosen, with the temperature and the noise of `same_noise`; or the trained
        classifier's, `learned`.
    """

    threshold: Any
    score: str = "probability"


class SpeculationCounts(NamedTuple):
    """What happened to the drafts of each row.

    A draft that nobody could have used, beyond an end token or the limit of new tokens,
    counts neither as drafted nor as rejected.

    Attributes:
      cycles: cycles in which the row was not done.
      drafted: drafts that could be accepted, G a cycle but for the last ones and, with
        `StopBelow`, for those that ended early.
      accepted: drafts that became tokens.
      examined: by draft position, cycles in which all drafts before it were accepted.
      kept: by draft position, cycles in which it was accepted.
      made: drafts that the batch made in those cycles, of use to the row or not.
    """

    cycles: Int[Array, "B"]
    drafted: Int[Array, "B"]
    accepted: Int[Array, "B"]
    examined: Int[Array, "B G"]
    kept: Int[Array, "B G"]
    made: Int[Array, "B"]


class Drafts(NamedTuple):
    """What the first layers propose.

    Attributes:
      tokens: G a row.
      log_p: what they were drawn from, for rejection sampling; else None.
      exit_cache: states after layer E-1 of the newest token and of every draft; for those of
        another model, E = 0, their embeddings.
      made: drafts that were made, the first ones; None: all G.
      lengths: how many of them each row may accept; None: all.
    """

    tokens: Int[Array, "B G"]
    log_p: Float[Array, "B G V"] | None
    exit_cache: Float[Array, "B G1 D"]
    made: Int[Array, ""] | None = None
    lengths: Int[Array, "B"] | None = None


@jax.named_scope("draft")
def draft(
    weights: DecoderWeights,
    cache: Cache,
    sequences: SequenceState,
    sampling: Sampling | None,
    stop_below: StopBelow | None = None,
    *,
    exit_layer: int,
    draft_length: int,
    acceptance: str,
) -> tuple[Drafts, Cache]:
    """Proposes G tokens a row with layers 0..E-1 and the head: the first half of a cycle.

    With `stop_below` it ends as soon as every row has made a draft that it was unsure of. What a
    row drafted beyond its own, for the sake of others, is verified anyway, and may be accepted:
    those tokens are free. Under rejection sampling it may not, since what is drawn for a row
    would then depend on its company.

    Args:
      weights: the model's weights.
      cache: the cache of all layers.
      sequences: what is known of each.
      sampling: None decodes greedily.
      stop_below: None drafts G tokens always.
      exit_layer: E, the layers that draft; L where the model drafts for another.
      draft_length: G, drafts a cycle.
      acceptance: for sampling, `same_noise` (drafter-invariant) or `rejection`.
    """

    def early_layers(token, cache, position):
        x = weights.embedding[token][:, None]
        return run_layers(weights, cache, x, position, 0, exit_layer)

    def sureness(x, logits, scores):
        if stop_below is None:
            return None
        if stop_below.score == "learned":
            return weights.classifier(weights.before_head(x, exit_layer))[:, 0]
        return (lead(scores) if stop_below.score == "lead" else top_probability(logits))[:, 0]

    def propose(state, offset):
        token, cache = state
        position = sequences.position[:, None] + offset
        x, cache = early_layers(token, cache, position)
        logits = read_draft_head(weights, x, exit_layer)
        if acceptance == "rejection" and sampling is not None:
            log_p = processed(logits, sampling)
            token = draw(log_p, sampling, position + 1)[:, 0]
            # Without the noise: whether a row goes on must not depend on what it draws.
            score = sureness(x, logits, log_p)
            return (token, cache), (token, log_p[:, 0], x[:, 0]), score
        scores = contest(logits, position + 1, sampling)
        token = likeliest(scores)[:, 0]
        return (token, cache), (token, None, x[:, 0]), sureness(x, logits, scores)

    start = (sequences.last, cache)
    if stop_below is not None:
        (last, cache), (tokens, log_p, states), made, lengths = _until_unsure(
            propose, start, ~sequences.done, stop_below.threshold, draft_length
        )
        last_state, cache = early_layers(last, cache, sequences.position[:, None] + made)
        states = jnp.pad(states, ((0, 0), (0, 1), (0, 0)))
        states = jax.lax.dynamic_update_slice_in_dim(states, last_state, made, axis=1)
        if log_p is None:
            lengths = jnp.broadcast_to(made, lengths.shape)
        return Drafts(tokens, log_p, states, made, lengths), cache
    unrolled = draft_length * exit_layer <= MOST_UNROLLED
    (last, cache), proposed = jax.lax.scan(
        lambda state, offset: propose(state, offset)[:2],
        start,
        jnp.arange(draft_length),
        unroll=draft_length if unrolled else 1,
    )
    tokens, log_p, states = jax.tree.map(lambda x: x.swapaxes(0, 1), proposed)
    last_state, cache = early_layers(last, cache, sequences.position[:, None] + draft_length)
    return Drafts(tokens, log_p, jnp.concatenate([states, last_state], axis=1)), cache


def draft_by_another(
    draft_weights: DecoderWeights,
    draft_cache: Cache,
    weights: DecoderWeights,
    sequences: SequenceState,
    sampling: Sampling | None,
    stop_below: StopBelow | None = None,
    *,
    draft_length: int,
    acceptance: str,
) -> tuple[Drafts, Cache]:
    """Proposes G tokens a row with another model; `verify` then runs every layer, E = 0.

    It is fed its last draft too, so both caches hold the same positions, whatever is accepted:
    those that are not are overwritten in both.

    Args:
      draft_weights: the model's that drafts.
      draft_cache: its own.
      weights: the model's that verifies.
      sequences: what is known of each.
      sampling: None decodes greedily.
      stop_below: None drafts G tokens always; see `draft`.
      draft_length: G, drafts a cycle.
      acceptance: as in `draft`.

    Returns:
      The drafts, and the cache of the model that drafts.
    """
    drafts, draft_cache = draft(
        draft_weights, draft_cache, sequences, sampling, stop_below,
        exit_layer=len(draft_weights.layers), draft_length=draft_length, acceptance=acceptance,
    )  # fmt: skip
    fed = jnp.concatenate([sequences.last[:, None], drafts.tokens], axis=1)
    return drafts._replace(exit_cache=weights.embedding[fed]), draft_cache


def _until_unsure(propose, start, going, threshold, most):
    """Proposes until no row is sure of its newest draft, `most` times at most.

    Returns the state after it, what was proposed as `[B, most, ...]` (zeros beyond), how many
    drafts were made, and each row's own, its unsure one the last.
    """
    _, one, _ = jax.eval_shape(propose, start, jnp.int32(0))
    room = jax.tree.map(lambda x: jnp.zeros((x.shape[0], most, *x.shape[1:]), x.dtype), one)

    def go_on(carry):
        made, going = carry[2], carry[4]
        return (made < most) & going.any()

    def one_more(carry):
        state, proposed, made, lengths, going = carry
        state, new, score = propose(state, made)
        proposed = jax.tree.map(
            lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, made, 1), proposed, new
        )
        return state, proposed, made + 1, lengths + going, going & (score >= threshold)

    begin = start, room, jnp.int32(0), jnp.zeros(going.shape, jnp.int32), going
    return jax.lax.while_loop(go_on, one_more, begin)[:4]


def verification_widths(draft_length: int) -> tuple[int, ...]:
    """Returns how many tokens verification may read at once: 2, 3, 5, 9, ..., G + 1."""
    doubling = [1 << power for power in range(draft_length.bit_length())]
    return tuple(sorted({drafts + 1 for drafts in doubling} | {draft_length + 1}))


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

    One token more than the accepted drafts is the whole model's own; what follows is not. Where
    fewer than G drafts were made, the smallest of `verification_widths` that holds them is read.
    """
    if drafts.made is None:
        return _verify(weights, cache, sequences, drafts, sampling, exit_layer)
    longest = drafts.exit_cache.shape[1]

    # A loop that runs once at most, not a switch: a loop's cache stays where it is.
    def at_width(width, carry):
        def body(carry):
            log_p = None if drafts.log_p is None else drafts.log_p[:, : width - 1]
            some = Drafts(
                drafts.tokens[:, : width - 1], log_p, drafts.exit_cache[:, :width],
                drafts.made, drafts.lengths,
            )  # fmt: skip
            tokens, accepted, cache = _verify(
                weights, carry[2], sequences, some, sampling, exit_layer
            )
            return jnp.pad(tokens, ((0, 0), (0, longest - width))), accepted, cache, True

        return jax.lax.while_loop(lambda c: ~c[3] & (drafts.made < width), body, carry)

    carry = (
        jnp.zeros((drafts.tokens.shape[0], longest), jnp.int32),
        jnp.zeros_like(drafts.lengths), cache, jnp.bool_(False),
    )  # fmt: skip
    for width in verification_widths(longest - 1):
        carry = at_width(width, carry)
    return carry[:3]


def _verify(weights, cache, sequences, drafts, sampling, exit_layer):
    positions = sequences.position[:, None] + jnp.arange(drafts.exit_cache.shape[1])
    num_layers = len(weights.layers)
    x, cache = run_layers(weights, cache, drafts.exit_cache, positions, exit_layer, num_layers)
    logits = read_head(weights, x)
    if drafts.log_p is not None:
        log_p = processed(logits, sampling)
        tokens, accepted = reject(
            drafts.tokens, drafts.log_p, log_p, positions + 1, sampling, drafts.lengths
        )
        return tokens, accepted, cache
    chosen = choose(logits, positions + 1, sampling)
    # The accepted drafts are the first of the chosen tokens, by definition of accepting.
    accepted = matching(drafts.tokens, chosen)
    if drafts.lengths is not None:
        accepted = jnp.minimum(accepted, drafts.lengths)
    return chosen, accepted, cache


@jax.named_scope("count")
def count_drafts(
    drafts: Int[Array, "B G"],
    accepted: Int[Array, "B"],
    sequences: SequenceState,
    limits: Limits,
    made: Int[Array, ""] | None = None,
    lengths: Int[Array, "B"] | None = None,
) -> SpeculationCounts:
    """Counts one cycle, given the sequences before it and how many drafts agreed.

    Of drafts that ended early, `made` and `lengths` are those of `Drafts`.
    """
    index = jnp.arange(drafts.shape[1])
    ends = stops_at(sequences, drafts, limits.stop).astype(jnp.int32)
    ended_before = jnp.cumsum(ends, axis=1) - ends > 0
    room = limits.max_new_tokens - sequences.count
    usable = (index < room[:, None]) & ~ended_before & ~sequences.done[:, None]
    if lengths is not None:
        usable &= index < lengths[:, None]
    kept = usable & (index < accepted[:, None])
    examined = usable & (index <= accepted[:, None])
    return SpeculationCounts(
        cycles=(~sequences.done).astype(jnp.int32),
        drafted=usable.sum(axis=1),
        accepted=kept.sum(axis=1),
        examined=examined.astype(jnp.int32),
        kept=kept.astype(jnp.int32),
        made=jnp.where(sequences.done, 0, drafts.shape[1] if made is None else made),
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
    counts = count_drafts(drafts.tokens, accepted, sequences, limits, drafts.made, drafts.lengths)
    return append(sequences, tokens, accepted + 1, limits), counts


def cycle(
    weights: DecoderWeights,
    cache: Cache,
    sequences: SequenceState,
    limits: Limits,
    sampling: Sampling | None,
    stop_below: StopBelow | None = None,
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
      stop_below: None drafts G tokens always; see `draft`.
      exit_layer: E, the layers that draft.
      draft_length: G, drafts a cycle.
      acceptance: for sampling, `same_noise` (drafter-invariant) or `rejection`.
    """
    drafts, cache = draft(
        weights, cache, sequences, sampling, stop_below,
        exit_layer=exit_layer, draft_length=draft_length, acceptance=acceptance,
    )  # fmt: skip
    tokens, accepted, cache = verify(
        weights, cache, sequences, drafts, sampling, exit_layer=exit_layer
    )
    sequences, counts = accept(sequences, drafts, tokens, accepted, limits)
    return sequences, cache, counts
