"""Measures `layerskip prepare` against what tokenizing alone takes, and against other programs.

    python benchmarks/prepare.py --quick
    python benchmarks/prepare.py --source=FOLDER --size=2 --datatrove-python=PYTHON

All ways take the same text, tokenizer and cores, in turns. `limit` is `encode_batch_fast` alone,
on text in memory, with a thread a core: nothing is read, parsed, packed or written. Of `prepare`
the whole command counts, from its start to checksums and manifest. `datasets` is `datasets.map`
from arrow to arrow, `datatrove` its `DocumentTokenizer`, and `megatron` a pool of processes that
does what Megatron-LM's `preprocess_data.py` does; starting Python and importing them is not
counted, and of `datasets` making arrow of the text neither. A way that is not installed is left
out, and that is said.

Processor time is of all processes of a way, start and imports included, and tells more than time
does where others use the machine. Memory is what they hold together, pages of files left out; disk
is what the way's folder holds at the most, the text left out. Both are looked at twice a second, on
Linux.
"""

import argparse
import itertools
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import harness  # first: it puts the repository on the path

from layerskip_jax.commands.tables import make_table
from layerskip_jax.data.runners import cores
from layerskip_jax.data.sources import find_files
from layerskip_jax.data.tokenizer import END_TOKEN, load_tokenizer, train_tokenizer
from layerskip_jax.schema import UserError

ROOT = Path(__file__).resolve().parents[1]
WAYS = ("prepare", "datasets", "datatrove", "megatron")
FILE_BYTES = 32 << 20  # of text in one file at most
LARGEST_BYTES = 16 << 20  # of a document
TRAINED_BYTES = 20_000_000  # that the tokenizer is made from
LOOK_SECONDS = 0.5


def main() -> int:
    """Runs the benchmark."""
    options = _options()
    with (
        tempfile.TemporaryDirectory(dir=options.folder, prefix="prepare-bench-") as folder,
        harness.Bench(options) as bench,
    ):
        _measure(options, Path(folder), bench)
    return 0


def _options() -> argparse.Namespace:
    parser = harness.parser(__doc__.split("\n")[0], rounds=(1, 1))
    add = parser.add_argument
    add("--source", default="stdlib", help="folder of which each file of UTF-8 text is a document")
    add("--size", type=float, help="GB of text (default: as it is; with --quick 0.001)")
    add("--cores", type=int, default=cores(), help="processes, or threads (default: all cores)")
    add("--vocab-size", type=int, default=32768, help="of the tokenizer, trained on 20 MB")
    add("--ways", default=",".join(WAYS), help=f"beside the limit (default: {','.join(WAYS)})")
    add("--datatrove-python", default=sys.executable, help="a Python that has datatrove")
    add("--folder", type=Path, help="where text and results lie for the while, with three times "
        "the text's size free (default: the system's)")  # fmt: skip
    options = harness.parse(parser)
    options.ways = options.ways.split(",")
    if unknown := set(options.ways) - set(WAYS):
        parser.error(f"--ways: {', '.join(sorted(unknown))} is none of {', '.join(WAYS)}")
    if options.size is None and options.quick:
        options.size = harness.QUICK_BYTES / 1e9
    if options.size is not None and options.size <= 0:
        parser.error(f"--size={options.size}: give more than 0")
    if options.cores < 1:
        parser.error(f"--cores={options.cores}: give 1 or more")
    if options.folder is not None and not options.folder.is_dir():
        parser.error(f"--folder={options.folder}: there is no such folder")
    return options


def _measure(options: argparse.Namespace, folder: Path, bench: harness.Bench) -> None:
    ways = [way for way in options.ways if _is_installed(way, options, bench)]
    bench.expect(1 + options.rounds * (1 + len(ways)))
    bench.begin("writing the text and training a tokenizer")
    text, tokenizer = folder / "text", folder / "tokenizer.json"
    size, documents = write_text(options, text)
    sample = itertools.islice(_texts(text), 1_000_000)
    train_tokenizer(_first(sample, TRAINED_BYTES), options.vocab_size).save(str(tokenizer))
    bench.add(
        {
            "text_bytes": size, "documents": documents, "cores": options.cores,
            "vocab_size": load_tokenizer(tokenizer).get_vocab_size(),
        }
    )  # fmt: skip
    rounds: dict[str, list[dict]] = {}
    for number in range(options.rounds):
        # The machine's drift falls on each way alike.
        turn = number % (1 + len(ways))
        every = ["limit", *ways]
        for way in every[turn:] + every[:turn]:
            bench.begin(f"{way}, round {number + 1}")
            taken = _run(way, options, text, tokenizer, folder / way, documents)
            rounds.setdefault(way, []).append(taken)
        _report(rounds, size, bench)
    bench.print(_table(bench.figures, ["limit", *ways]))


