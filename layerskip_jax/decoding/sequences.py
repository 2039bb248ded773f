"""What decoding knows of each row of a batch, and when a row has ended."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

# In a stop sequence: stands for any token, before the sequence's own; and for none.
ANY, NONE = -1, -2


class SequenceState(NamedTuple):
    """The sequences of a batch, one a row.

    Attributes:
      last: the newest token, not yet fed to the model.
      position: its position.
      tokens: the new tokens; a row's first `count` are valid.
      recent: the newest tokens, as many as a stop sequence is long, less one; `NONE` where
        there are not so many.
      count: new tokens so far.
      done: whether the row has ended; it then stays as it is.
    """

    last: Int[Array, "B"]
    position: Int[Array, "B"]
    tokens: Int[Array, "B N"]
    recent: Int[Array, "B W1"]
    count: Int[Array, "B"]
    done: Bool[Array, "B"]


class Limits(NamedTuple):
    """When a row ends, traced, so that no value of these compiles anew.

    Attributes:
      max_new_tokens: the most new tokens of each row.
      stop: sequences of new tokens that end a row and are its last; see `stop_table`.
    """

    max_new_tokens: Int[Array, "B"]
    stop: Int[Array, "Z W"]


def stop_table(sequences: list[list[int]], rows: int, width: int) -> np.ndarray:
    """Lays stop sequences out as `[rows, width]`, right-aligned after `ANY`, `NONE` beyond."""
    table = np.full((rows, width), NONE, np.int32)
    for row, sequence in zip(table, sequences, strict=False):
        row[:] = ANY
        row[width - len(sequence) :] = sequence
    return table


def empty_sequences(lengths: Int[Array, "B"], slots: int, stop_width: int) -> SequenceState:
    """Returns sequences that have read a prompt of `lengths` tokens but for its last one."""
    zeros = jnp.zeros_like(lengths)
    batch = lengths.shape[0]
    return SequenceState(
        last=zeros,
        position=lengths - 1,
        tokens=jnp.zeros((batch, slots), jnp.int32),
        recent=jnp.full((batch, stop_width - 1), NONE, jnp.int32),
        count=zeros,
        done=zeros > 0,
    )


def stops_at(
    sequences: SequenceState, tokens: Int[Array, "B S"], stop: Int[Array, "Z W"]
) -> Bool[Array, "B S"]:
    """Returns where a stop sequence is complete, were these tokens a row's next ones."""
    width = stop.shape[1]
    joined = jnp.concatenate([sequences.recent, tokens], axis=1)
    windows = jnp.stack([joined[:, i : i + tokens.shape[1]] for i in range(width)], axis=-1)
    equal = (windows[:, :, None] == stop) | (stop == ANY)
    return equal.all(axis=-1).any(axis=-1)


@jax.named_scope("append")
def append(
    sequences: SequenceState, tokens: Int[Array, "B S"], offered: Int[Array, "B"], limits: Limits
) -> SequenceState:
    """Gives each row the first `offered` of its tokens, as far as it may have them.

    Nothing goes past a stop sequence or past `max_new_tokens`, and nothing to a row that is
    done.
    """
    length = tokens.shape[1]
    ends = stops_at(sequences, tokens, limits.stop)
    until_end = jnp.where(ends.any(axis=1), jnp.argmax(ends, axis=1) + 1, length + 1)
    room = limits.max_new_tokens - sequences.count
    given = jnp.where(sequences.done, 0, jnp.minimum(jnp.minimum(offered, until_end), room))
    # All `length` tokens are written: what is beyond the given ones is overwritten later, or
    # lies past the row's count for good.
    written = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))(
        sequences.tokens, tokens, sequences.count
    )

    def pick(row, index):
        return jnp.take_along_axis(row, index, axis=1)

    newest = pick(tokens, jnp.maximum(given - 1, 0)[:, None])[:, 0]
    joined = jnp.concatenate([sequences.recent, tokens], axis=1)
    count = sequences.count + given
    return SequenceState(
        last=jnp.where(given > 0, newest, sequences.last),
        position=sequences.position + given,
        tokens=written,
        recent=pick(joined, given[:, None] + jnp.arange(sequences.recent.shape[1])),
        count=count,
        done=sequences.done | (given == until_end) | (count >= limits.max_new_tokens),
    )
