import dataclasses
import json

import numpy as np
import pytest

from layerskip_jax.data import selection, unit_folder
from layerskip_jax.data.manifest import read_manifest
from layerskip_jax.data.prepare import find_units, prepare
from layerskip_jax.data.reading import DocumentReader
from layerskip_jax.data.selection import scan_unit, scanned, select
from layerskip_jax.data.unit_folder import DiskFolder
from layerskip_jax.data.units import Job, Task, left_out_of
from layerskip_jax.schema import UserError
from tests.data.conftest import small_request


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch):
    monkeypatch.setattr(unit_folder, "sync", lambda file: None)


def write_lines(file, texts):
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def chosen(folder, request):
    """The texts that are kept, in the order of the corpus, each with its set's name."""
    folder.mkdir(exist_ok=True)
    job = Job(DiskFolder(folder), request, "", 0)
    settings = repr(dataclasses.replace(request, max_bytes=0))  # of a scan
    tasks = [Task(unit, unit.key(settings)) for unit in find_units(request)]
    for task in scanned(job, tasks):
        scan_unit(job, task)
    assert not list(scanned(job, tasks))
    result = []
    for task in select(job, tasks):
        left_out = set(left_out_of(job, task).tolist())
        documents = DocumentReader(request).read(list(task.unit.pieces))
        result += [
            (task.unit.held_out, document.text)
            for number, document in enumerate(documents)
            if number not in left_out
        ]
    return result


def texts_of(folder, request):
    return [text for _, text in chosen(folder, request)]


@pytest.fixture
def corpus(tmp_path):
    """Three files with copies within each and between them."""
    folder = tmp_path / "texts"
    folder.mkdir()
    write_lines(folder / "a.jsonl", ["one", "two", "one", "three"])
    write_lines(folder / "b.jsonl", ["four", "two", "five", "five", ""])
    write_lines(folder / "c.jsonl", [])
    (folder / "d.txt").write_text("three")
    (folder / "e.txt").write_text("three ")  # no copy: to the letter
    return folder


@pytest.mark.parametrize("unit_bytes", [1, 40, 1 << 20])
@pytest.mark.parametrize("compared", [1, 3, 1 << 22])
def test_of_copies_the_first_is_kept(corpus, tmp_path, monkeypatch, unit_bytes, compared):
    monkeypatch.setattr(selection, "COMPARED", compared)
    request = small_request(corpus, deduplicate=True, unit_bytes=unit_bytes)
    kept = ["one", "two", "three", "four", "five", "three "]
    assert texts_of(tmp_path / "units", request) == kept
    # Sets that are held out come first, though they are last in the corpus.
    write_lines(tmp_path / "held.jsonl", ["five", "new", "new"])
    request = dataclasses.replace(request, held_outs=(f"mine={tmp_path}/held.jsonl",))
    expected = [("", text) for text in kept if text != "five"] + [("mine", "five"), ("mine", "new")]
    assert chosen(tmp_path / "more", request) == expected


def test_copies_whose_hashes_are_alike_in_part_are_none(tmp_path, monkeypatch):
    """All 16 bytes count, and equal ones stand next to each other whatever the first 8 are."""
    monkeypatch.setattr(selection, "COMPARED", 2)
    digests = {"a": b"\0" * 16, "b": b"\0" * 15 + b"\1", "c": b"\xff" * 16, "d": b"\0" * 16}
    monkeypatch.setattr(
        selection.DocumentReader,
        "read",
        lambda self, pieces: (
            document._replace(text=document.text)
            for document in map(lambda t: _Told(t, digests[t]), "abacdcbd")
        ),
    )
    file = tmp_path / "x.txt"
    file.write_text("any")
    request = small_request(file, deduplicate=True)
    job = Job(DiskFolder(tmp_path), request, "", 0)
    [unit] = find_units(request)
    scan_unit(job, Task(unit, "key"))
    [task] = select(job, [Task(unit, "key")])
    assert left_out_of(job, task).tolist() == [2, 4, 5, 6, 7]


class _Told:
    def __init__(self, text, digest):
        self.text, self.digest = text, digest

    def _replace(self, **_):
        return self


@pytest.fixture
def many(tmp_path):
    random = np.random.default_rng(0)
    texts = [f"{n} " + "x" * int(random.integers(1, 60)) for n in range(200)]
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(4):
        write_lines(folder / f"{number}.jsonl", [*texts[number::4], *texts[number : number + 3]])
    return folder


