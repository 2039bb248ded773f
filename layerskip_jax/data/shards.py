"""Records of many ArrayRecord files, of which few are open at a time."""

import bisect
import functools
import itertools
import re
import resource
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader

from layerskip_jax.schema import UserError

# Files open at a time, at least: a process may have as few as 128. Opening one anew takes as long
# as reading a record, so more are kept open where the process may have more.
OPEN_SHARDS = 32
RECORDS_AT_ONCE = 256
SHARE_OPEN = 4  # one in so many of the files that the process may have open
# How the library words what the operating system refused, as opposed to what it read.
_REFUSED = re.compile(r"\w+\(\) failed: ([^;\]]+)")


class DamagedError(UserError):
    """A record, or the index of a file, is not what was written."""


class Shards:
    """The records of several files as one sequence.

    Files are opened when they are read, and the ones read longest ago closed, so that any number
    of them can be read in any order, by several threads.
    """

    def __init__(self, files: Sequence[str | Path], most: int = OPEN_SHARDS):
        """Opens every file once, to count its records.

        Args:
          files: made by `layerskip prepare`, or anything of the same format.
          most: files that are open at a time, at least `OPEN_SHARDS`.

        Raises:
          DamagedError: the index of a file is damaged.
          UserError: a file cannot be opened; names the operating system's reason.
        """
        self._files = [str(file) for file in files]
        self._open = functools.lru_cache(maxsize=max(most, OPEN_SHARDS))(_open)
        with ThreadPoolExecutor(8) as pool:
            counts = list(pool.map(_count, self._files))
        self._starts = [0, *itertools.accumulate(counts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, number: int) -> bytes:
        """Returns a record.

        Raises:
          DamagedError: it is damaged; names the file and the record.
          UserError: its file cannot be read; names the operating system's reason.
        """
        file, position = self._locate(number)
        try:
            return self._open(file).read([position])[0]
        except (RuntimeError, ValueError, IndexError) as error:
            raise _explained(file, f"record {position}", error) from error

    def name(self, number: int) -> str:
        """Returns the file of a record, and its place there."""
        file, position = self._locate(number)
        return f"{file}: record {position}"

    def _locate(self, number: int) -> tuple[str, int]:
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of {len(self)}")
        shard = bisect.bisect_right(self._starts, number) - 1
        return self._files[shard], number - self._starts[shard]


def most_open() -> int:
    """Returns how many files of records this process should have open at once, by its limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Without a limit it is -1, and no corpus has so many files.
    return max((2**20 if limit < 0 else limit) // SHARE_OPEN, OPEN_SHARDS)


def read_range(file: str | Path, begin: int = 0, end: int | None = None) -> Iterator[bytes]:
    """Yields the records begin..end-1 of one file, or those to its end, in their order.

    Raises:
      DamagedError, UserError: as `Shards` does.
    """
    try:
        reader = _open(str(file))
        end = reader.num_records() if end is None else end
        for first in range(begin, end, RECORDS_AT_ONCE):
            yield from reader.read(first, min(first + RECORDS_AT_ONCE, end))
    except (RuntimeError, ValueError, IndexError) as error:
        raise _explained(str(file), "a record", error) from error


def _open(file: str) -> ArrayRecordReader:
    # Records are read one by one, in no order, so nothing is read ahead.
    reader = ArrayRecordReader(
        file, options="readahead_buffer_size:0", file_reader_buffer_size=32768
    )
    if not reader.ok():  # of which it says nothing until a record is read
        reader.read([0])
    return reader


def _count(file: str) -> int:
    try:
        return _open(file).num_records()
    except (RuntimeError, ValueError, IndexError) as error:
        raise _explained(file, "its index", error) from error


def _explained(file: str, what: str, error: Exception) -> UserError:
    """Tells what the operating system refuses from what is damaged."""
    if refused := _REFUSED.search(str(error)):
        return UserError(
            f"{file} cannot be read ({refused[1].strip()}); it is not damaged: see to the disk, "
            "the permissions or the limit of open files (`ulimit -n`), and start again"
        )
    return DamagedError(f"{file}: {what} is damaged ({error})")
