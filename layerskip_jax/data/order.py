"""Which window comes at each place of a run's order: computed, and never held in memory.

Every corpus has an order of its own, a permutation of its windows drawn anew each epoch. Of several
corpora, the weights say which one a place takes its window from, and it is the next of that order.
Where the weights change, the mixing begins anew, and each corpus goes on where it was.
"""

import bisect
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Int64

from layerskip_jax.data.batch_sizes import BatchSizes

LARGEST_INT64 = 2**63 - 1
ONE_BY_ONE = BatchSizes(1)


@dataclasses.dataclass(frozen=True)
class MixtureWeights:
    """The weights of each corpus, by step.

    Attributes:
      first: the weights from step 0 on.
      changes: later steps, ascending, and the weights from each of them on.
    """

    first: tuple[float, ...] = (1.0,)
    changes: tuple[tuple[int, tuple[float, ...]], ...] = ()

    def stretches(
        self, first: int, last: int | None
    ) -> Iterator[tuple[int, int | None, tuple[float, ...]]]:
        """Yields (first, last, weights) of the steps first..last-1, cut where weights change.

        With `last` None they go on for ever, and the last stretch has None as well.
        """
        stages = [(0, self.first), *self.changes]
        ends = [*(step for step, _ in self.changes), None]
        for (begin, weights), end in zip(stages, ends, strict=True):
            begin = max(begin, first)
            if last is not None:
                end = last if end is None else min(end, last)
            if end is None or begin < end:
                yield begin, end, weights


ONE_CORPUS = MixtureWeights()


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Places that are mixed by the same weights.

    Attributes:
      first: the first of them.
      weights: of each corpus, as whole numbers.
      taken: windows that the places before it have of each corpus.
    """

    first: int
    weights: tuple[int, ...]
    taken: tuple[int, ...]


class Order:
    """The order of the windows of one corpus or several, without end."""

    def __init__(
        self,
        counts: Sequence[int],
        *,
        seed: int,
        weights: MixtureWeights = ONE_CORPUS,
        sizes: BatchSizes = ONE_BY_ONE,
        skips: Sequence[tuple[int, int]] = (),
    ):
        """Finds the places at which the weights change.

        Args:
          counts: the windows of each corpus; they are numbered through all of them.
          seed: of the permutations.
          weights: as many as there are corpora.
          sizes: the rows of each step.
          skips: (step, count): so many batches that are passed over, see `BatchSource`. They
            take the windows that these batches would have had, by the weights of their own steps.
        """
        firsts = np.cumsum([0, *counts]).tolist()
        self._corpora = [
            _Corpus(first, count, _corpus_seed(seed, number))
            for number, (first, count) in enumerate(zip(firsts, counts, strict=False))
        ]
        self._pieces: list[_Piece] = []
        place, taken, rows = 0, [0] * len(counts), 0
        for more, shares in _rows_in_order(weights, sizes, skips):
            whole = _whole_numbers(shares)
            if not self._pieces or whole != self._pieces[-1].weights:
                if self._pieces:
                    had = _counts(rows, self._pieces[-1].weights)
                    taken = [before + now for before, now in zip(taken, had, strict=True)]
                    place, rows = place + rows, 0
                self._pieces.append(_Piece(place, whole, tuple(taken)))
            rows += more
        self._firsts = [piece.first for piece in self._pieces]

    def windows(self, places: Int64[np.ndarray, "N"]) -> Int64[np.ndarray, "N"]:
        """Returns the number of the window at each place, both from 0."""
        if len(self._corpora) == 1:
            return np.fromiter(map(self._corpora[0].window, places.tolist()), np.int64, len(places))
        numbers = np.empty_like(places)
        pieces = np.array([bisect.bisect_right(self._firsts, at) - 1 for at in places.tolist()])
        for piece in set(pieces.tolist()):
            here = pieces == piece
            numbers[here] = self._windows_of(self._pieces[piece], places[here])
        return numbers

    def _windows_of(self, piece: _Piece, places: Int64[np.ndarray, "N"]) -> list[int]:
        rows = places - piece.first
        if (int(rows.max(initial=0)) + 1) * sum(piece.weights) > LARGEST_INT64:
            rows = rows.astype(object)
        before, after = (np.stack(_counts(n, piece.weights)) for n in (rows, rows + 1))
        # A further row is a further window of one corpus alone.
        corpora = np.argmax(after != before, axis=0).tolist()
        return [
            self._corpora[corpus].window(int(before[corpus, row]) + piece.taken[corpus])
            for row, corpus in enumerate(corpora)
        ]


@dataclasses.dataclass(frozen=True)
class _Corpus:
    """The order of one corpus, whose `count` windows have the numbers from `first` on."""

    first: int
    count: int
    seed: int

    def window(self, index: int) -> int:
        epoch, index = divmod(index, self.count)
        seed = (self.seed + epoch) % 2**32
        return self.first + index_shuffle(index, max_index=self.count - 1, seed=seed, rounds=4)


def _corpus_seed(seed: int, number: int) -> int:
    """Returns the seed of a corpus, as grain derives it where a data set of it is shuffled."""
    if number:
        seed = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
    return int(np.random.SeedSequence((seed, 1)).generate_state(1)[0])


def _rows_in_order(
    weights: MixtureWeights, sizes: BatchSizes, skips: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, tuple[float, ...]]]:
    """Yields rows and their weights, in the order of their places; of the last, 0 for all."""
    step = 0
    # Of each skip the steps before it, then the batches that it passes over.
    stretches = []
    for at, count in sorted(skips, key=lambda skip: skip[0]):
        stretches += [*weights.stretches(step, at), *weights.stretches(at, at + count)]
        step = at
    for first, last, shares in (*stretches, *weights.stretches(step, None)):
        yield (0 if last is None else sizes.before(last) - sizes.before(first)), shares


def _whole_numbers(weights: Sequence[float]) -> tuple[int, ...]:
    """Returns the weights as whole numbers, of which the least but 0 is about 100.

    These are grain's, so that a mixture has the order that `grain.MapDataset.mix` gives it.
    """
    scale = 100 / min(weight for weight in weights if weight > 0)
    return tuple(int(weight * scale) for weight in weights)


def _counts(rows, weights: tuple[int, ...]) -> list:
    """Returns how many of the first rows, a number or an array of them, each corpus has."""
    counts, left, total = [], rows, sum(weights)
    for weight in weights:
        rest = left * (total - weight) // total if total else left
        counts.append(left - rest)
        left, total = rest, total - weight
    return counts
