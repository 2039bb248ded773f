r"""How many windows one host's reading can feed, against what its chips ask for.

    python benchmarks/feed.py --json=feed.json           # --quick for a first look

Windows of real text are prepared at S 2048 and 8192, and their records written again until there
are as many as a few full shards hold; further names of these files stand for more of them. Then
batches of 16 windows, in a run's order, are read as a run reads them, by 1, 2 and 4 threads: warm,
after all files were read once, and, where this process may empty the page cache (as root), cold.
Each figure is the median of the rounds; `cpu` is the processor time of a window, which other
programs on the machine disturb less.

What is asked for is computed: the FLOPs that the 1.5B recipe (`configs/scratch_1_5b.py`) needs a
window, and a TPU v5p host of four chips that does half of its peak. `wait` is what a step of 16
windows waits for its data while so many windows a second are demanded of 4 threads, and the time
from one step to the next is no longer than that.

`shards` reads from as many full shards as a large corpus has, with few open at a time and with as
many as `ulimit -n` lets be: one file by many names, so that they take no disk. `parts` times what
reading a window consists of, one by one, on one thread.
"""

import dataclasses
import functools
import gc
import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from rich.table import Table

from layerskip_jax.config import load_config
from layerskip_jax.data.batches import BatchSource
from layerskip_jax.data.manifest import MANIFEST_FILE, TOKENIZER_FILE, read_manifest
from layerskip_jax.data.order import Order
from layerskip_jax.data.packing import unpack
from layerskip_jax.data.shards import Shards, most_open
from layerskip_jax.hardware.chips import CHIPS
from layerskip_jax.training.flops import CostModel

LENGTHS = (2048, 8192)
THREADS = (1, 2, 4)
ROWS = 16  # what one host of four chips reads of a batch of the recipe
DEMAND = 50_000  # windows a second
MFU = 0.5
SHARD_BYTES = 64 << 20  # of windows, as `layerskip prepare` has them
SOURCE = "stdlib"
SECONDS, QUICK_SECONDS = 2.0, 0.2  # that each rate is measured for
COLD_WINDOWS = 512
LEAST_WINDOWS = 2**17  # in an order of fewer than 2**16, finding the next one takes longer
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
FEW_FILES = 128  # the least limit of open files there is
SAMPLE = 1024  # windows that a part is timed on


def asked_for(length: int) -> float:
    """Returns the windows a second that the recipe asks of a v5p host at `MFU`."""
    config = load_config(
        ["--config=scratch_1_5b", f"--config.model.max_sequence_length={max(length, 4096)}"]
    )
    steps, rows = config.training.steps, config.training.batch_size
    needed = CostModel(config, length).planned(0, steps).needed / rows
    chip = CHIPS["v5p"]
    return MFU * chip.per_host * chip.flops / needed


def records_of(workdir: Path, length: int, quick: bool) -> tuple[Path, list[bytes]]:
    """Prepares text; returns the folder and its records."""
    from layerskip_jax.commands import prepare  # tokenizers

    data, first = workdir / f"text-{length}", workdir / f"text-{LENGTHS[0]}"
    known = first / TOKENIZER_FILE
    tokenizer = f"--tokenizer={known}" if length != LENGTHS[0] else "--vocab-size=16384"
    size = 1_000_000 if quick else 8_000_000
    code = harness.run_verb(
        prepare, f"--source={SOURCE}", f"--output={data}", f"--sequence-length={length}", tokenizer,
        f"--max-bytes={size}",
    )  # fmt: skip
    if code:
        raise SystemExit(code)
    shards = read_manifest(data).train.shards
    records = Shards([data / shard.name for shard in shards])
    return data, [records[number] for number in range(len(records))]


def written(
    folder: Path, prepared: Path, records: list[bytes], shards: int, each: int, options: str = ""
) -> Path:
    """Writes the records, over and over, into shards of a folder that a run can read."""
    folder.mkdir()
    paths = [folder / f"train-{number:05d}.array_record" for number in range(shards)]
    for number, path in enumerate(paths):
        writer = ArrayRecordWriter(str(path), f"group_size:1{options}")
        for at in range(number * each, (number + 1) * each):
            writer.write(records[at % len(records)])
        writer.close()
    _describe(folder, prepared, paths, each)
    return folder


def linked(folder: Path, like: Path, shards: int) -> Path:
    """Makes a folder of so many shards out of the files of another, by further names of them."""
    folder.mkdir()
    files = sorted(like.glob("*.array_record"))
    paths = [folder / f"train-{number:05d}.array_record" for number in range(shards)]
    for number, path in enumerate(paths):
        os.link(files[number % len(files)], path)
    _describe(folder, like, paths, read_manifest(like).train.shards[0].windows)
    return folder


