"""Documents packed into fixed windows, without losing a token.

The documents of a split, each followed by the end token, form one stream. A window holds
S + 1 tokens of it, of which S are inputs and S are targets, and shares its first token with
the end of the window before: every token of the stream but the first is a target once.
Segment ids number the documents within a window from 1; 0 is padding. A document that goes
on in the next window is segment 1 there and its positions start again.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32


class Rows(NamedTuple):
    """Rows of S positions, ready to train on.

    Attributes:
      tokens: inputs.
      targets: the token after each input.
      valid: which targets count: those in the same document as their input.
      segment_ids: document of each input within its window, from 1; 0 is padding.
      positions: the position of each input within its document's part of the window, from 0.
    """

    tokens: Int32[np.ndarray, "B S"]
    targets: Int32[np.ndarray, "B S"]
    valid: Bool[np.ndarray, "B S"]
    segment_ids: Int32[np.ndarray, "B S"]
    positions: Int32[np.ndarray, "B S"]


def pack(
    documents: Iterable[Int32[np.ndarray, "tokens"]], sequence_length: int, end_token_id: int
) -> Iterator[Int32[np.ndarray, "2 S1"]]:
    """Cuts documents into windows of S + 1 tokens (row 0) and segment ids (row 1).

    Holds one window and one document at a time. The last window is padded with end tokens
    of segment 0; a last window that would hold no target is left out.

    Args:
      documents: token ids of each, without the end token.
      sequence_length: S.
      end_token_id: follows each document.
    """
    size = sequence_length + 1
    tokens, segments = np.empty(0, np.int32), np.empty(0, np.int32)
    for number, document in enumerate(documents):
        tokens = np.concatenate([tokens, document, [end_token_id]], dtype=np.int32)
        segments = np.pad(segments, (0, len(document) + 1), constant_values=number)
        start = 0
        while len(tokens) - start >= size:
            window = slice(start, start + size)
            yield np.stack([tokens[window], segments[window] - segments[start] + 1])
            start += sequence_length
        tokens, segments = tokens[start:], segments[start:]
    if len(tokens) > 1:
        padding = (0, size - len(tokens))
        yield np.stack(
            [
                np.pad(tokens, padding, constant_values=end_token_id),
                np.pad(segments - segments[0] + 1, padding),
            ]
        )


def unpack(windows: Int32[np.ndarray, "B 2 S1"]) -> Rows:
    """Returns the inputs, targets, segments and positions of packed windows.

    Positions are not stored: they follow from the segments. The target of a document's end
    token, the first token of the next document, is not valid; the end token itself is.
    """
    tokens, segments = windows[:, 0], windows[:, 1]
    inputs = segments[:, :-1]
    index = np.arange(inputs.shape[1])
    starts = np.diff(inputs, axis=1, prepend=-1) != 0
    first = np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    return Rows(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        valid=(inputs == segments[:, 1:]) & (inputs > 0),
        segment_ids=inputs,
        positions=(index - first).astype(np.int32),
    )
