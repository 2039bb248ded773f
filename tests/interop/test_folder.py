"""Writing the folder: sharding, casting, refusing, and failing half-way."""

import dataclasses
import json
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from layerskip_jax.interop.folder import check_output, check_tokenizer, write_folder
from layerskip_jax.interop.huggingface import tensor_shapes, to_hugging_face
from layerskip_jax.schema import UserError
from tests.interop.helpers import CONFIG, END, random_parameters


@pytest.fixture
def write(tokenizer_file):
    """Returns `write(folder, seed=0, **changes)`, which exports random weights."""

    def call(folder, seed=0, tensors=None, **changes):
        _, parameters = random_parameters(CONFIG, seed)
        options = {
            "config": CONFIG,
            "tokenizer_file": tokenizer_file,
            "end_token": END,
            "end_token_id": 0,
            "model_card": "card",
            "provenance": {"seed": seed},
            **changes,
        }
        tensors = to_hugging_face(parameters, CONFIG) if tensors is None else tensors
        return write_folder(folder, tensors, **options)

    return call


def read_tensors(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as shard:
            assert shard.metadata() == {"format": "pt"}
            tensors.update({name: shard.get_tensor(name) for name in shard.keys()})
    return tensors


def expected_tensors(seed=0):
    return dict(to_hugging_face(random_parameters(CONFIG, seed)[1], CONFIG))


def tree(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@contextmanager
def largest_file(size):
    """Lets the system refuse to write files beyond `size` bytes, as a full disk would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tensors_are_the_cast_parameters(tmp_path, write, dtype):
    counts = write(tmp_path / "out", dtype=dtype)
    tensors = read_tensors(tmp_path / "out")
    assert set(tensors) == set(tensor_shapes(CONFIG))
    for name, value in expected_tensors().items():
        cast = np.asarray(jnp.asarray(value).astype(dtype))
        assert tensors[name].tobytes() == cast.tobytes() and tensors[name].dtype == cast.dtype
    assert counts["bytes"] == sum(t.nbytes for t in tensors.values())
    assert counts["parameters"] == sum(t.size for t in tensors.values())


def test_one_file_needs_no_index(tmp_path, write):
    assert write(tmp_path / "out")["shards"] == 1
    assert sorted(os.listdir(tmp_path / "out")) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert os.listdir(tmp_path) == ["out"]


def test_files_have_the_rights_of_new_files(tmp_path, write):
    write(tmp_path / "out")
    (tmp_path / "new").touch()
    rights = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert rights == {(tmp_path / "new").stat().st_mode}


def test_shards_are_bounded_and_the_index_names_the_right_ones(tmp_path, write):
    limit = 10_000  # the embedding alone is larger, and gets a file of its own
    counts = write(tmp_path / "out", max_shard_bytes=limit)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert counts["shards"] == len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    assert set(index["weight_map"]) == set(tensor_shapes(CONFIG))
    assert index["metadata"]["total_size"] == counts["bytes"]
    for file in files:
        with safe_open(tmp_path / "out" / file, framework="np") as shard:
            names = list(shard.keys())
            sizes = [shard.get_tensor(name).nbytes for name in names]
        assert {index["weight_map"][name] for name in names} == {file}
        assert sum(sizes) <= limit or len(sizes) == 1


def test_tensors_are_taken_one_at_a_time(tmp_path, write):
    taken = []

    def watched():
        for name, tensor in expected_tensors().items():
            (stage,) = tmp_path.iterdir()
            assert not (stage / "config.json").exists()  # killed here, it would not load
            files = sorted(stage.glob("*.safetensors"))
            taken.append((name, len(files), sum(file.stat().st_size for file in files)))
            yield name, tensor

    write(tmp_path / "out", tensors=watched(), max_shard_bytes=10_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for name, files, _ in taken:
        assert int(index["weight_map"][name].split("-")[1]) == files
    written = [size for _, _, size in taken]
    assert written == sorted(written) and len(set(written)) > len(set(index["weight_map"].values()))


def test_a_disk_that_fails_half_way_leaves_nothing(tmp_path, write):
    with largest_file(20_000), pytest.raises(UserError, match=r"cannot write .*out.*too large"):
        write(tmp_path / "out", max_shard_bytes=10_000)
    assert os.listdir(tmp_path) == []


def test_a_crash_between_shards_leaves_nothing(tmp_path, write):
    def failing():
        yield from list(expected_tensors().items())[:9]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", tensors=failing(), max_shard_bytes=10_000)
    assert os.listdir(tmp_path) == []


def test_a_missing_tensor_is_not_overlooked(tmp_path, write):
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        write(tmp_path / "out", tensors=list(expected_tensors().items())[:-1])
    assert os.listdir(tmp_path) == []


def test_an_export_is_replaced_only_when_told_to(tmp_path, write):
    write(tmp_path / "out", max_shard_bytes=10_000)
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"holds an export already.*--overwrite"):
        write(tmp_path / "out", seed=1)
    assert tree(tmp_path) == before
    write(tmp_path / "out", seed=1, overwrite=True)
    tensors = read_tensors(tmp_path / "out")
    for name, value in expected_tensors(seed=1).items():
        np.testing.assert_array_equal(tensors[name], value)
    assert os.listdir(tmp_path) == ["out"]
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1


def test_a_failed_overwrite_keeps_the_old_export(tmp_path, write):
    write(tmp_path / "out")
    before = tree(tmp_path)
    with largest_file(20_000), pytest.raises(UserError, match="too large"):
        write(tmp_path / "out", seed=1, overwrite=True)
    assert tree(tmp_path) == before


def test_a_failed_swap_puts_the_old_export_back(tmp_path, write, monkeypatch):
    write(tmp_path / "out")
    before = tree(tmp_path)
    rename = os.rename

    def refuse_the_new(source, target):
        if "partial" in str(source):
            raise OSError(30, "Read-only file system")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse_the_new)
    with pytest.raises(UserError, match=r"cannot write .*out.*Read-only"):
        write(tmp_path / "out", seed=1, overwrite=True)
    assert tree(tmp_path) == before


def test_files_put_there_during_the_export_are_kept(tmp_path, write):
    write(tmp_path / "out")

    def interrupted():
        (tmp_path / "out" / "notes.txt").write_text("mine")
        yield from expected_tensors().items()

    with pytest.raises(UserError, match=r"notes\.txt"):
        write(tmp_path / "out", tensors=interrupted(), overwrite=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name, text", [("thesis.tex", "x"), ("config.json", "{}")])
def test_what_is_no_export_is_never_replaced(tmp_path, write, name, text, overwrite):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="did not write"):
        write(tmp_path, overwrite=overwrite)
    assert (tmp_path / name).read_text() == text


def test_an_empty_folder_is_filled(tmp_path, write):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_link_keeps_pointing_at_the_folder(tmp_path, write):
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "out" / "config.json").is_file()


@pytest.mark.parametrize("output", ["file", "file/out"])
def test_a_file_in_the_way_is_an_error(tmp_path, write, output):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"{output}.*Not a directory"):
        write(tmp_path / output)


def test_a_parent_that_cannot_be_written_is_an_error(write):
    # /proc takes no new folders, whoever asks; permission bits do not bind root.
    with pytest.raises(UserError, match=r"cannot write /proc/out: .*'/proc/"):
        write(Path("/proc/out"))


@pytest.mark.parametrize("value, dtype", [(1e5, "float16"), (np.nan, "float32")])
def test_values_that_are_not_finite_are_refused(tmp_path, write, value, dtype):
    tensors = expected_tensors()
    tensors["model.norm.weight"] = np.full(32, value, np.float32)
    with pytest.raises(UserError, match=rf"model\.norm\.weight.*not finite in {dtype}"):
        write(tmp_path / "out", tensors=tensors.items(), dtype=dtype)
    assert os.listdir(tmp_path) == []


def test_a_tokenizer_larger_than_the_embedding_is_an_error(tokenizer_file):
    config = dataclasses.replace(CONFIG, vocab_size=289)
    with pytest.raises(UserError, match=r"larger than the model.*id 289.*289 rows"):
        check_tokenizer(tokenizer_file, config, END, 0)


def test_a_smaller_tokenizer_fits(tokenizer_file):
    check_tokenizer(tokenizer_file, dataclasses.replace(CONFIG, vocab_size=290), END, 0)


@pytest.mark.parametrize("end_token, end_token_id", [(END, 1), ("<eos>", 0)])
def test_another_end_token_is_an_error(tokenizer_file, end_token, end_token_id):
    with pytest.raises(UserError, match=f"end token '{end_token.replace('|', '.')}'"):
        check_tokenizer(tokenizer_file, CONFIG, end_token, end_token_id)


def test_a_broken_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read the tokenizer .*tokenizer\.json"):
        check_tokenizer(tmp_path / "tokenizer.json", CONFIG, END, 0)


def test_a_config_that_is_no_object_is_no_export(tmp_path):
    (tmp_path / "config.json").write_text("3")
    with pytest.raises(UserError, match="from elsewhere"):
        check_output(tmp_path, overwrite=True)