def _describe(folder: Path, like: Path, paths: list[Path], each: int) -> None:
    """Writes the manifest of shards of `each` windows, after that of another folder."""
    manifest = read_manifest(like)
    one = manifest.train.shards[0]
    shards = tuple(
        dataclasses.replace(one, name=path.name, windows=each, bytes=path.stat().st_size)
        for path in paths
    )
    train = dataclasses.replace(manifest.train, windows=each * len(paths), shards=shards)
    none = dataclasses.replace(manifest.validation, windows=0, shards=())
    manifest = dataclasses.replace(manifest, train=train, validation=none)
    (folder / MANIFEST_FILE).write_text(json.dumps(dataclasses.asdict(manifest)))
    shutil.copyfile(like / TOKENIZER_FILE, folder / TOKENIZER_FILE)


def open_source(folder: Path) -> BatchSource:
    """Opens the windows of a folder as a run does."""
    return BatchSource(folder, "train", batch_size=ROWS, seed=0)


@contextmanager
def reading(source: BatchSource, threads: int) -> Iterator[Iterator]:
    """Gives the batches of a run, with as many held as two for each thread."""
    steps = range(10**9)
    buffer = 2 * threads
    with source.prefetch(steps, lambda _: slice(None), buffer_size=buffer, threads=threads) as read:
        yield read


def fed(source: BatchSource, threads: int, seconds: float) -> tuple[float, float]:
    """Returns the windows read a second, and the processor's seconds of one.

    Those are left out that were read ahead before the first one was asked for.
    """
    with reading(source, threads) as batches:
        for _ in range(2 * threads + 1):
            next(batches)
        start, used, windows = time.perf_counter(), time.process_time(), 0
        while (passed := time.perf_counter() - start) < seconds:
            next(batches)
            windows += ROWS
        return windows / passed, (time.process_time() - used) / windows