def _is_installed(way: str, options: argparse.Namespace, bench: harness.Bench) -> bool:
    if way not in ("datasets", "datatrove"):
        return True
    found = subprocess.run([_python(way, options), "-c", f"import {way}"], capture_output=True)
    if found.returncode:
        bench.print(f"{way} is not installed for {_python(way, options)}, and is left out")
    return not found.returncode


def _python(way: str, options: argparse.Namespace) -> str:
    return options.datatrove_python if way == "datatrove" else sys.executable


def write_text(options: argparse.Namespace, folder: Path) -> tuple[int, int]:
    """Writes the source as files of JSON lines; returns the bytes of text, and the documents.

    Where more is wanted than there is, the documents come again, each beginning at another of its
    lines, so that none is another's copy; of less the first of a drawn order are taken.

    Raises:
      UserError: there is no text.
    """
    folder.mkdir()
    files = _files(options.source)
    random.Random(0).shuffle(files)
    most = float("inf") if options.size is None else options.size * 1e9
    passes = itertools.count() if options.size else range(1)
    # At least one file a core, as datatrove parts work by files.
    largest = min(FILE_BYTES, max(most / (4 * options.cores), 1))
    size = documents = number = 0
    out, held = (folder / f"{number:05d}.jsonl").open("w", encoding="utf-8"), 0
    for turn in passes:
        for file in files:
            text = _text(file)
            if not text:
                continue
            if held >= largest:
                out.close()
                number, held = number + 1, 0
                out = (folder / f"{number:05d}.jsonl").open("w", encoding="utf-8")
            if turn:
                lines = text.splitlines(keepends=True)
                at = turn * 7919 % len(lines)
                text = f"{turn}\n{''.join(lines[at:] + lines[:at])}"
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            length = len(text.encode())
            size, held, documents = size + length, held + length, documents + 1
            if size >= most:
                break
        if size >= most or not size:
            break
    out.close()
    if not size:
        raise UserError(f"--source={options.source} holds no file of UTF-8 text")
    return size, documents


def _files(source: str) -> list[Path]:
    if source == "stdlib":
        return [Path(found.url) for found in find_files(source)[0]]
    if not Path(source).is_dir():
        raise UserError(f"--source={source}: there is no such folder")
    return sorted(p for p in Path(source).rglob("*") if p.is_file() and not p.is_symlink())


def _text(file: Path) -> str:
    """Returns the text of a file, "" of what is none, is very long, or spells the end token."""
    if file.stat().st_size > LARGEST_BYTES:
        return ""
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return ""
    return "" if END_TOKEN in text or not text.strip() or "\0" in text else text


def _texts(folder: Path) -> Iterator[str]:
    for file in sorted(folder.glob("*.jsonl")):
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]


def _first(texts: Iterator[str], characters: int) -> Iterator[str]:
    taken = 0
    for text in texts:
        yield text
        taken += len(text)
        if taken >= characters:
            return


