"""Which documents are left out that others decide about: copies, and what a limit has no room for.

Each unit is looked through once for the hash and the size of its documents. What follows for the
whole is worked out from these, a part of the hashes at a time, and each unit is told by number
which of its documents to leave out.
"""

import hashlib
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from layerskip_jax.data.reading import DocumentReader
from layerskip_jax.data.units import Job, Task, seeded_hash
from layerskip_jax.run_folder.atomic import sync
from layerskip_jax.schema import UserError

# Documents whose hashes are compared at once: 32 bytes each.
COMPARED = 1 << 22
BUCKETS = 1 << 12  # of draws, of which one is looked at in full


def scan_unit(job: Job, task: Task) -> int:
    """Writes the digest, draw and size of each document of a unit; returns their number.

    Raises:
      UserError: its sources hold what is no text, or cannot be read.
    """
    request, digests, draws, sizes = job.request, [], [], []
    reader = DocumentReader(request, job.chat_turns)
    for document in reader.read(list(task.unit.pieces)):
        digest = document.digest
        digests.append(digest)
        draws.append(seeded_hash(f"take {request.seed}", digest.hex()))
        sizes.append(len(document.text.encode()))
    file = scan_file(job.folder, task.key)
    stage = file.with_name(f"{file.stem}.{uuid.uuid4().hex}.npz")
    np.savez(
        stage,
        digests=np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2),
        draws=np.array(draws, np.uint64),
        sizes=np.array(sizes, np.int64),
    )
    sync(stage)
    os.replace(stage, file)
    return len(sizes)


def scan_file(folder: Path, key: str) -> Path:
    """Returns where the scan of a unit is."""
    return folder / f"scan-{key}.npz"


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
    scans = [_Scan(scan_file(job.folder, task.key)) for task in tasks]
    left_out = [np.zeros(len(scan.sizes), bool) for scan in scans]
    if job.request.deduplicate:
        _mark_copies(tasks, scans, left_out)
    if job.request.max_bytes:
        _mark_undrawn(job, tasks, scans, left_out)
    return [
        _told(job.folder, task, np.flatnonzero(out))
        for task, out in zip(tasks, left_out, strict=True)
    ]


class _Scan:
    """The scan of one unit, read when it is asked for."""

    def __init__(self, file: Path):
        self._file = file
        with np.load(file) as arrays:
            self.sizes = arrays["sizes"]

    def array(self, name: str) -> np.ndarray:
        with np.load(self._file) as arrays:
            return arrays[name]


def _mark_copies(
    tasks: Sequence[Task], scans: Sequence[_Scan], left_out: Sequence[np.ndarray]
) -> None:
    total = sum(len(scan.sizes) for scan in scans)
    parts = max(-(-total // COMPARED), 1)
    # Sets that are held out come first, so that training loses their copies.
    order = sorted(range(len(tasks)), key=lambda number: (not tasks[number].unit.held_out, number))
    for part in range(parts):
        digests, units, numbers = [], [], []
        for number in order:
            found = scans[number].array("digests")
            mine = np.flatnonzero(found[:, 0] % np.uint64(parts) == part)
            digests.append(found[mine])
            units.append(np.full(len(mine), number))
            numbers.append(mine)
        every = np.concatenate(digests)
        # Stable, so that of equal digests the first of the corpus stays first.
        rank = np.lexsort((np.arange(len(every)), every[:, 1], every[:, 0]))
        ordered = every[rank]
        copies = rank[1:][(ordered[1:] == ordered[:-1]).all(axis=1)]
        of, at = np.concatenate(units)[copies], np.concatenate(numbers)[copies]
        for number in np.unique(of):
            left_out[number][at[of == number]] = True


def _mark_undrawn(
    job: Job, tasks: Sequence[Task], scans: Sequence[_Scan], left_out: Sequence[np.ndarray]
) -> None:
    """Marks what is drawn after the limit is reached; sets of their own are not limited."""
    limited = [number for number, task in enumerate(tasks) if not task.unit.held_out]
    shift = np.uint64(64 - BUCKETS.bit_length() + 1)
    bytes_of = np.zeros(BUCKETS, np.int64)
    for number in limited:
        kept = ~left_out[number]
        bucket = (scans[number].array("draws")[kept] >> shift).astype(np.int64)
        np.add.at(bytes_of, bucket, scans[number].sizes[kept])
    limit = job.request.max_bytes
    full = np.cumsum(bytes_of) > limit
    if not full.any():
        return
    crossing = int(np.argmax(full))
    room = limit - int(bytes_of[:crossing].sum())
    draws, sizes = [], []
    for number in limited:
        drawn = scans[number].array("draws")
        mine = ~left_out[number] & ((drawn >> shift) == crossing)
        draws.append(drawn[mine])
        sizes.append(scans[number].sizes[mine])
    draw, size = np.concatenate(draws), np.concatenate(sizes)
    order = np.lexsort((size, draw))
    fits = np.cumsum(size[order]) <= room
    if crossing == 0 and not fits.any() or not (fits.any() or bytes_of[:crossing].any()):
        raise UserError(
            f"--max-bytes={limit} has no room for the first document drawn, "
            f"of {size[order][0]} bytes; raise it"
        )
    taken = draw[order][fits]
    last = int(taken[-1]) if len(taken) else (crossing << int(shift)) - 1
    for number in limited:
        left_out[number][scans[number].array("draws") > np.uint64(last)] = True


def _told(folder: Path, task: Task, left_out: np.ndarray) -> Task:
    """Returns a task whose key and file say what it leaves out."""
    if not len(left_out):
        return task
    told = hashlib.sha256(left_out.astype(np.int64).tobytes()).hexdigest()
    key = task.unit.key(task.key, told)
    file = folder / f"left-out-{key}.npy"
    if not file.exists():
        stage = file.with_name(f"{file.stem}.{uuid.uuid4().hex}.npy")
        np.save(stage, left_out.astype(np.int64))
        os.replace(stage, file)
    return Task(task.unit, key, file)


def scanned(job: Job, tasks: Sequence[Task]) -> Iterator[Task]:
    """Yields the tasks that have no scan yet."""
    for task in tasks:
        if not scan_file(job.folder, task.key).is_file():
            yield task
