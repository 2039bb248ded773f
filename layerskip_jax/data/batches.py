"""Batch n of a run, as a function of (seed, n, batch sizes) and nothing else.

A seeded permutation of all windows, drawn anew each epoch, is indexed at n B + row, or at the
windows of all batches before + row where the batch grows; of several corpora each has its own, and
which one a row comes from follows from that index (`order.py`). Hosts, workers
and devices do not enter the order, so a run goes on with the very same batches on any other
machine. Grain does the shuffling and the reading ahead.
"""

import bisect
import hashlib
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grain
import numpy as np
from jaxtyping import Int64

from layerskip_jax.config import RunConfig
from layerskip_jax.data.batch_sizes import BatchSizes
from layerskip_jax.data.manifest import TOKENIZER_FILE, Manifest, read_manifest
from layerskip_jax.data.order import ONE_CORPUS, MixtureWeights, Order
from layerskip_jax.data.packing import Rows, unpack
from layerskip_jax.data.records import window_head
from layerskip_jax.data.shards import SHARE_OPEN, DamagedError, Shards, most_open
from layerskip_jax.schema import ConfigError, UserError

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

    @classmethod
    def of_run(
        cls, config: RunConfig, skips: Sequence[tuple[int, int]], folder: str | None = None
    ) -> "BatchSource":
        """Opens what a run trains on.

        Args:
          config: of the run.
          skips: see `__init__`.
          folder: where its `config.data.path` is now; None if it was not moved.

        Raises:
          ConfigError, UserError: see `__init__`.
        """
        data = config.data
        return cls(
            data.path if folder is None else folder,
            "train",
            batch_size=config.training.batch_size,
            batch_ramp=config.training.batch_ramp,
            seed=config.seed,
            skip_damaged=data.on_damaged == "skip",
            mixture=data.mixture,
            weights=data.weights,
            weight_changes=data.weight_changes,
            skips=skips,
        )

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
        weight_changes: Sequence[tuple[int, Sequence[float]]] = (),
        skips: Sequence[tuple[int, int]] = (),
    ):
        """Opens a split.

        Args:
          folder: made by `layerskip prepare`.
          split: `train`, `validation` or a set that is held out by name.
          batch_size: rows of a global batch.
          batch_ramp: steps from which on a batch has twice the rows, and batch_size in the end.
          seed: the seed of the order.
          shuffle: whether to draw an order and go on for ever; otherwise the windows come
            once, as they lie, and rows past the last one are padding.
          skip_damaged: whether a damaged record is logged and read as padding, not raised.
          mixture: further folders with the same tokenizer and sequence length.
          weights: shares of the rows that come from `folder` and from each of these; they need
            not add up to 1. Any run of rows has them nearly exactly.
          weight_changes: later steps, ascending, and the weights from each of them on. Each folder
            goes on with its next window.
          skips: pairs (step, count): from that step on, the windows of so many batches are passed
            over, of as many rows as the steps from there on have. Those of later steps are on top
            of those of earlier ones.

        Raises:
          ConfigError: there are not as many weights as folders, or a folder never has one.
          UserError: a folder is not prepared, or damaged, or the split has no window, or the
            folders do not go together.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} must be at least 1")
        self.manifest = read_manifest(folder)
        corpora = [(folder, self.manifest), *((path, read_manifest(path)) for path in mixture)]
        _check_mixture(corpora, weights, weight_changes)
        self.sequence_length = self.manifest.sequence_length
        self.whole_documents = self.manifest.request.has_completions
        most = most_open() // len(corpora)
        self._parts = [_Windows(path, manifest, split, most) for path, manifest in corpora]
        counts = [part.count for part in self._parts]
        self._first = [0, *itertools.accumulate(counts)]
        self.num_windows = self._first[-1]
        self.sizes = BatchSizes(batch_size, tuple(batch_ramp))
        self.steps_per_epoch = -(-self.num_windows // batch_size)
        self._shuffle, self._skip_damaged = shuffle, skip_damaged
        self._skips = tuple(skips)
        self.damaged = 0
        self._weights = ONE_CORPUS
        if len(corpora) > 1:
            changes = tuple((step, tuple(shares)) for step, shares in weight_changes)
            self._weights = MixtureWeights(tuple(weights), changes)
        self._order = Order(
            counts, seed=seed, weights=self._weights, sizes=self.sizes, skips=self._skips
        )

    def epochs(self, steps: int) -> list[tuple[str, float]]:
        """Returns each folder and how often so many steps read each of its windows."""
        rows = [0.0] * len(self._parts)
        for first, last, shares in self._weights.stretches(0, steps):
            of_all = self.sizes.before(last) - self.sizes.before(first)
            for number, share in enumerate(shares):
                rows[number] += of_all * share / sum(shares)
        return [
            (part.folder, of_part / part.count)
            for part, of_part in zip(self._parts, rows, strict=True)
        ]

    def rows(self, step: int, rows: Sequence[int] | slice) -> Rows:
        """Returns these rows of batch `step`, in this order, reading no other.

        Args:
          step: from 0.
          rows: numbers below the batch size.

        Raises:
          UserError: a record is damaged and not to be skipped; names the file and the record.
        """
        size = self.sizes.at(step)
        wanted = range(size)[rows] if isinstance(rows, slice) else rows
        for row in wanted:
            if not 0 <= row < size:
                raise IndexError(f"row {row} is not in a batch of {size}")
        numbers = self._numbers(step, wanted)
        windows = np.empty((len(numbers), 2, self.sequence_length + 1), np.int32)
        # As they lie on the disk, so that each file is opened once.
        for row in np.argsort(numbers).tolist():
            windows[row] = self._window(int(numbers[row]))
        return unpack(windows)

    def _numbers(self, step: int, rows: Sequence[int]) -> Int64[np.ndarray, "N"]:
        """Returns the windows of some rows of a batch; past those of an order that ends, -1."""
        places = self._position(step) + np.array(rows, np.int64)
        if self._shuffle:
            return self._order.windows(places)
        return np.where(places < self.num_windows, places, -1)

    def _position(self, step: int) -> int:
        """Returns where in the order the first row of batch `step` is."""
        before = self.sizes.before
        passed = (before(at + count) - before(at) for at, count in self._skips if step >= at)
        return before(step) + sum(passed)

    def window_numbers(self, step: int) -> list[int]:
        """Returns the number, in the split, of the window in each row of batch `step`.

        Rows past the last window of an order that ends have no number and are left out.
        """
        numbers = self._numbers(step, range(self.sizes.at(step))).tolist()
        return [number for number in numbers if number >= 0]

    def batch(self, step: int) -> Rows:
        """Returns the whole of batch `step`."""
        return self.rows(step, slice(None))

    @contextmanager
    def prefetch(
        self,
        steps: range,
        rows: Callable[[int], Sequence[int] | slice],
        *,
        buffer_size: int = 4,
        threads: int = 2,
    ) -> Iterator[Iterator[tuple[int, Rows]]]:
        """Gives an iterator of `(step, rows of that batch)`, read ahead in the background.

        `rows` returns the rows to read of a step's batch. At most `buffer_size` batches are held,
        and `threads` of them read at the same time. Leaving the context ends the reading.
        """
        dataset = grain.MapDataset.source(steps).map(lambda n: (n, self.rows(n, rows(n))))
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer_size)
        iterator = iter(dataset.to_iter_dataset(options))
        try:
            yield iterator
        finally:
            iterator.close()

    def locate(self, number: int) -> tuple[str, int]:
        """Returns the folder that a window lies in, and its number there."""
        part = bisect.bisect_right(self._first, number) - 1
        return self._parts[part].folder, number - self._first[part]

    def _window(self, number: int) -> np.ndarray:
        if number < 0:
            return self._padding()
        part = bisect.bisect_right(self._first, number) - 1
        try:
            return self._parts[part].read(number - self._first[part])
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

    def __init__(self, folder: str | Path, manifest: Manifest, split: str, most_open: int):
        self.folder, self.count = str(folder), manifest.split(split).windows
        if self.count == 0:
            raise UserError(
                f"{folder} has no {split} window; prepare more text, or a shorter --sequence-length"
            )
        self._shape = (2, manifest.sequence_length + 1)
        self._head = len(window_head(manifest.sequence_length))
        files = [Path(folder) / shard.name for shard in manifest.split(split).shards]
        if len(files) > most_open:
            logger.info(
                "%s: %d of its %d files are open at a time, by the limit of this process; "
                "`ulimit -n %d` before the command lets all be, which reads faster",
                folder, most_open, len(files), len(files) * SHARE_OPEN,
            )  # fmt: skip
        try:
            self._records = Shards(files, most_open)
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
            before = len(record) - 4 * math.prod(self._shape)
            # Before the window come a few bytes for TFDS, which older data have none of.
            if before not in (0, self._head):
                raise DamagedError(f"{self._records.name(number)} has {len(record)} bytes")
        except DamagedError as error:
            raise DamagedError(
                f"{error}; prepare the data again, or leave such records out with "
                "config.data.on_damaged=skip"
            ) from error
        return np.frombuffer(record, np.int32, offset=before).reshape(self._shape)


def _check_mixture(
    corpora: list[tuple[str | Path, Manifest]],
    weights: Sequence[float],
    changes: Sequence[tuple[int, Sequence[float]]],
) -> None:
    if len(corpora) == 1 and changes:
        raise ConfigError(
            f"config.data.weight_changes={tuple(changes)} changes the weights of a mixture, and "
            "config.data.mixture names no folder; name some, or leave weight_changes empty"
        )
    stages = [("weights", weights)]
    stages += [(f"weight_changes of step {step}", shares) for step, shares in changes]
    for name, shares in stages if len(corpora) > 1 else ():
        if len(shares) != len(corpora):
            raise ConfigError(
                f"config.data.{name}={tuple(shares)} must have {len(corpora)} numbers: one for "
                "config.data.path and one for each folder of config.data.mixture"
            )
        if not any(share > 0 for share in shares):
            raise ConfigError(
                f"config.data.{name}={tuple(shares)} gives nothing to any folder; give one of them "
                "a share above 0"
            )
    for number, (path, _) in enumerate(corpora if len(corpora) > 1 else ()):
        if not any(shares[number] > 0 for _, shares in stages):
            raise ConfigError(
                f"config.data.weights={tuple(weights)} gives {path} nothing, and no weight_changes "
                "does; give it a share above 0, or leave the folder out"
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
    folder: str | Path,
    mixture: Sequence[str],
    weights: Sequence[float],
    weight_changes: Sequence[tuple[int, Sequence[float]]] = (),
) -> str:
    """Returns what identifies the data of a run: one corpus's own fingerprint, or a hash of all.

    Raises:
      UserError: one of the folders is not prepared, or damaged.
    """
    prints = [read_manifest(path).fingerprint for path in (folder, *mixture)]
    if not mixture:
        return prints[0]
    about = [prints, list(weights)]
    if weight_changes:
        about.append([[step, list(shares)] for step, shares in weight_changes])
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()
