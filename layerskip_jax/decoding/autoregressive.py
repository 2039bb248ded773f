"""Reading prompts, and one token after another by all layers or by the first few."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from layerskip_jax.decoding.cache import Cache, empty_cache, read_head, run_layers
from layerskip_jax.decoding.sampling import Sampling, choose
from layerskip_jax.decoding.sequences import Limits, SequenceState, append, empty_sequences
from layerskip_jax.decoding.weights import DecoderWeights
from layerskip_jax.model.config import ModelConfig

# Longer prompts are read in pieces of so many tokens, which bounds the memory of attention.
PREFILL_CHUNK = 512


def beyond_newest(prompt_length: int, lookahead: int) -> int:
    """Returns the most tokens that a pass writes beyond a row's newest, given P and `lookahead`."""
    return max(min(prompt_length, PREFILL_CHUNK), lookahead)


def prefill(
    weights: DecoderWeights,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    limits: Limits,
    sampling: Sampling | None,
    *,
    config: ModelConfig,
    num_layers: int,
    capacity: int,
    lookahead: int,
) -> tuple[SequenceState, Cache]:
    """Reads the prompts and chooses each row's first new token.

    Args:
      weights: the model's weights.
      prompts: right-padded; P is at most `PREFILL_CHUNK` or a multiple of it.
      lengths: tokens in each prompt, at least 1.
      limits: when sequences end.
      sampling: None decodes greedily.
      config: shapes.
      num_layers: layers that run; L for the whole model.
      capacity: most new tokens the buffers are to hold.
      lookahead: tokens that may be written beyond the last new one, at most.
    """
    last_states, cache = _read(
        weights, prompts, lengths,
        config=config, num_layers=num_layers, capacity=capacity, lookahead=lookahead,
    )  # fmt: skip
    sequences = empty_sequences(lengths, capacity + lookahead, limits.stop.shape[1])
    first = choose(read_head(weights, last_states, num_layers), lengths[:, None], sampling)
    return append(sequences, first, jnp.ones_like(lengths), limits), cache


def read_for_drafts(
    weights: DecoderWeights,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    *,
    config: ModelConfig,
    capacity: int,
    lookahead: int,
) -> Cache:
    """Returns the cache of a draft model that has read the prompts; arguments as in `prefill`."""
    return _read(
        weights, prompts, lengths,
        config=config, num_layers=config.num_layers, capacity=capacity, lookahead=lookahead,
    )[1]  # fmt: skip


def _read(
    weights, prompts, lengths, *, config, num_layers, capacity, lookahead
) -> tuple[Float[Array, "B 1 D"], Cache]:
    """Returns the states of the prompts' last tokens, and a cache with room for what follows."""
    batch, length = prompts.shape
    chunk = min(length, PREFILL_CHUNK)
    cache = empty_cache(
        config, num_layers, batch, length + capacity + lookahead, beyond_newest(length, lookahead)
    )
    if length % chunk:
        raise ValueError(f"prompts padded to {length} are no whole number of {chunk} tokens")

    def read(index, state):
        cache, last_states = state
        start = index * chunk
        tokens = jax.lax.dynamic_slice_in_dim(prompts, start, chunk, axis=1)
        # Rows that have ended write just beyond their end, again and again: a layer with a window
        # has no slots for more.
        begin = jnp.minimum(start, lengths)
        positions = begin[:, None] + jnp.arange(chunk)
        x, cache = run_layers(weights, cache, weights.embedding[tokens], positions, 0, num_layers)
        within = lengths - 1 - start
        found = jnp.take_along_axis(x, jnp.clip(within, 0, chunk - 1)[:, None, None], axis=1)
        here = (0 <= within) & (within < chunk)
        return cache, jnp.where(here[:, None, None], found, last_states)

    state = cache, jnp.zeros((batch, 1, config.model_dim), config.compute_dtype)
    if length == chunk:
        cache, last_states = read(0, state)
    else:
        longest = lengths.max()
        cache, last_states = jax.lax.fori_loop(0, (longest + chunk - 1) // chunk, read, state)
    return last_states, cache


def next_token(
    weights: DecoderWeights,
    cache: Cache,
    sequences: SequenceState,
    limits: Limits,
    sampling: Sampling | None,
    *,
    num_layers: int,
) -> tuple[SequenceState, Cache]:
    """Gives each row one token, by the first `num_layers` layers and the head."""
    position = sequences.position[:, None]
    x: Float[Array, "B 1 D"] = weights.embedding[sequences.last][:, None]
    x, cache = run_layers(weights, cache, x, position, 0, num_layers)
    chosen = choose(read_head(weights, x, num_layers), position + 1, sampling)
    return append(sequences, chosen, jnp.ones_like(sequences.count), limits), cache
