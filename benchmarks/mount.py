r"""What reading windows costs from a mounted bucket, against the disk.

    python benchmarks/mount.py --json=mount.json                    # on a stand-in for a bucket
    python benchmarks/mount.py --data=/data --json=mount.json       # one folder: a real mount

Windows are read in no order, as training reads them, each once, by 4 and by 16 threads.

The stand-in is a web server on this machine that answers a request for a part of a file after
`--latency-ms`, as a bucket takes to find the first byte, and as fast as it can from then on. It is
mounted through FUSE by rclone (as root, or where the user may mount), which asks for parts of files
as gcsfuse and Mountpoint do:

- `disk`: the files themselves, not in memory.
- `bucket`: the mount without a cache, so that each window is a request.
- `cache`: the mount with a file cache, after every file was read once, again not in memory;
  `fill_mb_per_second` is how fast they were read.

So it tells what FUSE and the wait for a bucket cost, and not what a network and a bucket can carry.
"""

import multiprocessing
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import harness
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from layerskip_jax.data.shards import Shards
from layerskip_jax.schema import UserError

LENGTHS = (2048, 8192)
THREADS = (4, 16)
# As many as stay open; of one file, rclone answers one read after the other.
SHARDS = 32
SHARD_BYTES = 16 << 20  # of windows
MOUNT_SECONDS = 20
PIECE = 1 << 16
# What is known of files is kept, and nothing is read ahead without a cache.
MOUNT = ["--read-only", "--dir-cache-time=1h", "--attr-timeout=1h", "--vfs-read-wait=0"]
WAYS = {
    "bucket": ["--vfs-cache-mode=off", "--buffer-size=0", "--vfs-read-chunk-size=256k"],
    "cache": ["--vfs-cache-mode=full"],
}


class Bucket(SimpleHTTPRequestHandler):
    """Files of a folder over HTTP, or parts of them, each after a while."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *arguments, latency: float, **options):
        """`latency` is in seconds."""
        self.latency = latency
        super().__init__(*arguments, **options)

    def do_GET(self) -> None:
        """Answers a request for a part of a file, and what else its kind answers."""
        time.sleep(self.latency)
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            super().do_GET()
            return
        path = Path(self.translate_path(self.path))
        size = path.stat().st_size
        first, last = int(span[1]), min(int(span[2] or size), size - 1)
        self.send_response(206)
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        with path.open("rb") as file:
            file.seek(first)
            for at in range(first, last + 1, PIECE):
                self.wfile.write(file.read(min(PIECE, last + 1 - at)))

    def handle(self) -> None:
        """Answers until the other side hangs up, as one does that has read enough."""
        with suppress(ConnectionError):
            super().handle()

    def finish(self) -> None:
        """Closes the connection, also one that is gone."""
        with suppress(ConnectionError):
            super().finish()

    def log_message(self, *_) -> None:
        """Says nothing of each request."""


def bucket_server(folder: Path, latency: float) -> ThreadingHTTPServer:
    """Returns a server of a folder, on a port of its own."""
    handler = partial(Bucket, directory=str(folder), latency=latency)
    return ThreadingHTTPServer(("127.0.0.1", 0), handler)


def _serve(folder: Path, latency: float, address) -> None:
    with bucket_server(folder, latency) as server:
        address.put(f"http://127.0.0.1:{server.server_address[1]}")
        server.serve_forever()


@contextmanager
def served(folder: Path, latency: float) -> Iterator[str]:
    """Gives the address at which another process serves a folder."""
    context = multiprocessing.get_context("spawn")
    address = context.Queue()
    process = context.Process(target=_serve, args=(folder, latency, address), daemon=True)
    process.start()
    try:
        yield address.get(timeout=60)
    finally:
        process.terminate()
        process.join()


@contextmanager
def mounted(address: str, folder: Path, options: list[str]) -> Iterator[Path]:
    """Gives the folder where rclone has mounted a server.

    Raises:
      UserError: it is not mounted; says what rclone said.
    """
    folder.mkdir()
    command = ["rclone", "mount", ":http:", str(folder), f"--http-url={address}/", *options]
    environment = {**os.environ, "RCLONE_CONFIG": os.devnull}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            end = time.monotonic() + MOUNT_SECONDS
            while not os.path.ismount(folder):
                if process.poll() is not None or time.monotonic() > end:
                    process.terminate()
                    raise UserError(f"rclone did not mount: {process.communicate()[1].strip()}")
                time.sleep(0.05)
            yield folder
        finally:
            process.terminate()  # which unmounts
            process.communicate()
            folder.rmdir()


def shards_of(folder: Path) -> list[Path]:
    """Returns the shards of a folder's training windows."""
    files = sorted(folder.glob("train-*.array_record"))
    if not files:
        raise UserError(f"--data={folder} has no train-*.array_record; prepare it, or mount it")
    return files


