"""What every exit says of known text, and where a policy would have left it.

Text is read as it stands: each token is judged given the true ones before it. Under the K/V mode
`deferred` all keys and values are those of the whole model, so one pass (`read_exits`) holds what
every threshold does. Under `propagate` a token that left early changes what later tokens see, so
each threshold needs a pass of its own (`read_propagated`). It is still one pass over all positions:
what a token decides after E layers depends on states after E layers only.

A row holds one text, so no token sees another text. Logits of `CHUNK` positions of one exit are
held at a time.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from layerskip_jax.decoding.cache import empty_cache, head_logits, run_layers
from layerskip_jax.decoding.exit_policy import POLICIES, Candidate, look
from layerskip_jax.decoding.sampling import likeliest
from layerskip_jax.decoding.weights import DecoderWeights
from layerskip_jax.model.config import ModelConfig

# Positions whose logits are held at once.
CHUNK = 64


class ExitReadings(NamedTuple):
    """What the exits say at each position of a batch of texts.

    Attributes:
      choice: the likeliest token, of each exit that was read, the last layer's at the end.
      loss: -log p of the token that follows, in nats, likewise.
      scores: by policy, of each candidate exit.
    """

    choice: Int[Array, "R B S"]
    loss: Float[Array, "R B S"]
    scores: dict[str, Float[Array, "C B S"]]


class Left(NamedTuple):
    """Where each token left the model, and what it said there.

    Attributes:
      layers: the layers it ran.
      choice: the likeliest token of its exit.
      loss: -log p of the token that follows at its exit, in nats.
    """

    layers: Int[Array, "B S"]
    choice: Int[Array, "B S"]
    loss: Float[Array, "B S"]


def pad_length(tokens: int) -> int:
    """Returns the row length that holds texts of so many tokens: inputs in whole chunks, and 1."""
    return -(-max(tokens - 1, 1) // CHUNK) * CHUNK + 1


def _begin(weights, tokens, config, num_layers):
    """Returns embeddings, positions and an empty cache."""
    inputs = tokens[:, :-1]
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
    cache = empty_cache(config, num_layers, *inputs.shape)
    return weights.embedding[inputs], positions, cache


def _in_chunks(function, *arrays):
    """Maps a function of `[B, CHUNK, ...]` arrays over `[B, S, ...]` ones."""

    def split(array):
        return array.reshape(array.shape[0], -1, CHUNK, *array.shape[2:]).swapaxes(0, 1)

    def join(array):
        array = array.swapaxes(0, 1)
        return array.reshape(array.shape[0], -1, *array.shape[3:])

    found = jax.lax.map(lambda parts: function(*parts), jax.tree.map(split, arrays))
    return jax.tree.map(join, found)


class _Seen(NamedTuple):
    """Of the candidate before, what the next one compares with."""

    state: Float[Array, "B S D"]
    choice: Int[Array, "B S"]
    streak: Int[Array, "B S"]


def _read(weights, x, targets, exit_layer, policies, seen):
    """Returns choice and loss of an exit, its scores by policy, and the next one's `_Seen`."""

    def of_chunk(x, targets, seen):
        read = weights.before_head(x, exit_layer)
        logits = head_logits(weights, read)
        before = None
        if seen is not None:
            before = Candidate(seen.state, seen.state, None, seen.choice, seen.streak)
        now = look(x, read, logits, before)
        log_p = jax.nn.log_softmax(logits)
        loss = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        scores = {name: POLICIES[name].score(weights, now, before) for name in policies}
        return likeliest(logits), loss, scores, _Seen(x, now.choice, now.streak)

    return _in_chunks(of_chunk, x, targets, seen)


@functools.partial(jax.jit, static_argnames=("config", "exits", "policies", "also"))
def read_exits(
    weights: DecoderWeights,
    tokens: Int[Array, "B S1"],
    *,
    config: ModelConfig,
    exits: tuple[int, ...],
    policies: tuple[str, ...],
    also: tuple[int, ...] = (),
) -> ExitReadings:
    """Reads texts with the whole model, and with the head at each candidate exit.

    Args:
      weights: the model's weights.
      tokens: texts, right-padded to `pad_length`.
      config: shapes.
      exits: the candidate exits, ascending.
      policies: those whose scores are wanted.
      also: further exits to read, which no policy looks at.
    """
    targets, num_layers = tokens[:, 1:], config.num_layers
    x, positions, cache = _begin(weights, tokens, config, num_layers)
    choices, losses, scores, seen, done = [], [], {name: [] for name in policies}, None, 0
    for exit_layer in sorted({*exits, *also, num_layers}):
        x, cache = run_layers(weights, cache, x, positions, done, exit_layer)
        done = exit_layer
        candidate = exit_layer in exits
        choice, loss, scored, now = _read(
            weights, x, targets, exit_layer, policies if candidate else (), seen
        )
        choices.append(choice)
        losses.append(loss)
        if candidate:
            seen = now
            for name in policies:
                scores[name].append(scored[name])
    stacked = {name: jnp.stack(of_exits) for name, of_exits in scores.items()}
    return ExitReadings(jnp.stack(choices), jnp.stack(losses), stacked)


@functools.partial(jax.jit, static_argnames=("config", "exits", "policy"))
def read_propagated(
    weights: DecoderWeights,
    tokens: Int[Array, "B S1"],
    threshold: Float[Array, ""],
    *,
    config: ModelConfig,
    exits: tuple[int, ...],
    policy: str,
) -> Left:
    """Reads texts under a policy whose skipped layers take K/V from the exit state.

    A token's state stays as it is from its exit on, and so makes its keys and values above.

    Args:
      weights: the model's weights.
      tokens: texts, right-padded to `pad_length`.
      threshold: the policy's.
      config: shapes.
      exits: the candidate exits, ascending.
      policy: one of `POLICIES`.
    """
    targets, num_layers, kind = tokens[:, 1:], config.num_layers, POLICIES[policy]
    x, positions, cache = _begin(weights, tokens, config, num_layers)
    gone = jnp.zeros(targets.shape, bool)
    left = Left(
        jnp.full(targets.shape, num_layers),
        jnp.zeros_like(targets),
        jnp.zeros(targets.shape, jnp.float32),
    )
    seen = None
    for index in range(num_layers):
        y, cache = run_layers(weights, cache, x, positions, index, index + 1)
        x, exit_layer = jnp.where(gone[..., None], x, y), index + 1
        if exit_layer not in (*exits, num_layers):
            continue
        last = exit_layer == num_layers
        choice, loss, scored, seen = _read(
            weights, x, targets, exit_layer, () if last else (policy,), seen
        )
        sure = jnp.ones_like(gone) if last else kind.is_sure(scored[policy], threshold)
        leaves = sure & ~gone
        left = Left(
            jnp.where(leaves, exit_layer, left.layers),
            jnp.where(leaves, choice, left.choice),
            jnp.where(leaves, loss, left.loss),
        )
        gone = gone | leaves
    return left


def first_sure(
    scores: Float[np.ndarray, "C *shape"], threshold: int | float, policy: str
) -> Int[np.ndarray, "*shape"]:
    """Returns which candidate each token leaves at, from 0; C is the last layer.

    The threshold is rounded to float32 first, as the decoding loop has it.
    """
    kind = POLICIES[policy]
    sure = np.asarray(kind.is_sure(jnp.asarray(scores), jnp.float32(threshold)))
    return np.where(sure.any(axis=0), sure.argmax(axis=0), len(scores))