def fed_cold(source: BatchSource, threads: int) -> tuple[float, float]:
    """Returns the same of the first windows, none of which this machine has in memory.

    They are few beside the pages that the system reads with each, or the later ones would be there.
    """
    drop_caches()
    start, used = time.perf_counter(), time.process_time()
    with reading(source, threads) as batches:
        for _ in range(COLD_WINDOWS // ROWS):
            next(batches)
        passed = time.perf_counter() - start
    return COLD_WINDOWS / passed, (time.process_time() - used) / COLD_WINDOWS


def waits(source: BatchSource, threads: int, rate: float, seconds: float) -> float:
    """Returns the seconds that a step waits for its batch, on average, at a rate of windows/s."""
    every, waited, steps = ROWS / rate, 0.0, 0
    with reading(source, threads) as batches:
        for _ in range(2 * threads + 1):
            next(batches)
        start = time.perf_counter()
        while (begin := time.perf_counter()) - start < seconds or steps < 3:
            next(batches)
            got = time.perf_counter()
            waited += got - begin
            steps += 1
            time.sleep(max(begin + every - got, 0))  # the step itself
    return waited / steps


def drop_caches() -> None:
    """Empties the page cache."""
    os.sync()
    DROP_CACHES.write_text("1\n")


def microseconds(work: Callable[[], object], windows: int, rounds: int) -> float:
    """Returns the median time of some work, in microseconds a window."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)) / windows * 1e6


def parts(folder: Path, plain: Path, rounds: int) -> dict[str, float]:
    """Returns the microseconds a window of each part of reading, on one thread."""
    files = sorted(folder.glob("*.array_record"))
    of_plain = sorted(plain.glob("*.array_record"))
    records, uncompressed = Shards(files), Shards(of_plain)
    count = len(records)
    order = Order((LEAST_WINDOWS,), seed=0)
    places = np.arange(SAMPLE).reshape(-1, ROWS)
    numbers = (order.windows(places.ravel()) % count).tolist()
    length = read_manifest(folder).sequence_length
    shape = (2, length + 1)
    taken = [records[number] for number in numbers]
    read = np.empty((SAMPLE, *shape), np.int32)

    def laid() -> None:
        for row, record in enumerate(taken):
            before = len(record) - 8 * (length + 1)
            read[row] = np.frombuffer(record, np.int32, offset=before).reshape(shape)

    laid()
    in_batches = read.reshape(-1, ROWS, *shape)
    in_plain = [number % len(uncompressed) for number in numbers]
    work = {
        "order": lambda: [order.windows(rows) for rows in places],
        "record": lambda: [records[number] for number in numbers],
        "record, uncompressed": lambda: [uncompressed[number] for number in in_plain],
        "copy": laid,
        "unpack": lambda: [unpack(batch) for batch in in_batches],
    }
    return {name: microseconds(part, SAMPLE, rounds) for name, part in work.items()}


def median_of(measure: Callable[[], Any], rounds: int) -> Any:
    """Returns the median of what is measured so often; of several figures, that of each."""
    return np.median([measure() for _ in range(rounds)], axis=0)


def rates(bench: harness.Bench, folder: Path, length: int, rounds: int, seconds: float) -> Table:
    """Adds the windows a second of one length, and returns their table."""
    table = Table("threads", *map(str, THREADS), title=f"windows a second, S {length}")
    source = open_source(folder)
    for shard in folder.glob("*.array_record"):
        shard.read_bytes()
    ways = {"warm": lambda threads: fed(source, threads, seconds)}
    if os.access(DROP_CACHES, os.W_OK):
        ways["cold"] = lambda threads: fed_cold(source, threads)
    else:
        bench.print(f"cold reading is left out: {DROP_CACHES} is for root to write")
    for way, once in ways.items():
        row = []
        for threads in THREADS:
            bench.begin(f"S {length}, {way}, {threads} thread(s)")
            rate, used = map(float, median_of(functools.partial(once, threads), rounds))
            name = f"{length}/{way}/{threads}_threads"
            bench.add({name: rate, f"{name}/cpu_microseconds": used * 1e6}, show=False)
            row.append(f"{rate:,.0f} (cpu {used * 1e6:.0f} us)")
        table.add_row(way, *row)
    for shard in folder.glob("*.array_record"):
        shard.read_bytes()
    return table


def waiting(bench: harness.Bench, folder: Path, length: int, rounds: int, seconds: float) -> None:
    """Adds what the recipe asks of a host, and what a step waits for its data at some rates."""
    asked = asked_for(length)
    best = max(bench.figures[f"{length}/warm/{threads}_threads"] for threads in THREADS)
    bench.add({f"{length}/v5p_host_asks": asked, f"{length}/fed_over_asked": best / asked})
    source = open_source(folder)
    for name, rate in (("at_demand", DEMAND), ("at_v5p_host", asked)):
        bench.begin(f"S {length}, waiting {name}")
        once = functools.partial(waits, source, THREADS[-1], rate, seconds)
        bench.add({f"{length}/wait_ms/{name}": float(median_of(once, rounds)) * 1e3})


def many_shards(bench: harness.Bench, folder: Path, rounds: int, seconds: float) -> None:
    """Adds the windows a second from many shards, by the files that may be open."""
    gc.collect()  # what was open before
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = len(read_manifest(folder).train.shards)
    for name, limit in (("few_open", FEW_FILES), ("ulimit", soft)):
        bench.begin(f"{count} shards, {name}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        try:
            source, before = open_source(folder), len(os.listdir("/proc/self/fd"))
            # So that what may be open is, as far as the time goes.
            fed(source, THREADS[-1], seconds * rounds)
            once = functools.partial(fed, source, THREADS[-1], seconds)
            rate, used = map(float, median_of(once, rounds))
            bench.add(
                {
                    f"shards/{name}/windows_per_second": rate,
                    f"shards/{name}/cpu_microseconds": used * 1e6,
                    f"shards/{name}/open": len(os.listdir("/proc/self/fd")) - before,
                    f"shards/{name}/may_be_open": most_open(),
                }
            )
            del source, once
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def measure(bench: harness.Bench, options, workdir: Path) -> None:
    """Runs all parts."""
    rounds, quick = options.rounds, bench.quick
    seconds = QUICK_SECONDS if quick else SECONDS
    shards, share = (4, 4) if quick else (16, 1)
    bench.add({"shards/files": options.shards})
    for length in LENGTHS:
        prepared, records = records_of(workdir, length, quick)
        each = SHARD_BYTES // (8 * (length + 1)) // share
        folder = written(workdir / f"windows-{length}", prepared, records, shards, each)
        plain = written(
            workdir / f"plain-{length}", prepared, records, 1, min(each, SAMPLE), ",uncompressed"
        )
        bench.begin(f"S {length}, parts")
        sizes = [
            sum(file.stat().st_size for file in of.glob("*.array_record")) / count / 1e3
            for of, count in ((folder, shards * each), (plain, min(each, SAMPLE)))
        ]
        bench.add({f"{length}/kilobytes": sizes[0], f"{length}/kilobytes_uncompressed": sizes[1]})
        found = parts(folder, plain, rounds)
        folder = linked(workdir / f"many-{length}", folder, LEAST_WINDOWS // each + 1)
        bench.add({f"{length}/microseconds/{part}": time for part, time in found.items()})
        bench.print(rates(bench, folder, length, rounds, seconds))
        waiting(bench, folder, length, rounds, seconds)
    bench.begin(f"linking {options.shards} shards")
    many = linked(workdir / "many", workdir / f"windows-{LENGTHS[0]}", options.shards)
    many_shards(bench, many, rounds, seconds)


def main() -> int:
    """Runs the benchmark."""
    parser = harness.parser(__doc__.split("\n")[0], rounds=(5, 2))
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--shards", type=int, help="files of `shards` (5,000, with --quick 500)")
    options = harness.parse(parser)
    options.shards = options.shards or (500 if options.quick else 5000)
    ways = 2 if os.access(DROP_CACHES, os.W_OK) else 1
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as workdir,
        harness.Bench(options) as bench,
    ):
        bench.expect(len(LENGTHS) * (1 + ways * len(THREADS) + 2) + 3)
        measure(bench, options, Path(workdir))
    return 0


if __name__ == "__main__":
    harness.run(main)
