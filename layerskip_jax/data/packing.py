"""Documents packed into fixed windows of S + 1 tokens, of which S are inputs and S are targets.

Plain text loses no token (`pack`). The documents of a split, each followed by the end token, form
one stream. A window shares its first token with the end of the window before: every token of the
stream but the first is a target once. A document that goes on in the next window is segment 1
there and its positions start again.

Prompts with completions stay whole (`pack_whole`): a window holds whole documents, and shares
nothing with others.

Segment ids number the documents within a window from 1; 0 is padding. Of a token that is never a
target, one of a prompt, the window has the segment id with a minus sign.
"""

import bisect
import itertools
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

Tokens = Int32[np.ndarray, "tokens"]


# Windows that are filled at the same time: with so many, documents of all lengths find a place.
OPEN_WINDOWS = 64


class Rows(NamedTuple):
    """Rows of S positions, ready to train on.

    Attributes:
      tokens: inputs.
      targets: the token after each input.
      valid: which targets count: those in the same document as their input, but for prompts.
      segment_ids: document of each input within its window, from 1; 0 is padding.
      positions: the position of each input within its document's part of the window, from 0.
    """

    tokens: Int32[np.ndarray, "B S"]
    targets: Int32[np.ndarray, "B S"]
    valid: Bool[np.ndarray, "B S"]
    segment_ids: Int32[np.ndarray, "B S"]
    positions: Int32[np.ndarray, "B S"]


class Completed(NamedTuple):
    """A document of which some tokens are learned, the end token included.

    Attributes:
      tokens: its ids.
      is_target: which of them are targets: those of completions.
    """

    tokens: Tokens
    is_target: Bool[np.ndarray, "tokens"]


def pack(
    documents: Iterable[Tokens], sequence_length: int, end_token_id: int
) -> Iterator[Int32[np.ndarray, "2 S1"]]:
    """Cuts documents into windows of S + 1 tokens (row 0) and segment ids (row 1).

    Holds one window and one document more at a time. The last window is padded with end tokens
    of segment 0; a last window that would hold no target is left out.

    Args:
      documents: token ids of each, without the end token.
      sequence_length: S.
      end_token_id: follows each document.
    """
    size = sequence_length + 1
    tokens, segments = np.empty(0, np.int32), np.empty(0, np.int32)
    end = np.array([end_token_id], np.int32)
    parts: list[Tokens] = []  # of documents that no window was cut from yet
    first = waiting = 0  # the first of these, and the length of all

    def join() -> None:
        nonlocal tokens, segments, first, waiting
        # Once for many short documents, of which each would take longer than to tokenize it.
        tokens = np.concatenate([tokens, *itertools.chain(*((part, end) for part in parts))])
        lengths = [len(part) + 1 for part in parts]
        numbers = np.arange(first, first + len(parts), dtype=np.int32)
        segments = np.concatenate([segments, np.repeat(numbers, np.array(lengths, np.int64))])
        first, waiting = first + len(parts), 0
        parts.clear()

    for document in documents:
        parts.append(document)
        waiting += len(document) + 1
        if len(tokens) + waiting < size:
            continue
        join()
        start = 0
        while len(tokens) - start >= size:
            window = slice(start, start + size)
            yield np.stack([tokens[window], segments[window] - segments[start] + 1])
            start += sequence_length
        tokens, segments = tokens[start:], segments[start:]
    join()
    if len(tokens) > 1:
        padding = (0, size - len(tokens))
        yield np.stack(
            [
                np.pad(tokens, padding, constant_values=end_token_id),
                np.pad(segments - segments[0] + 1, padding),
            ]
        )


def pack_whole(
    documents: Iterable[Completed], sequence_length: int, end_token_id: int
) -> Iterator[Int32[np.ndarray, "2 S1"]]:
    """Lays whole documents into windows of S + 1 tokens, as `pack` does it but for what it cuts.

    A document goes where it leaves the least room among `OPEN_WINDOWS` windows (best fit); where
    none has room for it, the fullest is given away for an empty one. The same documents in the
    same order give the same windows. What is left of a window is padding.

    Args:
      documents: none longer than a window.
      sequence_length: S.
      end_token_id: what padding is made of.
    """
    for held in fill_windows(documents, sequence_length):
        yield lay_out(held, sequence_length + 1, end_token_id)


