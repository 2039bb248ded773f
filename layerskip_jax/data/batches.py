"""Batch n of a run, as a function of (seed, n, batch sizes) and nothing else.

A seeded permutation of all windows, drawn anew each epoch, is indexed at n B + row, or at the
windows of all batches before + row where the batch grows; of several corpora each has its own, and
which one a row comes from follows from that index. Hosts, workers
and devices do not enter the order, so a run goes on with the very same batches on any other
machine. Grain does the shuffling, the mixing, the reading and the reading ahead.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grain
import numpy as np

from layerskip_jax.data.batch_sizes import BatchSizes
from layerskip_jax.data.manifest import TOKENIZER_FILE, Manifest, read_manifest
from layerskip_jax.data.packing import Rows, unpack
from layerskip_jax.data.records import window_head
from layerskip_jax.data.shards import DamagedError, Shards
from layerskip_jax.schema import ConfigError, UserError

READ_THREADS = 2
logger = logging.getLogger(__name__)


class BatchSource:
    """Batches of one split of prepared data.

    Attributes:
      manifest: the folder's manifest, of a mixture the first one's.
      num_windows: windows in the split, of all folders.
      sequence_length: S.
      whole_documents: whether no document goes on in the next window.
      sizes: the rows of each batch.
      steps_per_epoch: batches until every window was seen, the last one in part if B does not
        divide their number.
      damaged: records that were read as padding so far, because they are damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        *,
        batch_size: int,
        batch_ramp: Sequence[int] = (),
        seed: int,
        shuffle: bool = True,
        skip_damaged: bool = False,
        mixture: Sequence[str] = (),
        weights: Sequence[float] = (),
        skips: Sequence[tuple[int, int]] = (),
    ):
        """Opens a split.

        Args:
          folder: made by `layerskip prepare`.
          split: `train` or `validation`.
          batch_size: rows of a global batch.
          batch_ramp: steps from which on a batch has twice the rows, and batch_size in the end.
          seed: the seed of the order.
          shuffle: whether to draw an order and go on for ever; otherwise the windows come
            once, as they lie, and rows past the last one are padding.
          skip_damaged: whether a damaged record is logged and read as padding, not raised.
          mixture: further folders with the same tokenizer and sequence length.
          weights: shares of the rows that come from `folder` and from each of these; they need
            not add up to 1. Any run of rows has them nearly exactly.
          skips: pairs (step, count): from that step on, the windows of so many batches are passed
            over, of as many rows as the steps from there on have. Those of later steps are on top
            of those of earlier ones.

        Raises:
          ConfigError: there are not as many weights as folders.
          UserError: a folder is not prepared, or damaged, or the split has no window, or the
            folders do not go together.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} must be at least 1")
        self.manifest = read_manifest(folder)
        corpora = [(folder, self.manifest), *((path, read_manifest(path)) for path in mixture)]
        _check_mixture(corpora, weights)
        self.sequence_length = self.manifest.sequence_length
        self.whole_documents = self.manifest.request.has_completions
        self._parts = [_Windows(path, manifest, split) for path, manifest in corpora]
        self._first = np.cumsum([0, *(part.count for part in self._parts)])
        self.num_windows = int(self._first[-1])
        self.sizes = BatchSizes(batch_size, tuple(batch_ramp))
        self.steps_per_epoch = -(-self.num_windows // batch_size)
        self._shuffle, self._skip_damaged = shuffle, skip_damaged
        self._skips = tuple(skips)
        self.damaged = 0
        self._shares = weights if len(corpora) > 1 else (1.0,)
        self._order = self._make_order(seed, weights)

    def _make_order(self, seed: int, weights: Sequence[float]) -> grain.MapDataset:
        if not self._shuffle:
            return grain.MapDataset.range(self.num_windows)
        orders = []
        for number, part in enumerate(self._parts):
            first = int(self._first[number])
            # Each corpus has an order of its own, and begins its epochs when it is through.
            order = grain.MapDataset.range(first, first + part.count)
            drawn = np.random.SeedSequence((seed, number)).generate_state(1)
            part_seed = int(drawn[0]) if number else seed
            orders.append(order.seed(part_seed).shuffle().repeat())
        return grain.MapDataset.mix(orders, weights) if len(orders) > 1 else orders[0]

    def epochs(self, steps: int) -> list[tuple[str, float]]:
        """Returns each folder and how often so many steps read each of its windows."""
        rows = self.sizes.before(steps) / sum(self._shares)
        return [
            (part.folder, rows * share / part.count)
            for part, share in zip(self._parts, self._shares, strict=True)
        ]

    def rows(self, step: int, rows: Sequence[int] | slice) -> Rows:
        """Returns these rows of batch `step`, in this order, reading no other.

        Args:
          step: from 0.
          rows: numbers below the batch size.

        Raises:
          UserError: a record is damaged and not to be skipped; names the file and the record.
        """
        windows, size, first = [], self.sizes.at(step), self._position(step)
        for row in range(size)[rows] if isinstance(rows, slice) else rows:
            if not 0 <= row < size:
                raise IndexError(f"row {row} is not in a batch of {size}")
            index = first + row
            if self._shuffle or index < self.num_windows:
                windows.append(self._window(int(self._order[index])))
            else:
                windows.append(self._padding())
        return unpack(np.stack(windows))

    def _position(self, step: int) -> int:
        """Returns where in the order the first row of batch `step` is."""
        before = self.sizes.before
        passed = (before(at + count) - before(at) for at, count in self._skips if step >= at)
        return before(step) + sum(passed)

    def window_numbers(self, step: int) -> list[int]:
        """Returns the number, in the split, of the window in each row of batch `step`.

        Rows past the last window of an order that ends have no number and are left out.
        """
        first = self._position(step)
        last = first + self.sizes.at(step)
        stop = last if self._shuffle else min(last, self.num_windows)
        return [int(self._order[index]) for index in range(first, stop)]

    def batch(self, step: int) -> Rows:
        """Returns the whole of batch `step`."""
        return self.rows(step, slice(None))

    @contextmanager
    def prefetch(
        self, steps: range, rows: Callable[[int], Sequence[int] | slice], *, buffer_size: int = 4
    ) -> Iterator[Iterator[tuple[int, Rows]]]:
        """Gives an iterator of `(step, rows of that batch)`, read ahead in the background.

        `rows` returns the rows to read of a step's batch. At most `buffer_size` batches are held.
        Leaving the context ends the reading.
        """
        dataset = grain.MapDataset.source(steps).map(lambda n: (n, self.rows(n, rows(n))))
        options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=buffer_size)
        iterator = iter(dataset.to_iter_dataset(options))
        try:
            yield iterator
        finally:
            iterator.close()

    def _window(self, number: int) -> np.ndarray:
        part = int(np.searchsorted(self._first, number, side="right")) - 1
        try:
            return self._parts[part].read(number - int(self._first[part]))
        except DamagedError as error:
            if not self._skip_damaged:
                raise
            self.damaged += 1
            logger.warning("%s; left out", error)
            return self._padding()

    def _padding(self) -> np.ndarray:
        """Returns a window of which no target counts."""
        return np.zeros((2, self.sequence_length + 1), np.int32)


class _Windows:
    """The packed windows of one split of one folder."""

    def __init__(self, folder: str | Path, manifest: Manifest, split: str):
        self.folder, self.count = str(folder), manifest.split(split).windows
        if self.count == 0:
            raise UserError(
                f"{folder} has no {split} window; prepare more text, or a shorter --sequence-length"
            )
        self._shape = (2, manifest.sequence_length + 1)
        try:
            self._records = Shards(
                [Path(folder) / shard.name for shard in manifest.split(split).shards]
            )
        except DamagedError as error:
            raise UserError(f"{error}; prepare the data again") from error
        if len(self._records) != self.count:
            raise UserError(
                f"{folder}: the shards of {split} hold {len(self._records)} windows, and the "
                f"manifest says {self.count}; prepare the data again"
            )

    def read(self, number: int) -> np.ndarray:
        try:
            record = self._records[number]
            size = 4 * math.prod(self._shape)
            # Before the window come a few bytes for TFDS, which older data have none of.
            if len(record) not in (size, size + len(window_head(self._shape[1] - 1))):
                raise DamagedError(f"{self._records.name(number)} has {len(record)} bytes")
        except DamagedError as error:
            raise DamagedError(
                f"{error}; prepare the data again, or leave such records out with "
                "config.data.on_damaged=skip"
            ) from error
        return np.frombuffer(record[-size:], np.int32).reshape(self._shape)


def _check_mixture(corpora: list[tuple[str | Path, Manifest]], weights: Sequence[float]) -> None:
    if len(corpora) > 1 and len(weights) != len(corpora):
        raise ConfigError(
            f"config.data.weights={tuple(weights)} must have {len(corpora)} numbers: one for "
            "config.data.path and one for each folder of config.data.mixture"
        )
    (folder, first), *others = corpora
    for path, manifest in others:
        for name, text in (("tokenizer_sha256", "tokenizer"), ("sequence_length", "windows")):
            ours, theirs = getattr(first, name), getattr(manifest, name)
            if ours != theirs:
                raise UserError(
                    f"{path} cannot be mixed with {folder}: its {text} differ ({name} {theirs}, "
                    f"not {ours}); prepare it with --tokenizer={folder}/{TOKENIZER_FILE} "
                    f"--sequence-length={first.sequence_length}"
                )


def mixture_fingerprint(
    folder: str | Path, mixture: Sequence[str], weights: Sequence[float]
) -> str:
    """Returns what identifies the data of a run: one corpus's own fingerprint, or a hash of all.

    Raises:
      UserError: one of the folders is not prepared, or damaged.
    """
    prints = [read_manifest(path).fingerprint for path in (folder, *mixture)]
    if not mixture:
        return prints[0]
    return hashlib.sha256(json.dumps([prints, list(weights)]).encode()).hexdigest()
