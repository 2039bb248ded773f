"""Many files of records, few of them open, and what is said of those that cannot be read."""

import contextlib
import os
import resource

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from layerskip_jax.data.shards import (
    OPEN_SHARDS,
    SHARE_OPEN,
    DamagedError,
    Shards,
    most_open,
    read_range,
)
from layerskip_jax.schema import UserError

FILES, RECORDS = 200, 3


def record(file, number):
    return bytes([file % 256, number]) * 200


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for file in range(FILES):
        writer = ArrayRecordWriter(str(folder / f"{file:03d}"), "group_size:1")
        for number in range(RECORDS):
            writer.write(record(file, number))
        writer.close()
    return sorted(folder.iterdir())


def open_files():
    return len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def limited(more):
    """Lets this process open so many files beside those it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The limit is one of numbers, of which the next file takes the lowest that is free.
    with contextlib.ExitStack() as gaps:
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        newest = gaps.enter_context(open(os.devnull))
        while newest.fileno() < highest:
            newest = gaps.enter_context(open(os.devnull))
        resource.setrlimit(resource.RLIMIT_NOFILE, (newest.fileno() + 1 + more, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_files_than_may_be_open_are_read_in_any_order(files):
    with limited(OPEN_SHARDS + 12):
        before = open_files()
        shards = Shards(files)
        assert len(shards) == FILES * RECORDS
        for index in np.random.default_rng(0).permutation(len(shards)).tolist():
            assert shards[index] == record(*divmod(index, RECORDS))
        assert OPEN_SHARDS <= open_files() - before <= OPEN_SHARDS + 2
        del shards
        read = [content for file in files for content in read_range(file)]
        assert read == [record(*divmod(index, RECORDS)) for index in range(len(read))]
    assert len(read) == FILES * RECORDS


def test_as_many_files_stay_open_as_the_process_may_have(files):
    """A quarter of its limit, so that those read before need not be opened again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        for limit, most in ((64, OPEN_SHARDS), (600, 600 // SHARE_OPEN)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            assert most_open() == most
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    before, shards = open_files(), Shards(files, 150)
    order = np.random.default_rng(1).permutation(len(shards)).tolist()
    for index in order:
        shards[index]
    assert open_files() - before == 150
    last = {index // RECORDS: index for index in order}
    kept = sorted(last, key=lambda file: -order.index(last[file]))[:150]
    opened = shards._open.cache_info().misses
    for file in kept:
        assert shards[file * RECORDS] == record(file, 0)
    assert shards._open.cache_info().misses == opened


def test_thousands_of_files_are_read_with_few_open(files):
    """5,000 paths to 200 files, each of which is another to the reader."""
    names = [f"{files[n % FILES].parent}/{'./' * (n // FILES)}{files[n % FILES].name}"
             for n in range(5000)]  # fmt: skip
    before, shards = open_files(), Shards(names, 64)
    assert len(shards) == 5000 * RECORDS
    for index in np.random.default_rng(2).integers(0, len(shards), 500).tolist():
        file, number = divmod(index, RECORDS)
        assert shards[index] == record(file % FILES, number)
        assert open_files() - before <= 64
    assert open_files() - before == 64


def test_what_the_system_refuses_is_not_called_damaged(files, tmp_path):
    shards = Shards(files)
    with limited(0), pytest.raises(UserError, match="Too many open files.*`ulimit -n`") as refused:
        shards[0]
    assert not isinstance(refused.value, DamagedError)
    assert shards[0] == record(0, 0), "it can be read when there is room again"
    for read in (Shards, lambda paths: list(read_range(paths[0]))):
        with pytest.raises(UserError, match="none cannot be read .No such file") as refused:
            read([tmp_path / "none"])
        assert not isinstance(refused.value, DamagedError)
        with limited(0), pytest.raises(UserError, match="Too many open files"):
            read(files[:1])


def test_what_is_damaged_is_called_so(files, tmp_path):
    content = files[0].read_bytes()
    cut, bad = tmp_path / "cut", tmp_path / "bad"
    cut.write_bytes(content[:-1000])
    bad.write_bytes(content[:200] + bytes(40) + content[240:])
    with pytest.raises(DamagedError, match="cut: its index is damaged"):
        Shards([cut])
    shards = Shards([files[1], bad])
    assert shards[0] == record(1, 0)
    damaged = []
    for number in range(RECORDS):
        try:
            assert shards[RECORDS + number] == record(0, number)
        except DamagedError as error:
            damaged.append(str(error))
    assert damaged and all("bad: record" in text for text in damaged)
    with pytest.raises(DamagedError, match="bad: a record is damaged"):
        list(read_range(bad))
