"""The same bytes whoever does the units, in which order, and however often that is interrupted."""

import dataclasses
import gzip
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds

from layerskip_jax.commands import data as command
from layerskip_jax.data import runners
from layerskip_jax.data.batches import BatchSource
from layerskip_jax.data.documents import first_tokens
from layerskip_jax.data.manifest import read_manifest
from layerskip_jax.data.prepare import prepare
from layerskip_jax.data.runners import Processes
from layerskip_jax.data.sources import Piece
from layerskip_jax.data.tokenizer import file_sha256, load_tokenizer
from layerskip_jax.data.unit_folder import DiskFolder
from layerskip_jax.data.units import Job, Task, Unit
from layerskip_jax.schema import ConfigError, UserError
from tests.data.conftest import DOCUMENTS, small_request

UNIT_BYTES = 700
JOB = Job(DiskFolder(Path()), small_request("none"), "", 0)
REPOSITORY = Path(__file__).parents[2]


def in_units(corpus, **changes):
    return small_request(corpus, unit_bytes=UNIT_BYTES, keep_documents=True, **changes)


def task_of(key):
    return Task(Unit((Piece(key, key, 0, "", "text"),)), key)


def contents(folder):
    """Returns the checksum of every file of a prepared folder, by name."""
    return {
        str(file.relative_to(folder)): file_sha256(file)
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.fixture(scope="module")
def by_units(tmp_path_factory, corpus_folder):
    """Prepared from many units by this process, in order."""
    output = tmp_path_factory.mktemp("units") / "data"
    prepare(in_units(corpus_folder), output)
    return output


class Shuffled:
    """Does the units in an order of its own, each twice."""

    def run(self, work, job, tasks, done, failed):
        for task in random.Random(5).sample(tasks, len(tasks)):
            runners.attempt(work, job, task)
            done(task, runners.attempt(work, job, task))


def test_there_are_many_units_and_no_document_is_lost(by_units, prepared):
    manifest, whole = read_manifest(by_units), read_manifest(prepared)
    assert len({shard.unit for shard in manifest.train.shards}) > 5
    for name in ("train", "validation"):
        mine, other = manifest.split(name), whole.split(name)
        assert (mine.documents, mine.bytes) == (other.documents, other.bytes)
    documents = [sorted(first_tokens(str(f), "train", 10_000)) for f in (by_units, prepared)]
    tokenizers = [load_tokenizer(f / "tokenizer.json") for f in (by_units, prepared)]
    texts = [
        sorted(tokenizer.decode(ids[:-1]) for ids in found)
        for tokenizer, found in zip(tokenizers, documents, strict=True)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "runner", [Processes(2), Processes(4), Shuffled()], ids=["2", "4", "shuffled"]
)
def test_the_same_bytes_by_any_workers_in_any_order(by_units, corpus_folder, tmp_path, runner):
    prepare(in_units(corpus_folder), tmp_path / "data", runner=runner)
    assert contents(tmp_path / "data") == contents(by_units)
    assert os.listdir(tmp_path) == ["data"]


class DiesAfter:
    """Is interrupted when so many units are done."""

    def __init__(self, count):
        self.count, self.made = count, []

    def run(self, work, job, tasks, done, failed):
        for task in tasks:
            if len(self.made) == self.count:
                raise KeyboardInterrupt
            self.made.append(task.key)
            done(task, work(job, task))


def test_a_rerun_makes_what_is_missing_alone(by_units, corpus_folder, tmp_path, caplog):
    made = []
    for count in (2, 3, 0):
        runner = DiesAfter(count)
        with pytest.raises(KeyboardInterrupt):
            prepare(in_units(corpus_folder), tmp_path / "data", runner=runner)
        assert not (tmp_path / "data").exists()
        made += runner.made
    # A unit whose file is damaged is no unit that is done.
    [damaged, *_] = (tmp_path / ".data.units" / made[0]).glob("*.array_record")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    runner = DiesAfter(1000)
    prepare(in_units(corpus_folder), tmp_path / "data", runner=runner)
    assert set(made) & set(runner.made) == {made[0]}
    assert "is damaged, so its unit is made again" in caplog.text
    assert contents(tmp_path / "data") == contents(by_units)
    assert os.listdir(tmp_path) == ["data"]


@pytest.mark.slow  # ten processes are started and killed
def test_ten_kills_at_random_moments_change_nothing(by_units, corpus_folder, tmp_path):
    output = tmp_path / "data"
    line = [
        sys.executable, "-m", "layerskip_jax", "prepare", f"--source={corpus_folder}",
        "--sequence-length=16", "--vocab-size=300", "--validation-fraction=0.2",
        f"--unit-bytes={UNIT_BYTES}", "--keep-documents", "--workers=2",
    ]  # fmt: skip
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": REPOSITORY}
    begun = time.monotonic()
    subprocess.run([*line, f"--output={tmp_path / 'whole'}"], check=True, **quiet)
    whole, draw = time.monotonic() - begun, random.Random(1)
    killed = done = 0
    while killed < 10:
        process = subprocess.Popen([*line, f"--output={output}"], **quiet)
        try:
            process.wait(draw.uniform(0.2, 1) * whole)
            output.rename(tmp_path / f"done-{done}")
            done += 1
        except subprocess.TimeoutExpired:
            process.kill()
            assert process.wait() == -signal.SIGKILL
            killed += 1
    subprocess.run([*line, f"--output={output}"], check=True, **quiet)
    for folder in tmp_path.iterdir():
        assert contents(folder) == contents(by_units), folder
    assert output in tmp_path.iterdir()


def test_two_at_once_are_refused(corpus_folder, tmp_path):
    class Meanwhile(DiesAfter):
        def run(self, *args):
            with pytest.raises(UserError, match="is being prepared by another process"):
                prepare(in_units(corpus_folder), tmp_path / "data")
            super().run(*args)

    prepare(in_units(corpus_folder), tmp_path / "data", runner=Meanwhile(1000))


def broken_corpus(corpus_folder, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for file in corpus_folder.rglob("*.txt"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "20.txt").write_bytes(b"\xff" * UNIT_BYTES)  # a unit of its own
    return folder


def test_units_that_fail_are_named_and_the_rest_is_kept(corpus_folder, tmp_path, caplog):
    request = in_units(broken_corpus(corpus_folder, tmp_path))
    with pytest.raises(UserError, match="20.txt is not UTF-8 text"):
        prepare(request, tmp_path / "data")
    assert (tmp_path / ".data.units").is_dir(), "what is done is kept"
    manifest = prepare(request, tmp_path / "data", max_failed_units=1)
    [named] = manifest.failed_units
    assert "20.txt" in named and "left out: " in caplog.text
    assert manifest.train.documents + manifest.validation.documents == DOCUMENTS - 1
    assert read_manifest(tmp_path / "data") == manifest


def test_what_may_pass_is_tried_again(corpus_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(runners, "PAUSE_SECONDS", 0)
    calls = []

    def work(job, task):
        calls.append(task)
        if len(calls) < 3:
            raise ConnectionError("the network is away")
        return "done"

    assert runners.attempt(work, JOB, task_of("a")) == "done"
    assert len(calls) == 3
    calls.clear()

    def fails(job, task):
        calls.append(task)
        raise ConnectionError("the network is away")

    failure = runners.attempt(fails, JOB, task_of("a"))
    assert failure.reason == "ConnectionError: the network is away" and len(calls) == 3
    assert not failure.is_input


def dies(job, task):
    """Kills its worker on one task, as the system does for want of memory."""
    if task.key == "bad":
        os.kill(os.getpid(), signal.SIGKILL)
    return task.key


@pytest.mark.slow  # four pools of processes are started
def test_a_worker_that_is_killed_names_its_unit_and_the_rest_is_done(caplog):
    done, failed = [], []
    tasks = [task_of(key) for key in ("a", "bad", "b", "c")]
    Processes(2).run(dies, JOB, tasks, lambda task, key: done.append(key), failed.append)
    assert sorted(done) == ["a", "b", "c"]
    [failure] = failed
    assert failure.task.key == "bad" and "its worker was killed" in failure.reason


def test_the_sample_for_the_tokenizer_is_bounded_and_of_all_sources(tmp_path):
    for name in ("a", "b"):
        lines = [{"text": f"{name} {n} " + f"{name * 3} " * 30} for n in range(200)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    sources = (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    request = dataclasses.replace(
        small_request(*sources, unit_bytes=2000), tokenizer_bytes=8000, vocab_size=300
    )
    prepare(request, tmp_path / "data")
    tokens = load_tokenizer(tmp_path / "data" / "tokenizer.json").get_vocab()
    assert {"aaa", "bbb"} <= {token.strip("Ġ") for token in tokens}


def test_the_folder_opens_as_a_tfds_data_set(by_units):
    builder = tfds.builder_from_directory(by_units)
    for split in ("train", "validation"):
        theirs = builder.as_data_source(split=split)
        ours = BatchSource(by_units, split, batch_size=1, seed=0, shuffle=False)
        assert len(theirs) == ours.num_windows
        for number in (0, ours.num_windows - 1):
            window = theirs[number]["window"]
            np.testing.assert_array_equal(window[0, :-1], ours.batch(number).tokens[0])
            assert window.dtype == np.int32


def shown(folder, tmp_path, *arguments):
    figures = tmp_path / "shown.json"
    assert command.main(["show", str(folder), f"--json={figures}", *arguments]) == 0
    return json.loads(figures.read_text())


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_window_is_traced_to_its_documents(by_units, tmp_path, capsys, split):
    count = read_manifest(by_units).split(split).windows
    pieced = {}
    for number in [*range(0, count, 3), count - 1]:
        values = shown(by_units, tmp_path, f"--window={number}", f"--split={split}")
        size = sum(found["tokens"] for found in values["documents"])
        assert size == 17 or number in (count - 1, *ends_of_units(by_units, split))
        for found in values["documents"]:
            assert found["text"] in Path(found["file"]).read_text() or "\ufffd" in found["text"]
            pieced.setdefault(found["file"], 0)
            pieced[found["file"]] = max(pieced[found["file"]], found["begin"] + found["tokens"])
    capsys.readouterr()
    tokenizer = load_tokenizer(by_units / "tokenizer.json")
    assert len(pieced) > 0.8 * read_manifest(by_units).split(split).documents
    for file, tokens in pieced.items():
        assert tokens <= len(tokenizer.encode(Path(file).read_text()).ids) + 1


def write_formats(folder):
    """Writes ten documents of each format; returns a reader of what lies at a place, by file."""
    texts = {
        name: [f"{name} number {n}: " + f"some{n} words " * (n + 3) for n in range(10)]
        for name in ("d.jsonl", "d.jsonl.gz", "d.jsonl.zst", "d.parquet", "d.arrow", "d.txt.xz")
    }
    lines = {
        name: b"".join(json.dumps({"text": t}).encode() + b"\n" for t in found)
        for name, found in texts.items()
    }
    (folder / "d.jsonl").write_bytes(lines["d.jsonl"])
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(lines["d.jsonl.gz"]))
    with pa.CompressedOutputStream(str(folder / "d.jsonl.zst"), "zstd") as file:
        file.write(lines["d.jsonl.zst"])
    table = pa.table({"text": texts["d.parquet"]})
    pq.write_table(table, folder / "d.parquet", row_group_size=3)
    table = pa.table({"text": texts["d.arrow"]})
    with (
        pa.OSFile(str(folder / "d.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as w,
    ):
        w.write_table(table, max_chunksize=4)
    texts["d.txt.xz"] = [" ".join(texts["d.txt.xz"])]
    (folder / "d.txt.xz").write_bytes(lzma.compress(texts["d.txt.xz"][0].encode()))
    return texts


@pytest.mark.parametrize("whole", [False, True], ids=["cut", "whole"])
def test_a_window_of_any_format_is_traced(tmp_path, capsys, whole):
    folder = tmp_path / "texts"
    folder.mkdir()
    texts = write_formats(folder)
    fields = {}
    if whole:  # and so with the fields of prompts and completions
        (folder / "d.txt.xz").unlink()
        texts = {"p.jsonl": [f"asked {n}? said {n}" for n in range(30)]}
        rows = [dict(zip(("a", "b"), t.split("?"), strict=True)) for t in texts["p.jsonl"]]
        (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        fields = {"prompt_field": "a", "completion_field": "b"}
    source = folder / "p.jsonl" if whole else folder
    request = small_request(source, unit_bytes=300, sequence_length=24, **fields)
    manifest = prepare(request, tmp_path / "data")
    seen = set()
    for split in ("train", "validation"):
        for number in range(manifest.split(split).windows):
            values = shown(tmp_path / "data", tmp_path, f"--window={number}", f"--split={split}")
            assert values["documents"]
            for found in values["documents"]:
                name = Path(found["file"]).name
                kind, _, at = found["at"].partition(" ")
                index = 0 if kind == "the" else int(at) - 1
                text = texts[name][index].replace("?", "") if whole else texts[name][index]
                assert found["text"] in text, found
                assert kind == {"text": "the", "lines": "line"}.get(found["kind"], "row")
                seen.add((name, index))
    capsys.readouterr()
    assert seen == {(name, n) for name, found in texts.items() for n in range(len(found))}


def ends_of_units(folder, split):
    return {start - 1 for start in read_manifest(folder).split(split).unit_starts}


def test_what_cannot_be_shown_is_named(by_units, tmp_path):
    for arguments, message in (
        ([str(by_units)], "is prepared data; name a window with --window=N"),
        ([str(by_units), "--window=-1"], "--window=-1 must be at least 0"),
        ([str(by_units), "--window=9999"], r"--window=9999: train has \d+ windows"),
        ([str(by_units), "--window=0", "--split=tran"], "'tran' is not one of train, validation"),
        ([str(tmp_path), "--window=0"], "is no prepared data; of a run, name a window with --step"),
        ([str(tmp_path), "--step=0"], "is neither a run nor prepared data"),
    ):
        with pytest.raises((UserError, ConfigError), match=message):
            command.main(["show", *arguments])


def test_data_of_before_do_not_tell_their_documents(by_units, tmp_path):
    import shutil

    folder = shutil.copytree(by_units, tmp_path / "old")
    shutil.rmtree(folder / "origins")
    with pytest.raises(UserError, match="prepared by an older version, so prepare it again"):
        command.main(["show", str(folder), "--window=0"])
