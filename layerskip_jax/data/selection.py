"""Which documents are left out that others decide about: copies, and what a limit has no room for.

Each unit is looked through once for the hash and the size of its documents. What follows for the
whole is worked out from these, a part of the hashes at a time, and each unit is told by number
which of its documents to leave out.
"""

import enum
import hashlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt64

from layerskip_jax.data.reading import DocumentReader
from layerskip_jax.data.units import Job, Task, seeded_hash
from layerskip_jax.schema import UserError

# Documents whose hashes are compared at once: about 64 bytes each.
COMPARED = 1 << 22
BUCKETS = 1 << 12  # of draws, of which one is looked at in full


class _Column(enum.IntEnum):
    """What a scan says of each document, a row of the file for each."""

    FIRST = 0  # 8 bytes of the text's digest, by which the file is sorted
    SECOND = 1  # the others
    DRAW = 2
    SIZE = 3  # UTF-8 bytes
    NUMBER = 4  # within the unit


def scan_unit(job: Job, task: Task) -> int:
    """Writes the digest, draw and size of each document of a unit; returns their number.

    Raises:
      UserError: its sources hold what is no text, or cannot be read.
    """
    request, digests, draws, sizes = job.request, bytearray(), array("Q"), array("Q")
    reader = DocumentReader(request, job.chat_turns)
    for document in reader.read(list(task.unit.pieces)):
        digest = document.digest
        digests += digest
        draws.append(seeded_hash(f"take {request.seed}", digest.hex()))
        sizes.append(len(document.text.encode()))
    first, second = np.frombuffer(digests, ">u8").reshape(-1, 2).T.astype(np.uint64)
    # Sorted, so that a part of all hashes is one part of each file; of copies the first stays so.
    order = np.lexsort((second, first))
    columns = [first, second, np.array(draws), np.array(sizes), np.arange(len(sizes))]
    scan = np.stack([column[order].astype(np.uint64) for column in columns])
    _save(job, scan, scan_name(task.key))
    return len(sizes)


def _save(job: Job, array: np.ndarray, name: str) -> None:
    stage = job.folder.scratch(name)
    np.save(stage, array)
    job.folder.put(stage, name)


def scan_name(key: str) -> str:
    """Returns the name of the file with the scan of a unit."""
    return f"scan-{key}.npy"


def select(job: Job, tasks: Sequence[Task]) -> list[Task]:
    """Returns the tasks, each with the file of the documents that it leaves out.

    Of copies the first is kept, of those that are held out for a set of their own before any other.
    A limit takes documents in the order of draws, until the next one has no room.

    Args:
      job: of all.
      tasks: in the order of the corpus; the scan of each is there.

    Raises:
      UserError: the limit has no room for any document.
    """
    scans = [job.folder.find(scan_name(task.key)) for task in tasks]
    left_out = [np.zeros(_scan(file).shape[1], bool) for file in scans]
    if job.request.deduplicate:
        _mark_copies(tasks, scans, left_out)
    if job.request.max_bytes:
        _mark_undrawn(job, tasks, scans, left_out)
    there = job.folder.names()
    return [
        _told(job, task, np.flatnonzero(out), there)
        for task, out in zip(tasks, left_out, strict=True)
    ]


def _scan(file: Path) -> UInt64[np.ndarray, "5 documents"]:
    """Returns the scan of a unit, of which only that is read which is looked at."""
    return np.load(file, mmap_mode="r")


