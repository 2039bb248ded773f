import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tokenizers import processors

from layerskip_jax import cli
from layerskip_jax.commands import prepare as command
from layerskip_jax.data import prepare as preparing
from layerskip_jax.data import units
from layerskip_jax.data.batches import BatchSource
from layerskip_jax.data.manifest import read_manifest
from layerskip_jax.data.prepare import prepare
from layerskip_jax.data.text import begin_tokens, encode_prompt
from layerskip_jax.data.tokenizer import (
    file_sha256,
    load_tokenizer,
)
from layerskip_jax.schema import ConfigError, UserError
from tests.data.conftest import DOCUMENTS, small_request

CORPUS = "documents"


def read_corpus(folder, split):
    source = tfds.builder_from_directory(folder / CORPUS).as_data_source(split=split)
    return {example["path"].decode(): example["text"].decode() for example in source}


def kept(*sources, **changes):
    """What the prepared folder was asked for, or much the same."""
    return small_request(*sources, keep_documents=True, **changes)


@pytest.fixture
def copy(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "data")


def test_the_documents_can_be_read_as_a_tfds_data_set(prepared, corpus_folder):
    train, validation = (read_corpus(prepared, split) for split in ("train", "validation"))
    assert not train.keys() & validation.keys()
    everything = train | validation
    assert len(everything) == DOCUMENTS
    for path, text in everything.items():
        assert (corpus_folder / path).read_text() == text


def test_the_manifest_has_the_largest_token(prepared):
    tokenizer = load_tokenizer(prepared / "tokenizer.json")
    texts = [t for split in ("train", "validation") for t in read_corpus(prepared, split).values()]
    ids = {number for encoding in tokenizer.encode_batch(texts) for number in encoding.ids}
    assert read_manifest(prepared).largest_token == max(ids)


def test_the_windows_decode_to_the_documents(prepared):
    manifest = read_manifest(prepared)
    tokenizer = load_tokenizer(prepared / "tokenizer.json")
    source = BatchSource(prepared, "train", batch_size=1, seed=0, shuffle=False)
    stream = [int(source.batch(0).tokens[0, 0])]
    for step in range(source.num_windows):
        batch = source.batch(step)
        # Padding follows what is read, and shows in the segment after the last end token.
        stream += batch.targets[0].tolist()
    stream = stream[: manifest.train.tokens]
    documents, document = [], []
    for token in stream:
        if token == manifest.end_token_id:
            documents.append(tokenizer.decode(document))
            document = []
        else:
            document.append(token)
    assert sorted(documents) == sorted(read_corpus(prepared, "train").values())