def fill_windows(documents: Iterable[Completed], sequence_length: int) -> Iterator[list[Completed]]:
    """Yields the documents of each window that `pack_whole` makes."""
    size = sequence_length + 1
    # By the room that is left, least first; of equal ones the older first.
    rooms: list[int] = []
    contents: list[list[Completed]] = []
    for document in documents:
        needed = len(document.tokens)
        at = bisect.bisect_left(rooms, needed)
        if at == len(rooms):
            if len(rooms) == OPEN_WINDOWS:
                rooms.pop(0)
                yield contents.pop(0)
            room, held = size, []
        else:
            room, held = rooms.pop(at), contents.pop(at)
        room -= needed
        held.append(document)
        if room == 0:
            yield held
            continue
        at = bisect.bisect_right(rooms, room)
        rooms.insert(at, room)
        contents.insert(at, held)
    yield from contents


def lay_out(documents: list[Completed], size: int, end_token_id: int) -> Int32[np.ndarray, "2 S1"]:
    """Returns a window of `size` tokens that begins with whole documents, and padding after."""
    window = np.stack([np.full(size, end_token_id, np.int32), np.zeros(size, np.int32)])
    start = 0
    for segment, document in enumerate(documents, start=1):
        part = slice(start, start + len(document.tokens))
        window[0, part] = document.tokens
        window[1, part] = np.where(document.is_target, segment, -segment)
        start = part.stop
    return window


class Trace:
    """Windows of documents, and where each of these begins and was found.

    Attributes:
      starts: the first token of each document, counted in the windows' stream: of cut documents
        S to a window, which shares its last token with the next, of whole ones S + 1.
      lengths: its tokens, the end token included.
      origins: what each document came with, one after the other.
    """

    def __init__(self):
        # There may be very many and very short ones.
        self.starts, self.lengths, self.origins = array("q"), array("q"), array("q")

    def pack(
        self,
        documents: Iterable[tuple[Tokens, tuple[int, ...]]],
        sequence_length: int,
        end_token_id: int,
    ) -> Iterator[Int32[np.ndarray, "2 S1"]]:
        """Yields the windows of `pack`; each document comes with its origin."""

        def noted() -> Iterator[Tokens]:
            length = 0
            for tokens, origin in documents:
                self._note(length, len(tokens) + 1, origin)
                length += len(tokens) + 1
                yield tokens

        return pack(noted(), sequence_length, end_token_id)

    def pack_whole(
        self,
        documents: Iterable[tuple[Completed, tuple[int, ...]]],
        sequence_length: int,
        end_token_id: int,
    ) -> Iterator[Int32[np.ndarray, "2 S1"]]:
        """Yields the windows of `pack_whole`; each document comes with its origin."""
        size, waiting = sequence_length + 1, {}

        def noted() -> Iterator[Completed]:
            for document, origin in documents:
                waiting[id(document)] = origin
                yield document

        for number, held in enumerate(fill_windows(noted(), sequence_length)):
            start = number * size
            for document in held:
                self._note(start, len(document.tokens), waiting.pop(id(document)))
                start += len(document.tokens)
            yield lay_out(held, size, end_token_id)

    def _note(self, start: int, length: int, origin: tuple[int, ...]) -> None:
        self.starts.append(start)
        self.lengths.append(length)
        self.origins.extend(origin)

    def save(self, file: Path) -> None:
        """Writes all three as arrays."""
        columns = len(self.origins) // len(self.starts) if self.starts else 2
        np.savez_compressed(
            file,
            starts=np.array(self.starts, np.int64),
            lengths=np.array(self.lengths, np.int64),
            origins=np.array(self.origins, np.int64).reshape(-1, columns),
        )


def unpack(windows: Int32[np.ndarray, "B 2 S1"]) -> Rows:
    """Returns the inputs, targets, segments and positions of packed windows.

    Positions are not stored: they follow from the segments. The target of a document's end
    token, the first token of the next document, is not valid; the end token itself is. Nor is a
    token of a prompt.
    """
    tokens, segments = windows[:, 0], np.abs(windows[:, 1])
    inputs = segments[:, :-1]
    starts = np.empty(inputs.shape, bool)
    starts[:, 0] = True
    np.not_equal(inputs[:, 1:], inputs[:, :-1], out=starts[:, 1:])
    # Every position less that of its document's start, over all windows laid end to end.
    positions = np.arange(inputs.size, dtype=np.int32)
    first = np.flatnonzero(starts).astype(np.int32)
    positions -= np.repeat(first, np.diff(first, append=np.int32(inputs.size)))
    return Rows(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        valid=(inputs == segments[:, 1:]) & (windows[:, 1, 1:] > 0),
        segment_ids=inputs,
        positions=positions.reshape(inputs.shape),
    )
