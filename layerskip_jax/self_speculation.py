"""Self-speculative decoding: draft with the first layers, verify with the rest.

LayerSkip, section 4.3. One cycle, for each row of the batch on its own:

1. *Draft*: layers 0..E-1 and the head propose G tokens, one after another. The states after
   layer E-1 are kept (the exit cache), and so are the keys and values of those layers.
2. *Verify*: the last draft alone runs layers 0..E-1; then all G + 1 states run layers E..L-1
   in one pass. Every token that is fed passes every layer exactly once.
3. *Accept*: the drafts that the whole model would have chosen, up to the first that it would
   not, and one token of its own after them.

One set of weights and one cache serve both. Rejected positions need no undoing: the next
cycle overwrites them before it can see them. The tokens are those of plain decoding.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from layerskip_jax.decoding.autoregressive import (
    ChooseTokens,
    Limits,
    Rows,
    append,
    greedy,
    prefill,
)
from layerskip_jax.decoding.cache import Cache, read_head, run_layers
from layerskip_jax.decoding.weights import DecoderWeights
from layerskip_jax.model.config import ModelConfig


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


def draft(
    weights: DecoderWeights,
    cache: Cache,
    rows: Rows,
    *,
    exit_layer: int,
    draft_length: int,
    choose: ChooseTokens,
) -> tuple[Int[Array, "B G"], Array, Cache]:
    """Proposes G tokens a row with layers 0..E-1 and the head.

    Returns:
      The drafts, the exit cache `[B, G + 1, D]` of the states after layer E-1 of the newest
      token and of every draft, and the key/value cache.
    """

    def early_layers(token, cache, offset):
        x = weights.embedding[token][:, None]
        return run_layers(weights, cache, x, rows.position[:, None] + offset, 0, exit_layer)

    def propose(state, offset):
        token, cache = state
        x, cache = early_layers(token, cache, offset)
        token = choose(read_head(weights, x))[:, 0]
        return (token, cache), (token, x[:, 0])

    (last, cache), (drafts, states) = jax.lax.scan(
        propose, (rows.last, cache), jnp.arange(draft_length)
    )
    last_state, cache = early_layers(last, cache, draft_length)
    exit_cache = jnp.concatenate([states.swapaxes(0, 1), last_state], axis=1)
    return drafts.swapaxes(0, 1), exit_cache, cache


def verify(
    weights: DecoderWeights,
    cache: Cache,
    rows: Rows,
    exit_cache: Array,
    *,
    exit_layer: int,
    choose: ChooseTokens,
) -> tuple[Int[Array, "B G1"], Cache]:
    """Returns the whole model's G + 1 tokens: one after the newest token and each draft."""
    positions = rows.position[:, None] + jnp.arange(exit_cache.shape[1])
    num_layers = len(weights.layers)
    x, cache = run_layers(weights, cache, exit_cache, positions, exit_layer, num_layers)
    return choose(read_head(weights, x)), cache


def accepted_drafts(drafts: Int[Array, "B G"], verified: Int[Array, "B G1"]) -> Int[Array, "B"]:
    """Returns how many drafts agree with the whole model before the first that does not."""
    agrees = drafts == verified[:, :-1]
    return jnp.cumprod(agrees.astype(jnp.int32), axis=1).sum(axis=1)


def count_drafts(
    drafts: Int[Array, "B G"], accepted: Int[Array, "B"], rows: Rows, limits: Limits
) -> SpeculationCounts:
    """Counts one cycle, given the rows before it and how many drafts agreed."""
    index = jnp.arange(drafts.shape[1])
    is_end = (drafts == limits.end_token).astype(jnp.int32)
    ended_before = jnp.cumsum(is_end, axis=1) - is_end > 0
    room = limits.max_new_tokens - rows.count
    usable = (index < room[:, None]) & ~ended_before & ~rows.done[:, None]
    kept = usable & (index < accepted[:, None])
    examined = usable & (index <= accepted[:, None])
    return SpeculationCounts(
        cycles=(~rows.done).astype(jnp.int32),
        drafted=usable.sum(axis=1),
        accepted=kept.sum(axis=1),
        examined=examined.astype(jnp.int32),
        kept=kept.astype(jnp.int32),
    )


def speculate(
    weights: DecoderWeights,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    limits: Limits,
    *,
    config: ModelConfig,
    exit_layer: int,
    draft_length: int,
    capacity: int,
    choose: ChooseTokens = greedy,
) -> tuple[Rows, SpeculationCounts]:
    """Decodes self-speculatively, all in one program.

    Args:
      weights: of the model.
      prompts: right-padded.
      lengths: tokens in each prompt.
      limits: when rows end.
      config: shapes.
      exit_layer: E, the layers that draft.
      draft_length: G, drafts a cycle.
      capacity: most new tokens the buffers are to hold.
      choose: from logits to tokens; drafting and verifying choose alike.

    Returns:
      The rows, and the counts of each row over all cycles.
    """
    rows, cache = prefill(
        weights,
        prompts,
        lengths,
        limits,
        config=config,
        exit_layer=config.num_layers,
        capacity=capacity,
        lookahead=draft_length + 1,
        choose=choose,
    )
    zeros = jnp.zeros(prompts.shape[0], jnp.int32)
    by_position = jnp.zeros((prompts.shape[0], draft_length), jnp.int32)
    counts = SpeculationCounts(zeros, zeros, zeros, by_position, by_position)

    def unfinished(state):
        return ~state[0].done.all()

    def cycle(state):
        rows, cache, counts = state
        drafts, exit_cache, cache = draft(
            weights,
            cache,
            rows,
            exit_layer=exit_layer,
            draft_length=draft_length,
            choose=choose,
        )
        verified, cache = verify(
            weights, cache, rows, exit_cache, exit_layer=exit_layer, choose=choose
        )
        accepted = accepted_drafts(drafts, verified)
        # The accepted drafts are the first of `verified`, by definition of accepting.
        new = count_drafts(drafts, accepted, rows, limits)
        rows = append(rows, verified, accepted + 1, limits)
        return rows, cache, jax.tree.map(jnp.add, counts, new)

    rows, _, counts = jax.lax.while_loop(unfinished, cycle, (rows, cache, counts))
    return rows, counts
