"""The compiled loop: every way to decode is a choice of arms.

An arm (E, G) is one way to go on by a cycle: draft G tokens with E layers and verify them, or,
with G = 0, take one token from the first E layers. Plain decoding has one arm, (L, 0); a pair
has one, (E, G). With several, each cycle takes the one that promises the most tokens for its
cost, given how often the drafts of its exit have been accepted so far, and, where drafts end early,
how often drafting went on. Plain decoding is one of them, so a model whose exits are of no use is
soon decoded plainly. Where a second model drafts, the
arm is (0, G): all layers of the first verify.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from layerskip_jax.decoding import adaptive
from layerskip_jax.decoding.adaptive import Depth, DepthCounts, Waiting
from layerskip_jax.decoding.autoregressive import next_token
from layerskip_jax.decoding.cache import Cache
from layerskip_jax.decoding.sampling import Sampling
from layerskip_jax.decoding.sequences import Limits, SequenceState
from layerskip_jax.decoding.weights import DecoderWeights
from layerskip_jax.self_speculation import (
    Drafts,
    SpeculationCounts,
    StopBelow,
    accept,
    cycle,
    draft,
    draft_by_another,
    verify,
)

# Of the evidence about an exit this share is left after each cycle, so that what was learnt
# on other text fades, and an exit that was given up is tried again now and then.
MEMORY = 0.996
# What is believed of an exit before it was tried: so many drafts, of which this share was
# accepted. Too good rather than too bad, or it would never be tried.
PRIOR_DRAFTS, PRIOR_ACCEPTANCE = 1.0, 0.8


class Arm(NamedTuple):
    """One way to go on: E layers, and G drafts a cycle.

    G = 0 takes the E layers' token; with E = 0 another model drafts.
    """

    exit_layer: int
    draft_length: int


class Evidence(NamedTuple):
    """How the drafts of each arm's exit fared lately; arms of one exit share it.

    Attributes:
      examined: drafts whose predecessors were all accepted.
      kept: those that were accepted.
      asked: times that drafting could have ended early, after each draft but the last.
      sure: those in which it went on; without `StopBelow` all.
    """

    examined: Float[Array, "A"]
    kept: Float[Array, "A"]
    asked: Float[Array, "A"]
    sure: Float[Array, "A"]


class Costs(NamedTuple):
    """Time of a cycle of each arm, in any unit.

    Attributes:
      shortest: where drafting ends after one draft.
      longest: where it makes all G; the same without `StopBelow`, and where G is 0 or 1.
    """

    shortest: Float[Array, "A"]
    longest: Float[Array, "A"]


class Generating(NamedTuple):
    """A generation on the device.

    Attributes:
      sequences: what is known of each.
      cache: keys and values.
      counts: what happened, by arm.
      evidence: what arms are chosen by.
      draft_cache: keys and values of a model that drafts, None where there is none.
    """

    sequences: SequenceState
    cache: Cache
    counts: SpeculationCounts
    evidence: Evidence
    draft_cache: Cache | None = None


class Adapting(NamedTuple):
    """A generation of adaptive depth on the device.

    Attributes:
      sequences: what is known of each.
      cache: keys and values.
      waiting: tokens that have not run every layer, see `decoding.adaptive`.
      counts: how deep tokens ran.
    """

    sequences: SequenceState
    cache: Cache
    waiting: Waiting | None
    counts: DepthCounts


def lookahead(arms: tuple[Arm, ...], least: int = 0) -> int:
    """Returns how far beyond the last new token may be written: G + 1, in steps of eight.

    So that one program reads the prompts for pairs of any usual G, for plain decoding, and for
    adaptive depth, which needs `least`.
    """
    longest = max(least, *(arm.draft_length + 1 for arm in arms))
    return -(-longest // 8) * 8


def layers_read(arms: tuple[Arm, ...], num_layers: int) -> int:
    """Returns how many layers have to read the prompts: all that will decode."""
    drafts = any(arm.draft_length for arm in arms)
    return num_layers if drafts else max(arm.exit_layer for arm in arms)


def no_counts(arms: tuple[Arm, ...], rows: int) -> SpeculationCounts:
    """Returns the counts of a generation that has only read its prompts."""
    longest = max(1, *(arm.draft_length for arm in arms))
    by_row = np.zeros((len(arms), rows), np.int32)
    by_position = np.zeros((len(arms), rows, longest), np.int32)
    return SpeculationCounts(by_row, by_row, by_row, by_position, by_position, by_row)


def promised_tokens(
    arm: Arm, acceptance: Float[Array, ""], sureness: Float[Array, ""]
) -> Float[Array, ""]:
    """Returns the tokens expected of a cycle (docs/method.md, sections 4 and 8).

    1 + sum of s^(i-1) a^i, i = 1..G, where s is the share of the times that drafting went on; with
    s = 1 the sum of a^i, i = 0..G.
    """
    drafts = range(1, arm.draft_length + 1)
    return 1 + sum(sureness ** (i - 1) * acceptance**i for i in drafts) + jnp.zeros(())


def expected_cost(
    arm: Arm, shortest: Float[Array, ""], longest: Float[Array, ""], sureness: Float[Array, ""]
) -> Float[Array, ""]:
    """Returns the cost of a cycle of sum s^(i-1), i = 1..G, drafts, on the line between the two."""
    if arm.draft_length < 2:
        return longest
    drafts = sum(sureness**i for i in range(arm.draft_length))
    return shortest + (longest - shortest) * (drafts - 1) / (arm.draft_length - 1)


def best_arm(arms: tuple[Arm, ...], evidence: Evidence, costs: Costs) -> Int[Array, ""]:
    """Returns the arm that promises the most tokens for its cost."""
    kept = evidence.kept + PRIOR_DRAFTS * PRIOR_ACCEPTANCE
    acceptance = kept / (evidence.examined + PRIOR_DRAFTS)
    sureness = (evidence.sure + PRIOR_DRAFTS) / (evidence.asked + PRIOR_DRAFTS)
    promised = [
        promised_tokens(arm, acceptance[index], sureness[index])
        / expected_cost(arm, costs.shortest[index], costs.longest[index], sureness[index])
        for index, arm in enumerate(arms)
    ]
    return jnp.argmax(jnp.stack(promised)).astype(jnp.int32)


def propose(
    weights: DecoderWeights,
    state: Generating,
    sampling: Sampling | None,
    stop_below: StopBelow | None = None,
    draft_weights: DecoderWeights | None = None,
    *,
    arm: Arm,
    acceptance: str,
) -> tuple[Drafts, Generating]:
    """Drafts, without verifying: a stream shows them before it goes on with `settle`."""
    if draft_weights is not None:
        drafts, draft_cache = draft_by_another(
            draft_weights, state.draft_cache, weights, state.sequences, sampling, stop_below,
            draft_length=arm.draft_length, acceptance=acceptance,
        )  # fmt: skip
        return drafts, state._replace(draft_cache=draft_cache)
    drafts, cache = draft(
        weights,
        state.cache,
        state.sequences,
        sampling,
        stop_below,
        exit_layer=arm.exit_layer,
        draft_length=arm.draft_length,
        acceptance=acceptance,
    )
    return drafts, state._replace(cache=cache)


def settle(
    weights: DecoderWeights,
    state: Generating,
    drafts: Drafts,
    limits: Limits,
    sampling: Sampling | None,
    *,
    arms: tuple[Arm, ...],
    index: int,
) -> Generating:
    """Verifies and accepts the drafts of arm `index`: the rest of its cycle."""
    exit_layer = arms[index].exit_layer
    tokens, accepted, cache = verify(
        weights, state.cache, state.sequences, drafts, sampling, exit_layer=exit_layer
    )
    sequences, new = accept(state.sequences, drafts, tokens, accepted, limits)
    return _after_cycle(state, sequences, cache, new, arms, index)


def run_arm(
    weights: DecoderWeights,
    state: Generating,
    limits: Limits,
    sampling: Sampling | None,
    stop_below: StopBelow | None = None,
    draft_weights: DecoderWeights | None = None,
    *,
    arms: tuple[Arm, ...],
    index: int,
    acceptance: str,
) -> Generating:
    """Goes on by one cycle of arm `index`."""
    arm = arms[index]
    if draft_weights is not None:
        drafts, state = propose(
            weights, state, sampling, stop_below, draft_weights, arm=arm, acceptance=acceptance
        )
        return settle(weights, state, drafts, limits, sampling, arms=arms, index=index)
    if arm.draft_length:
        sequences, cache, new = cycle(
            weights,
            state.cache,
            state.sequences,
            limits,
            sampling,
            stop_below,
            exit_layer=arm.exit_layer,
            draft_length=arm.draft_length,
            acceptance=acceptance,
        )
        return _after_cycle(state, sequences, cache, new, arms, index)
    unfinished = (~state.sequences.done).astype(jnp.int32)
    sequences, cache = next_token(
        weights, state.cache, state.sequences, limits, sampling, num_layers=arm.exit_layer
    )
    cycles = state.counts.cycles.at[index].add(unfinished)
    counts = state.counts._replace(cycles=cycles)
    return state._replace(
        sequences=sequences,
        cache=cache,
        counts=counts,
        evidence=_learn(arms, index, state.evidence, None),
    )


def advance(
    weights: DecoderWeights,
    state: Generating,
    limits: Limits,
    sampling: Sampling | None,
    costs: Costs,
    most_cycles: Int[Array, ""],
    stop_below: StopBelow | None = None,
    draft_weights: DecoderWeights | None = None,
    *,
    arms: tuple[Arm, ...],
    acceptance: str,
) -> Generating:
    """Goes on until every row is done, or for `most_cycles` cycles.

    Args:
      weights: the model's weights.
      state: what has read the prompts, or gone on from there.
      limits: when sequences end.
      sampling: None decodes greedily.
      costs: of a cycle of each arm.
      most_cycles: as far as to go at most.
      stop_below: when drafting ends early; None drafts G tokens always.
      draft_weights: those of a second model that drafts, for the one arm (0, G).
      arms: the ways to go on.
      acceptance: for sampling, `same_noise` or `rejection`, as in `draft`.
    """

    def run(index, state):
        return run_arm(
            weights, state, limits, sampling, stop_below, draft_weights,
            arms=arms, index=index, acceptance=acceptance,
        )  # fmt: skip

    if len(arms) == 1:
        return _repeat(functools.partial(run, 0), state, most_cycles)

    # A loop for each arm within the loop, not a switch: a loop's cache stays where it is.
    def stay(index, carry):
        state, done, arm = carry

        def body(carry):
            state, done, _ = carry
            state = run(index, state)
            return state, done + 1, best_arm(arms, state.evidence, costs)

        return jax.lax.while_loop(
            lambda carry: (carry[2] == index) & _may_go_on(*carry[:2], most_cycles), body, carry
        )

    def through_all(carry):
        return functools.reduce(lambda carry, i: stay(i, carry), range(len(arms)), carry)

    first = best_arm(arms, state.evidence, costs)
    carry = state, jnp.int32(0), first
    return jax.lax.while_loop(
        lambda carry: _may_go_on(*carry[:2], most_cycles), through_all, carry
    )[0]


def _may_go_on(state, done, most):
    """Whether a row is not done, and fewer than `most` cycles are."""
    return ~state.sequences.done.all() & (done < most)


def _repeat(run, state, most):
    """Runs one way to go on until every row is done, or `most` times."""
    return jax.lax.while_loop(
        lambda carry: _may_go_on(*carry, most),
        lambda carry: (run(carry[0]), carry[1] + 1),
        (state, jnp.int32(0)),
    )[0]


def advance_adaptive(
    weights: DecoderWeights,
    state: Adapting,
    limits: Limits,
    sampling: Sampling | None,
    threshold: Float[Array, ""],
    most_tokens: Int[Array, ""],
    *,
    depth: Depth,
) -> Adapting:
    """Goes on until every row is done, or for `most_tokens` tokens of each.

    Args:
      weights: the model's weights.
      state: what has read the prompts, or gone on from there.
      limits: when sequences end.
      sampling: None decodes greedily.
      threshold: the policy's.
      most_tokens: as far as to go at most.
      depth: the policy, the exits, and what becomes of skipped layers.
    """
    skipped = adaptive.projections(weights, state.cache, state.sequences.last.shape[0], depth)

    def run(state):
        sequences, cache, waiting, new = adaptive.next_token(
            weights, skipped, state.cache, state.waiting, state.sequences, limits, sampling,
            threshold, depth=depth,
        )  # fmt: skip
        counts = jax.tree.map(jnp.add, state.counts, new)
        return Adapting(sequences, cache, waiting, counts)

    return _repeat(run, state, most_tokens)


def _after_cycle(
    state: Generating,
    sequences: SequenceState,
    cache: Cache,
    new: SpeculationCounts,
    arms: tuple[Arm, ...],
    index: int,
) -> Generating:
    """Adds up what a cycle of arm `index` did, and learns from it."""
    counts = jax.tree.map(
        lambda total, n: total.at[(index, slice(None), *map(slice, n.shape[1:]))].add(n),
        state.counts,
        new,
    )
    return state._replace(
        sequences=sequences,
        cache=cache,
        counts=counts,
        evidence=_learn(arms, index, state.evidence, new),
    )


def _learn(
    arms: tuple[Arm, ...], index: int, evidence: Evidence, new: SpeculationCounts | None
) -> Evidence:
    """Fades what is known, and adds what a cycle of arm `index` showed to its exit's arms."""
    known = jax.tree.map(lambda number: number * MEMORY, evidence)
    if new is None:
        return known
    same = jnp.array([arm.exit_layer == arms[index].exit_layer for arm in arms], jnp.float32)
    made = new.made.max()
    asked = jnp.minimum(made, arms[index].draft_length - 1)
    new = Evidence(new.examined.sum(), new.kept.sum(), asked, jnp.maximum(made - 1, 0))
    return jax.tree.map(lambda number, more: number + same * more, known, new)