def test_max_bytes_draws_whole_documents(many, tmp_path, monkeypatch):
    def drawn(limit, **changes):
        request = small_request(many, max_bytes=limit, **{"seed": 1, **changes})
        return texts_of(tmp_path / "units", request)

    everything = drawn(1 << 30)
    assert len(everything) == 212
    found = drawn(3000)
    assert 2900 < sum(map(len, found)) <= 3000
    assert [text for text in everything if text in found] == found
    assert found != drawn(3000, seed=2)
    # Whatever the pieces are, and how the draws are counted.
    for unit_bytes in (200, 700):
        assert drawn(3000, unit_bytes=unit_bytes) == found
    for buckets in (1, 4, 1 << 20):
        with monkeypatch.context() as patch:
            patch.setattr(selection, "BUCKETS", buckets)
            for limit in (60, 3000, 5000):
                assert drawn(limit) == drawn(limit, unit_bytes=900)
            assert drawn(3000) == found
    # More room gives more, and loses nothing.
    before = []
    for limit in range(50, 7000, 500):
        now = drawn(limit)
        assert all(now.count(text) >= before.count(text) for text in before)
        assert sum(map(len, now)) <= limit
        before = now
    with pytest.raises(UserError, match=r"--max-bytes=2 has no room .*, of \d+ bytes; raise it"):
        drawn(2)


def test_a_limit_may_part_copies_and_is_kept(tmp_path):
    """They are drawn at the same time, and come in the order of the corpus."""
    for name in ("a", "b"):
        write_lines(tmp_path / f"{name}.jsonl", ["0123456789"] * 3)
    for unit_bytes in (1, 1 << 20):
        request = small_request(f"{tmp_path}/*.jsonl", max_bytes=45, unit_bytes=unit_bytes)
        assert texts_of(tmp_path / "units", request) == ["0123456789"] * 4
        [*_, first] = find_units(request)
        assert first.pieces[-1].path == "b.jsonl"
    request = dataclasses.replace(request, deduplicate=True)
    assert texts_of(tmp_path / "units", request) == ["0123456789"]


def test_sets_of_their_own_are_not_limited(many, tmp_path):
    write_lines(tmp_path / "held.jsonl", ["y" * 500, "z" * 500])
    request = small_request(many, max_bytes=400, held_outs=(f"mine={tmp_path}/held.jsonl",))
    found = chosen(tmp_path / "units", request)
    assert [text[0] for name, text in found if name == "mine"] == ["y", "z"]
    assert 300 < sum(len(text) for name, text in found if not name) <= 400


def manifest_of(output, *sources, **changes):
    return prepare(small_request(*sources, **changes), output)


def texts_in(folder, split):
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(folder / "documents").as_data_source(split=split)
    return sorted(example["text"].decode() for example in source)


def test_several_named_sets_and_no_copy_of_them_in_training(many, tmp_path):
    write_lines(tmp_path / "a.jsonl", ["held a", "both"])
    write_lines(tmp_path / "b.jsonl", ["held b"])
    write_lines(tmp_path / "more.jsonl", ["held a", "held b", "not held", "not held"])
    manifest = manifest_of(
        tmp_path / "data",
        many,
        tmp_path / "more.jsonl",
        deduplicate=True,
        keep_documents=True,
        held_outs=tuple(f"{n}={tmp_path}/{f}.jsonl" for n, f in (("x", "a"), ("y", "b"))),
    )
    assert manifest == read_manifest(tmp_path / "data")
    assert [(named.name, named.split.documents) for named in manifest.held_out] == [
        ("x", 2),
        ("y", 1),
    ]
    assert texts_in(tmp_path / "data", "x") == ["both", "held a"]
    rest = texts_in(tmp_path / "data", "train") + texts_in(tmp_path / "data", "validation")
    assert len(rest) == len(set(rest)) == 201
    assert "not held" in rest and not {"held a", "held b"} & set(rest)
    assert manifest.duplicates == 12 + 3


def test_the_same_documents_are_held_out_whatever_else_there_is(many, tmp_path):
    """A document's own hash decides, and copies of it go the same way."""
    manifest_of(tmp_path / "whole", many, keep_documents=True)
    held = set(texts_in(tmp_path / "whole", "validation"))
    trained = set(texts_in(tmp_path / "whole", "train"))
    assert held and not held & trained
    manifest_of(tmp_path / "cut", many, keep_documents=True, unit_bytes=300)
    assert set(texts_in(tmp_path / "cut", "validation")) == held
    write_lines(tmp_path / "other.jsonl", [f"other {n}" for n in range(50)])
    manifest_of(
        tmp_path / "more", tmp_path / "other.jsonl", many / "1.jsonl", many / "3.jsonl",
        keep_documents=True,
    )  # fmt: skip
    there = {
        json.loads(line)["text"]
        for name in ("1", "3")
        for line in (many / f"{name}.jsonl").read_text().splitlines()
    }
    now = set(texts_in(tmp_path / "more", "validation"))
    assert now & there == held & there
    assert now - there


def test_left_out_documents_are_told_from_others_by_a_unit_s_key(many, tmp_path):
    """What is drawn decides what a unit gives, so units of another draw are not taken for it."""
    limits = (3000, 1 << 20)
    first, second = (manifest_of(tmp_path / str(limit), many, max_bytes=limit) for limit in limits)
    assert first.train.documents < second.train.documents == 212 - second.validation.documents
    assert second.duplicates == 0 and first.duplicates > 0