def _run(
    way: str, options: argparse.Namespace, text: Path, tokenizer: Path, folder: Path, documents: int
) -> dict:
    """Runs one way; returns its tokens, seconds, peak memory and peak disk."""
    folder.mkdir()
    count = str(options.cores)
    if way == "prepare":
        figures = folder / "figures.json"
        command = [
            sys.executable, "-m", "layerskip_jax", "prepare", f"--source={text}",
            f"--tokenizer={tokenizer}", f"--output={folder / 'data'}", f"--workers={count}",
            "--sequence-length=2048", "--validation-fraction=0.05", f"--json={figures}",
        ]  # fmt: skip
    else:
        script = str(Path(__file__).with_name("tokenize_by.py"))
        command = [_python(way, options), script, way, *map(str, (text, tokenizer, folder)), count]
    begun, used = time.perf_counter(), _processor_seconds()
    said, memory, disk = _watched(command, folder)
    used = _processor_seconds() - used
    if way == "prepare":
        seconds = time.perf_counter() - begun
        made = json.loads(figures.read_text())
        tokens = made["train_tokens"] + made["validation_tokens"] - documents
    else:
        result = json.loads(said.splitlines()[-1])
        tokens, seconds = result["tokens"], result["seconds"]
    shutil.rmtree(folder)
    return {
        "tokens": tokens, "seconds": seconds, "processor": used, "memory": memory, "disk": disk,
    }  # fmt: skip


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _watched(command: list[str], folder: Path) -> tuple[str, int, int]:
    """Runs a command; returns what it printed, and the most memory and disk that it took.

    Raises:
      UserError: it fails.
    """
    # Found from any folder, also where another copy is installed.
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    memory = disk = 0
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(command, stdout=said, stderr=complaints, env=environment)
        try:
            while process.poll() is None:
                memory, disk = max(memory, tree_memory(process.pid)), max(disk, disk_of(folder))
                try:
                    process.wait(LOOK_SECONDS)
                except subprocess.TimeoutExpired:
                    pass  # it goes on, and is looked at again
        finally:
            process.kill()
            process.wait()
        said.seek(0), complaints.seek(0)
        if process.returncode:
            raise UserError(f"{' '.join(command)} failed:\n{complaints.read()[-3000:]}")
        return said.read(), memory, max(disk, disk_of(folder))


def tree_memory(root: int) -> int:
    """Returns the bytes that a process and those below it hold, each shared page once.

    0 where the system does not tell.
    """
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name before the last bracket may hold anything.
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended meanwhile
    tree, below = [], [root]
    while below:
        tree += below
        below = [pid for pid, parent in parents.items() if parent in below]
    return sum(map(_own_memory, tree))


def _own_memory(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    kinds = ("Pss_Anon:", "Pss_Shmem:")
    return sum(int(line.split()[1]) for line in lines if line.startswith(kinds)) * 1024


def disk_of(folder: Path) -> int:
    """Returns the bytes of the files below a folder, of several links to one file once."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                stat = os.lstat(os.path.join(parent, name))
            except OSError:
                continue  # it is gone meanwhile
            found[stat.st_ino] = stat.st_size
    return sum(found.values())


def _report(rounds: dict[str, list[dict]], size: int, bench: harness.Bench) -> None:
    """Adds the figures of the rounds so far; each way's speed is of the limit's tokens."""
    tokens = rounds["limit"][0]["tokens"]
    figures: dict = {"tokens": tokens}
    for way, taken in rounds.items():
        # Long texts are cut for the limit, which changes a few tokens.
        if abs(taken[0]["tokens"] / tokens - 1) > 1e-3:
            raise UserError(f"{way} made {taken[0]['tokens']} tokens of the text, not {tokens}")
        seconds = statistics.median(one["seconds"] for one in taken)
        figures[f"{way}/tokens"] = taken[0]["tokens"]
        figures[f"{way}/seconds"] = seconds
        figures[f"{way}/tokens_per_second"] = tokens / seconds
        figures[f"{way}/over_limit"] = statistics.median(
            limit["seconds"] / one["seconds"]
            for limit, one in zip(rounds["limit"], taken, strict=True)
        )
        figures[f"{way}/processor_seconds"] = statistics.median(one["processor"] for one in taken)
        figures[f"{way}/memory_bytes"] = max(one["memory"] for one in taken)
        if way != "limit":
            figures[f"{way}/disk_bytes"] = max(one["disk"] for one in taken)
            figures[f"{way}/disk_over_text"] = figures[f"{way}/disk_bytes"] / size
    bench.add(figures, show=False)


def _table(figures: dict, ways: list[str]):
    rows = [
        (
            way,
            f"{figures[f'{way}/tokens_per_second']:,.0f}",
            f"{figures[f'{way}/over_limit']:.3f}",
            f"{figures[f'{way}/seconds']:,.1f}",
            f"{figures[f'{way}/processor_seconds']:,.1f}",
            f"{figures[f'{way}/memory_bytes'] / 1e9:.2f}",
            f"{figures[f'{way}/disk_over_text']:.2f}" if way != "limit" else "",
        )
        for way in ways
    ]
    return make_table(
        f"{figures['text_bytes']:,} bytes of text, {figures['documents']:,} documents, "
        f"{figures['tokens']:,} tokens, {figures['cores']} cores",
        ("", "tokens/s", "over limit", "s", "processor s", "memory, GB", "disk over text"),
        rows,
    )


if __name__ == "__main__":
    harness.run(main)