def write_windows(folder: Path, length: int, shards: int, shard_bytes: int) -> None:
    """Writes shards of windows of text of the standard library, which repeats itself."""
    from layerskip_jax.commands import prepare  # tokenizers

    data = folder.with_name(f"text-{length}")
    code = harness.run_verb(
        prepare, "--source=stdlib", f"--output={data}", f"--sequence-length={length}",
        "--vocab-size=16384", f"--max-bytes={min(shard_bytes, 8_000_000)}",
    )  # fmt: skip
    if code:
        raise SystemExit(code)
    text = Shards(shards_of(data))
    records = [text[number] for number in range(len(text))]
    folder.mkdir(parents=True)
    each = max(shard_bytes // (8 * (length + 1)), 1)
    for shard in range(shards):
        path = folder / f"train-{shard:05d}.array_record"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for number in range(shard * each, (shard + 1) * each):
            writer.write(records[number % len(records)])
        writer.close()


def forget(*folders: Path) -> None:
    """Takes the files of folders out of memory, as far as the system does."""
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                file = os.open(path, os.O_RDONLY)
                try:
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(file)


def read(folder: Path, threads: int, seconds: float, seed: int) -> dict[str, float]:
    """Reads each window once, in no order, for so long at most.

    Returns:
      Windows a second, and the milliseconds that a thread waits for one.
    """
    shards = Shards(shards_of(folder))
    order = iter(np.random.default_rng(seed).permutation(len(shards)).tolist())
    start = time.perf_counter()
    end = start + seconds

    def work(_) -> list[float]:
        waits = []
        for number in order:  # of one iterator: each takes the next that none has taken
            begin = time.perf_counter()
            if begin > end:
                break
            shards[number]
            waits.append(time.perf_counter() - begin)
        return waits

    with ThreadPoolExecutor(threads) as pool:
        waits = [wait for part in pool.map(work, range(threads)) for wait in part]
    passed = time.perf_counter() - start
    median, late = np.percentile(waits, [50, 99]) * 1e3
    return {
        "windows_per_second": len(waits) / passed,
        "wait_ms_median": float(median),
        "wait_ms_99_percent": float(late),
    }


def several(
    bench: harness.Bench, name: str, folder: Path, options, seconds: float, cached: Path | None
) -> None:
    """Adds what reading a folder gives, as medians of the rounds.

    `cached` is what else is to be forgotten before each, beside the folder itself.
    """
    for threads in THREADS:
        bench.begin(f"{name}, {threads} threads")
        found = []
        for at in range(options.rounds):
            forget(folder, *([cached] if cached else []))
            found.append(read(folder, threads, seconds, seed=at))
        figures = {
            f"{name}/{threads}_threads/{key}": float(np.median([one[key] for one in found]))
            for key in found[0]
        }
        bench.add(figures)


def stand_in(bench: harness.Bench, options, workdir: Path, seconds: float) -> None:
    """Adds the figures of the disk, and of mounts of a server where there can be any."""
    missing = ""
    if not shutil.which("rclone"):
        missing = "there is no rclone here; install it"
    elif not os.access("/dev/fuse", os.R_OK | os.W_OK):
        missing = "this user may not open /dev/fuse, which mounts need"
    for length in LENGTHS:
        folder = workdir / "bucket" / str(length)
        size = SHARD_BYTES // 64 if bench.quick else SHARD_BYTES
        write_windows(folder, length, SHARDS // 8 if bench.quick else SHARDS, size)
        several(bench, f"{length}/disk", folder, options, seconds, None)
    if missing:
        bench.print(f"mounts are left out: {missing}")
        return
    with served(workdir / "bucket", options.latency_ms / 1e3) as address:
        for way, words in WAYS.items():
            cache = workdir / "cache"
            place = [f"--cache-dir={cache}"]
            with mounted(address, workdir / "mount", [*MOUNT, *words, *place]) as mount:
                for length in LENGTHS:
                    name, folder = f"{length}/{way}", mount / str(length)
                    if way == "cache":
                        start, bytes_read = time.perf_counter(), 0
                        for file in shards_of(folder):
                            bytes_read += len(file.read_bytes())
                        rate = bytes_read / 1e6 / (time.perf_counter() - start)
                        bench.add({f"{name}/fill_mb_per_second": rate})
                    several(bench, name, folder, options, seconds, cache)


def main() -> int:
    """Runs the benchmark."""
    parser = harness.parser(__doc__.split("\n")[0], rounds=(3, 1))
    parser.add_argument("--data", type=Path, help="folder of prepared data; measure it alone")
    parser.add_argument(
        "--latency-ms", type=float, default=30, help="of the stand-in (default: 30)"
    )
    options = harness.parse(parser)
    if not 0 <= options.latency_ms <= 10_000:
        parser.error(f"--latency-ms={options.latency_ms} must be from 0 to 10000")
    seconds = 0.3 if options.quick else 5.0
    with harness.Bench(options) as bench, tempfile.TemporaryDirectory() as workdir:
        if options.data:
            shards_of(options.data)
            bench.expect(len(THREADS))
            several(bench, "data", options.data, options, seconds, None)
        else:
            bench.expect(len(LENGTHS) * len(THREADS) * 3)
            stand_in(bench, options, Path(workdir), seconds)
    return 0


if __name__ == "__main__":
    harness.run(main)
