"""One token after another, by all layers or by the first few, in one compiled program."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from layerskip_jax.decoding.cache import Cache, empty_cache, read_head, run_layers
from layerskip_jax.decoding.weights import DecoderWeights
from layerskip_jax.model.config import ModelConfig

# From logits [B, S, V] to tokens [B, S].
ChooseTokens = Callable[[Array], Array]


class Rows(NamedTuple):
    """What decoding knows of each row of a batch.

    Attributes:
      last: the newest token, not yet fed to the model.
      position: its position.
      tokens: the new tokens; a row's first `count` are valid.
      count: new tokens so far.
      done: whether the row has ended; it then stays as it is.
    """

    last: Int[Array, "B"]
    position: Int[Array, "B"]
    tokens: Int[Array, "B N"]
    count: Int[Array, "B"]
    done: Bool[Array, "B"]


class Limits(NamedTuple):
    """When a row ends, traced, so that no value of these compiles anew.

    Attributes:
      max_new_tokens: the most new tokens a row may have.
      end_token: the token that ends a row, and is its last; -1 for none.
    """

    max_new_tokens: Int[Array, ""]
    end_token: Int[Array, ""]


def greedy(logits: Float[Array, "B S V"]) -> Int[Array, "B S"]:
    """Chooses the likeliest token."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def append(rows: Rows, tokens: Int[Array, "B S"], offered: Int[Array, "B"], limits: Limits) -> Rows:
    """Gives each row the first `offered` of its tokens, as far as it may have them.

    Nothing goes past an end token or past `max_new_tokens`, and nothing to a row that is
    done.
    """
    length = tokens.shape[1]
    is_end = tokens == limits.end_token
    until_end = jnp.where(is_end.any(axis=1), jnp.argmax(is_end, axis=1) + 1, length + 1)
    room = limits.max_new_tokens - rows.count
    given = jnp.where(rows.done, 0, jnp.minimum(jnp.minimum(offered, until_end), room))
    # All `length` tokens are written: what is beyond the given ones is overwritten later, or
    # lies past the row's count for good.
    written = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))(
        rows.tokens, tokens, rows.count
    )
    newest = jnp.take_along_axis(tokens, jnp.maximum(given - 1, 0)[:, None], axis=1)[:, 0]
    count = rows.count + given
    return Rows(
        last=jnp.where(given > 0, newest, rows.last),
        position=rows.position + given,
        tokens=written,
        count=count,
        done=rows.done | (given == until_end) | (count >= limits.max_new_tokens),
    )


def prefill(
    weights: DecoderWeights,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    limits: Limits,
    *,
    config: ModelConfig,
    exit_layer: int,
    capacity: int,
    lookahead: int,
    choose: ChooseTokens,
) -> tuple[Rows, Cache]:
    """Reads the prompts and chooses each row's first new token.

    Args:
      weights: of the model.
      prompts: right-padded.
      lengths: tokens in each prompt, at least 1.
      limits: when rows end.
      config: shapes.
      exit_layer: layers that run; L for the whole model.
      capacity: most new tokens the buffers are to hold.
      lookahead: tokens that may be written beyond the last new one, at most.
      choose: from logits to tokens.
    """
    batch, length = prompts.shape
    cache = empty_cache(config, exit_layer, batch, length + capacity + lookahead)
    positions = jnp.broadcast_to(jnp.arange(length), prompts.shape)
    x, cache = run_layers(weights, cache, weights.embedding[prompts], positions, 0, exit_layer)
    last_states = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    zeros = jnp.zeros(batch, jnp.int32)
    rows = Rows(
        last=zeros,
        position=lengths - 1,
        tokens=jnp.zeros((batch, capacity + lookahead), jnp.int32),
        count=zeros,
        done=zeros > 0,
    )
    first = choose(read_head(weights, last_states))
    return append(rows, first, zeros + 1, limits), cache


def decode(
    weights: DecoderWeights,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    limits: Limits,
    *,
    config: ModelConfig,
    exit_layer: int,
    capacity: int,
    choose: ChooseTokens = greedy,
) -> Rows:
    """Decodes with the first `exit_layer` layers and the head; see `prefill` for the rest."""
    rows, cache = prefill(
        weights,
        prompts,
        lengths,
        limits,
        config=config,
        exit_layer=exit_layer,
        capacity=capacity,
        lookahead=1,
        choose=choose,
    )

    def unfinished(state):
        return ~state[0].done.all()

    def next_token(state):
        rows, cache = state
        x = weights.embedding[rows.last][:, None]
        x, cache = run_layers(weights, cache, x, rows.position[:, None], 0, exit_layer)
        chosen = choose(read_head(weights, x))
        return append(rows, chosen, jnp.ones_like(rows.count), limits), cache

    rows, _ = jax.lax.while_loop(unfinished, next_token, (rows, cache))
    return rows