def test_counts_and_entropy(prepared):
    manifest = read_manifest(prepared)
    for name in ("train", "validation"):
        split, texts = manifest.split(name), read_corpus(prepared, name).values()
        assert split.documents == len(texts)
        assert split.bytes == sum(len(text.encode()) for text in texts)
        assert split.windows == -(-(split.tokens - 1) // 16)
        assert split.bytes_per_token == split.bytes / split.tokens
    tokenizer = load_tokenizer(prepared / "tokenizer.json")
    tokens = [
        token
        for text in read_corpus(prepared, "validation").values()
        for token in [*tokenizer.encode(text).ids, manifest.end_token_id]
    ]
    assert len(tokens) == manifest.validation.tokens
    p = np.unique(tokens, return_counts=True)[1] / len(tokens)
    assert manifest.unigram_entropy_nats == pytest.approx(-(p * np.log(p)).sum())


def test_equal_requests_give_equal_data(prepared, corpus_folder, tmp_path):
    again = prepare(small_request(corpus_folder, keep_documents=True), tmp_path / "again")
    assert again == read_manifest(prepared)
    assert not list(tmp_path.glob(".*"))
    moved = shutil.copytree(corpus_folder, tmp_path / "moved")
    from_there = prepare(small_request(moved), tmp_path / "there")
    assert from_there.fingerprint == again.fingerprint
    other = prepare(small_request(corpus_folder, seed=1), tmp_path / "other")
    assert other.fingerprint != again.fingerprint


def test_shards_are_cut_and_read_as_one(prepared, corpus_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(units, "SHARD_BYTES", 5 * 2 * 17 * 4)
    manifest = prepare(small_request(corpus_folder), tmp_path / "data")
    assert len(manifest.train.shards) == -(-manifest.train.windows // 5)
    assert {shard.windows for shard in manifest.train.shards[:-1]} == {5}
    for step in (0, 7):
        a, b = (
            BatchSource(folder, "train", batch_size=8, seed=0).batch(step)
            for folder in (prepared, tmp_path / "data")
        )
        np.testing.assert_array_equal(a.tokens, b.tokens)


def test_prepared_already_is_left_alone(copy, corpus_folder, monkeypatch):
    def never(*_):
        raise AssertionError("prepared again")

    monkeypatch.setattr(preparing, "find_units", never)
    assert prepare(kept(corpus_folder), copy) == read_manifest(copy)
    with pytest.raises(UserError, match="sequence_length 16 there, 8 asked for.*--overwrite"):
        prepare(kept(corpus_folder, sequence_length=8), copy)


def test_overwrite_replaces(copy, corpus_folder):
    manifest = prepare(kept(corpus_folder, sequence_length=8), copy, overwrite=True)
    assert read_manifest(copy) == manifest
    assert manifest.sequence_length == 8
    # Also what this version cannot read.
    (copy / "manifest.json").write_text('{"format": 0}')
    prepare(small_request(corpus_folder), copy, overwrite=True)
    assert [path.name for path in copy.parent.iterdir()] == ["data"]


def fail_while_packing(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("error", [OSError, RuntimeError])
def test_a_full_disk_leaves_nothing(corpus_folder, tmp_path, monkeypatch, error):
    def full(*_):
        raise error("write() failed: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(units, "write_shards", full)
        with pytest.raises(UserError, match="data: .*No space left on device"):
            prepare(small_request(corpus_folder), tmp_path / "data")
    assert list(tmp_path.iterdir()) == []
    prepare(small_request(corpus_folder), tmp_path / "data")


def test_a_failed_overwrite_keeps_what_is_there(copy, corpus_folder, monkeypatch):
    before = read_manifest(copy)
    monkeypatch.setattr(units, "write_shards", fail_while_packing)
    with pytest.raises(UserError):
        prepare(small_request(corpus_folder, seed=1), copy, overwrite=True)
    assert read_manifest(copy) == before


KILLED = """
import os, signal, sys
from pathlib import Path
from layerskip_jax.data import manifest
from layerskip_jax.data import prepare as preparing
from tests.data.conftest import small_request
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
manifest.fingerprint = die
preparing.prepare(small_request(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_killed_run_leaves_nothing_that_looks_finished(corpus_folder, tmp_path):
    output = tmp_path / "data"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(corpus_folder), str(output)],
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert not output.exists()
    left = {path.name.split("-")[0]: path for path in tmp_path.iterdir()}
    assert left.keys() == {".data.units", ".data.partial"}
    assert (left[".data.partial"] / "validation-00000.array_record").exists()
    assert not (left[".data.partial"] / "manifest.json").exists()
    prepare(small_request(corpus_folder), output)
    assert list(tmp_path.iterdir()) == [output]


def test_a_folder_of_something_else_is_not_touched(corpus_folder, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is no prepared data; take another folder"):
            prepare(small_request(corpus_folder), tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="is no prepared data"):
        prepare(small_request(corpus_folder), tmp_path / "mine.txt")


def test_a_read_only_place_is_named(corpus_folder, tmp_path):
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("root writes everywhere")
    with pytest.raises(UserError, match="data"):
        prepare(small_request(corpus_folder), tmp_path / "data")


def test_a_tfds_data_set_on_disk_as_source(prepared, tmp_path):
    source = f"tfds:{prepared / CORPUS}:train"
    # By the same seed these would all be trained on once more.
    manifest = prepare(kept(source, seed=1), tmp_path / "data")
    both = [read_corpus(tmp_path / "data", split) for split in ("train", "validation")]
    texts = [text for split in both for text in split.values()]
    assert sorted(texts) == sorted(read_corpus(prepared, "train").values())
    assert manifest.train.documents + manifest.validation.documents == len(texts)
    with pytest.raises(UserError, match="no text in a field 'body'; its fields are path, text"):
        prepare(small_request(source, text_field="body"), tmp_path / "other")
    with pytest.raises(UserError, match="the split 'test'"):
        prepare(small_request(f"tfds:{prepared / CORPUS}:test"), tmp_path / "other")


def test_a_tfds_data_set_is_found_by_name(prepared, tmp_path, monkeypatch):
    # Otherwise set with TFDS_DATA_DIR, which is read once, at import.
    version = tmp_path / "tfds" / "documents" / "1.0.0"
    shutil.copytree(prepared / CORPUS, version)
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "tfds"))
    manifest = prepare(small_request("tfds:documents:train[:20]", seed=1), tmp_path / "data")
    documents = manifest.train.documents + manifest.validation.documents
    assert documents == 20


def test_documents_begin_as_the_tokenizer_begins_a_text(prepared, corpus_folder, tmp_path):
    tokenizer = load_tokenizer(prepared / "tokenizer.json")
    tokenizer.add_special_tokens(["<s>", "</s>"])
    begin = tokenizer.token_to_id("<s>")
    ids = [("<s>", begin), ("</s>", begin + 1)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ids
    )
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    assert begin_tokens(load_tokenizer(file)) == [begin]
    request = small_request(
        corpus_folder, vocab_size=0, tokenizer_sha256=file_sha256(file), end_token="</s>"
    )
    found = prepare(request, tmp_path / "data", tokenizer_file=file)
    plain = read_manifest(prepared)
    assert found.train.tokens == plain.train.tokens + plain.train.documents
    batch = BatchSource(tmp_path / "data", "train", batch_size=1, seed=0, shuffle=False).batch(0)
    starts = np.diff(batch.segment_ids[0], prepend=0) > 0
    assert (batch.tokens[0][starts] == begin).all()
    assert (batch.tokens[0] == begin).sum() == starts.sum()
    assert encode_prompt(tokenizer, "") == [begin]


def test_an_existing_tokenizer(prepared, corpus_folder, tmp_path):
    file = prepared / "tokenizer.json"
    request = small_request(corpus_folder, vocab_size=0, tokenizer_sha256=file_sha256(file))
    manifest = prepare(request, tmp_path / "data", tokenizer_file=file)
    assert manifest.tokenizer_sha256 == file_sha256(file)
    assert manifest.fingerprint == read_manifest(prepared).fingerprint
    with pytest.raises(UserError, match="no end token <stop>"):
        prepare(
            dataclasses.replace(request, end_token="<stop>"),
            tmp_path / "other",
            tokenizer_file=file,
        )


def test_corpora_that_are_too_small(tmp_path):
    (tmp_path / "one.txt").write_text("a single document")
    with pytest.raises(UserError, match=r"none of 1 document\(s\) fell into the"):
        prepare(small_request(tmp_path / "one.txt"), tmp_path / "data")
    (tmp_path / "one.txt").write_text(" \n")
    with pytest.raises(UserError, match="every document is blank"):
        prepare(small_request(tmp_path / "one.txt"), tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["one.txt"]


def test_a_bad_file_in_the_middle_is_reported_as_it_is(corpus_folder, tmp_path):
    texts = shutil.copytree(corpus_folder, tmp_path / "texts")
    (texts / "zz.txt").write_bytes(b"ab\xff")
    with pytest.raises(UserError, match=r"^\S+zz.txt is not UTF-8 text"):
        prepare(small_request(texts), tmp_path / "data")
    manifest = prepare(small_request(texts, skip_bad_files=True), tmp_path / "data")
    assert manifest.skipped_files == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 1}, "--sequence-length=1 must be at least 2"),
        ({"validation_fraction": 1.0}, "--validation-fraction=1.0 must be between 0 and 1"),
        ({"vocab_size": 200}, "--vocab-size=200 is too small"),
        ({"max_bytes": -1}, "--max-bytes=-1 must not be negative"),
    ],
)
def test_requests_that_cannot_work(changes, message):
    with pytest.raises(ConfigError, match=message):
        small_request("stdlib", **changes)


NEW_SETTINGS = (
    "min_characters", "max_characters", "requires", "deduplicate", "held_outs",
    "max_document_bytes", "tokenizer_bytes", "unit_bytes", "keep_documents",
)  # fmt: skip


def break_manifest(folder, **changes):
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_manifests_from_before_completions_are_read(copy):
    before, file = read_manifest(copy), copy / "manifest.json"
    values = json.loads(file.read_text())
    for field in ("prompt_field", "completion_field", "messages_field", "chat_template_sha256"):
        assert values["request"].pop(field) == ""
    for field in NEW_SETTINGS:
        del values["request"][field]
    for split in ("train", "validation"):
        assert (values[split].pop("over_long"), values[split].pop("targets")) == (0, -1)
    for field in ("held_out", "filtered", "duplicates", "failed_units"):
        assert not values.pop(field)
    file.write_text(json.dumps(values))
    request = dataclasses.replace(before.request, keep_documents=False)
    assert read_manifest(copy) == dataclasses.replace(before, request=request)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "holds no prepared data.*run `layerskip prepare"),
        (lambda f: break_manifest(f, format=99), "has format 99, and this version reads 1"),
        (lambda f: break_manifest(f, train=3), "is damaged.*prepare the data again"),
        (lambda f: (f / "manifest.json").write_text("{"), "is damaged"),
        (lambda f: (f / "manifest.json").write_text("[]"), "is damaged"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), r"44136fa355b3\) is not the tok"),
        (lambda f: (f / "tokenizer.json").unlink(), r"sha256 none\) is not the tokenizer"),
        (lambda f: (f / "train-00000.array_record").unlink(), "train-00000.* is missing"),
        (lambda f: (f / "train-00000.array_record").write_bytes(b"x"), "has 1 bytes, not the"),
    ],
)
def test_damaged_folders_are_named(copy, damage, message):
    damage(copy)
    with pytest.raises(UserError, match=message):
        read_manifest(copy)


def test_the_command(corpus_folder, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    arguments = [
        f"--source={corpus_folder}",
        f"--output={tmp_path / 'data'}",
        "--sequence-length=16",
        "--vocab-size=300",
        "--validation-fraction=0.2",
        f"--json={figures}",
    ]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "bytes a token" in printed
    values = json.loads(figures.read_text())
    assert values["train_documents"] + values["validation_documents"] == DOCUMENTS
    assert f"{values['train_tokens']:,}" in printed
    assert read_manifest(tmp_path / "data").request == small_request(corpus_folder)


def test_the_command_line_reports_bad_input_without_a_traceback(tmp_path, capsys):
    arguments = ["prepare", f"--source={tmp_path}/none", f"--output={tmp_path / 'data'}"]
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.endswith("there is no such file or folder\n")
