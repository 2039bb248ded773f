"""Batch n of a run, as a function of (seed, n, batch size) and nothing else.

A seeded permutation of all windows, drawn anew each epoch, is indexed at n B + row. Hosts,
workers and devices do not enter the order, so a run goes on with the very same batches on
any other machine. Grain does the shuffling, the reading and the reading ahead.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grain
import numpy as np

from layerskip_jax.data.manifest import read_manifest
from layerskip_jax.data.packing import Batch, unpack
from layerskip_jax.schema import ConfigError, UserError

READ_THREADS = 2
logger = logging.getLogger(__name__)


class BatchSource:
    """Batches of one split of prepared data.

    Attributes:
      manifest: of the folder.
      num_windows: windows in the split.
      sequence_length: S.
      batch_size: B.
      steps_per_epoch: batches until every window was seen, the last one in part if B does not
        divide their number.
      damaged: records that were read as padding because they are damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        skip_damaged: bool = False,
    ):
        """Opens a split.

        Args:
          folder: made by `layerskip prepare`.
          split: `train` or `validation`.
          batch_size: rows of a global batch.
          seed: of the order.
          shuffle: whether to draw an order and go on for ever; otherwise the windows come
            once, as they lie, and rows past the last one are padding.
          skip_damaged: whether a damaged record is logged and read as padding, not raised.

        Raises:
          UserError: the folder is not prepared, or damaged, or the split has no window.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} must be at least 1")
        self.manifest = read_manifest(folder)
        self.sequence_length = self.manifest.sequence_length
        self.num_windows = self.manifest.split(split).windows
        self.batch_size = batch_size
        self.steps_per_epoch = -(-self.num_windows // batch_size)
        if self.num_windows == 0:
            raise UserError(
                f"{folder} has no {split} window; prepare more text, or a shorter --sequence-length"
            )
        shards = self.manifest.split(split).shards
        self._shards = [str(Path(folder) / shard.name) for shard in shards]
        self._starts = np.cumsum([0, *(shard.windows for shard in shards)])
        try:
            self._source = grain.sources.ArrayRecordDataSource(self._shards)
        except RuntimeError as error:
            raise UserError(
                f"{folder}: a shard of {split} is damaged ({error}); prepare the data again"
            ) from error
        if len(self._source) != self.num_windows:
            raise UserError(
                f"{folder}: the shards of {split} hold {len(self._source)} windows, and the "
                f"manifest says {self.num_windows}; prepare the data again"
            )
        self._shuffle, self._skip_damaged = shuffle, skip_damaged
        self.damaged = 0
        order = grain.MapDataset.range(self.num_windows)
        self._order = order.seed(seed).shuffle().repeat() if shuffle else order

    def rows(self, step: int, rows: Sequence[int] | slice) -> Batch:
        """Returns these rows of batch `step`, in this order, reading no other.

        Args:
          step: from 0.
          rows: numbers below the batch size.

        Raises:
          UserError: a record is damaged and not to be skipped; names the file and the record.
        """
        windows = []
        for row in range(self.batch_size)[rows] if isinstance(rows, slice) else rows:
            if not 0 <= row < self.batch_size:
                raise IndexError(f"row {row} is not in a batch of {self.batch_size}")
            index = step * self.batch_size + row
            if self._shuffle or index < self.num_windows:
                windows.append(self._window(int(self._order[index])))
            else:
                windows.append(self._padding())
        return unpack(np.stack(windows))

    def window_numbers(self, step: int) -> list[int]:
        """Returns the number, in the split, of the window in each row of batch `step`.

        Rows past the last window of an order that ends have no number and are left out.
        """
        first = step * self.batch_size
        last = first + self.batch_size
        stop = last if self._shuffle else min(last, self.num_windows)
        return [int(self._order[index]) for index in range(first, stop)]

    def batch(self, step: int) -> Batch:
        """Returns the whole of batch `step`."""
        return self.rows(step, range(self.batch_size))

    @contextmanager
    def prefetch(
        self, steps: range, rows: Sequence[int] | slice, *, buffer_size: int = 4
    ) -> Iterator[Iterator[tuple[int, Batch]]]:
        """Gives an iterator of `(step, rows of that batch)`, read ahead in the background.

        At most `buffer_size` batches are held. Leaving the context ends the reading.
        """
        dataset = grain.MapDataset.source(steps).map(lambda step: (step, self.rows(step, rows)))
        options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=buffer_size)
        iterator = iter(dataset.to_iter_dataset(options))
        try:
            yield iterator
        finally:
            iterator.close()

    def _window(self, number: int) -> np.ndarray:
        try:
            record = self._source[number]
            return np.frombuffer(record, np.int32).reshape(2, self.sequence_length + 1)
        except (ValueError, RuntimeError, IndexError) as error:
            shard = int(np.searchsorted(self._starts, number, side="right")) - 1
            where = f"{self._shards[shard]}: record {number - self._starts[shard]} is damaged"
            if not self._skip_damaged:
                raise UserError(
                    f"{where} ({error}); prepare the data again, or leave such records out with "
                    "config.data.on_damaged=skip"
                ) from error
            self.damaged += 1
            logger.warning("%s, left out; %d so far", where, self.damaged)
            return self._padding()

    def _padding(self) -> np.ndarray:
        """Returns a window of which no target counts."""
        return np.zeros((2, self.sequence_length + 1), np.int32)