def _mark_copies(
    tasks: Sequence[Task], scans: Sequence[Path], left_out: Sequence[np.ndarray]
) -> None:
    total = sum(map(len, left_out))
    parts = max(-(-total // COMPARED), 1)
    bounds = [(part << 64) // parts for part in range(1, parts)]
    # Sets that are held out come first, so that training loses their copies.
    order = sorted(range(len(tasks)), key=lambda number: (not tasks[number].unit.held_out, number))
    begins = [0] * len(tasks)
    for part in range(parts):
        firsts, seconds, units, numbers = [], [], [], []
        for unit in order:
            scan, begin = _scan(scans[unit]), begins[unit]
            end = scan.shape[1]
            if part < parts - 1:
                end = int(np.searchsorted(scan[_Column.FIRST], np.uint64(bounds[part])))
            begins[unit] = end
            firsts.append(np.array(scan[_Column.FIRST, begin:end]))
            seconds.append(np.array(scan[_Column.SECOND, begin:end]))
            units.append(np.full(end - begin, unit))
            numbers.append(scan[_Column.NUMBER, begin:end].astype(np.int64))
        first, second = np.concatenate(firsts), np.concatenate(seconds)
        # Stable, so that of equal digests the first of the corpus stays first.
        rank = np.lexsort((second, first))
        first, second = first[rank], second[rank]
        copies = rank[1:][(first[1:] == first[:-1]) & (second[1:] == second[:-1])]
        _mark(left_out, np.concatenate(units)[copies], np.concatenate(numbers)[copies])


def _mark(left_out: Sequence[np.ndarray], units: np.ndarray, numbers: np.ndarray) -> None:
    for unit in np.unique(units).tolist():
        left_out[unit][numbers[units == unit]] = True


def _mark_undrawn(
    job: Job, tasks: Sequence[Task], scans: Sequence[Path], left_out: Sequence[np.ndarray]
) -> None:
    """Marks what is drawn after the limit is reached; sets of their own are not limited.

    Copies have the same draw, and come in the order of the corpus.
    """
    limited = [number for number, task in enumerate(tasks) if not task.unit.held_out]
    shift = np.uint64(64 - BUCKETS.bit_length() + 1)

    def drawn(unit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns number, draw and size of the documents of a unit that are no copies."""
        scan = _scan(scans[unit])
        numbers = scan[_Column.NUMBER].astype(np.int64)
        kept = ~left_out[unit][numbers]
        return numbers[kept], scan[_Column.DRAW][kept], scan[_Column.SIZE][kept].astype(np.int64)

    bytes_of = np.zeros(BUCKETS, np.int64)
    for unit in limited:
        _, draws, sizes = drawn(unit)
        np.add.at(bytes_of, (draws >> shift).astype(np.int64), sizes)
    limit = job.request.max_bytes
    full = np.cumsum(bytes_of) > limit
    if not full.any():
        return
    crossing = np.argmax(full)
    room = limit - int(bytes_of[:crossing].sum())
    units, numbers, draws, sizes = [], [], [], []
    for unit in limited:
        number, draw, size = drawn(unit)
        bucket = draw >> shift
        left_out[unit][number[bucket > crossing]] = True
        mine = np.flatnonzero(bucket == crossing)
        mine = mine[np.argsort(number[mine])]
        units.append(np.full(len(mine), unit))
        numbers.append(number[mine])
        draws.append(draw[mine])
        sizes.append(size[mine])
    unit, number, size = map(np.concatenate, (units, numbers, sizes))
    order = np.argsort(np.concatenate(draws), kind="stable")
    fits = np.cumsum(size[order]) <= room
    if not fits.any() and not bytes_of[:crossing].any():
        raise UserError(
            f"--max-bytes={limit} has no room for the first document drawn, "
            f"of {size[order][0]} bytes; raise it"
        )
    _mark(left_out, unit[order][~fits], number[order][~fits])


def _told(job: Job, task: Task, left_out: np.ndarray, there: set[str]) -> Task:
    """Returns a task whose key and file say what it leaves out."""
    if not len(left_out):
        return task
    left_out = left_out.astype(np.int64)
    told = hashlib.sha256(left_out.tobytes()).hexdigest()
    key = task.unit.key(task.key, told)
    name = f"left-out-{key}.npy"
    if name not in there:
        _save(job, left_out, name)
    return Task(task.unit, key, name)


def scanned(job: Job, tasks: Sequence[Task]) -> Iterator[Task]:
    """Yields the tasks that have no scan yet."""
    there = job.folder.names()
    for task in tasks:
        if scan_name(task.key) not in there:
            yield task
