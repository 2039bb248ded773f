"""What goes wrong is called by its cause, and the remedy is one for that cause."""

import errno
import json
import os
import re
import shutil
import types
from pathlib import Path

import jax
import pytest
from etils import epath
from safetensors.numpy import save_file

from layerskip_jax.cli import main
from layerskip_jax.commands.arguments import prepared_data, write_figures
from layerskip_jax.config import RunConfig
from layerskip_jax.data.manifest import PrepareOptions, read_manifest
from layerskip_jax.data.prepare import find_units
from layerskip_jax.data.reading import DocumentReader
from layerskip_jax.interop import gguf, pretrained
from layerskip_jax.run_folder.atomic import remedy, staged_folder
from layerskip_jax.run_folder.object_store import Spool
from layerskip_jax.run_folder.paths import RunFolder, is_run, open_run, read_prompt, run_folder
from layerskip_jax.schema import ConfigError, UserError
from layerskip_jax.training.checkpoint import Checkpoints

FULL, FILES = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OSError(errno.EMFILE, "Too many")


def raiser(error):
    def function(*_, **__):
        raise error

    return function


@pytest.mark.parametrize(
    "error, words",
    [
        (FULL, "free some space"),
        (OSError(f"array_record: {os.strerror(errno.ENOSPC)}"), "free some space"),
        (FILES, "ulimit -n"),
        (PermissionError(errno.EACCES, "Permission denied"), "allow that"),
        (OSError(errno.ENAMETOOLONG, "long"), "a shorter name"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/source/a.txt"), ""),
    ],
)
def test_a_remedy_is_one_for_the_cause(error, words, tmp_path):
    assert words in remedy(error) and bool(words) == bool(remedy(error))
    with pytest.raises(UserError, match="cannot write .*/data: ") as raised:
        with staged_folder(tmp_path / "data", lambda folder: None):
            raise error
    assert str(error) in str(raised.value) and str(raised.value).endswith(remedy(error))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_one_whose_name_is_no_text(tmp_path, monkeypatch):
    """It is not named by an argument, so that no argument is refused."""
    inside = tmp_path / os.fsdecode(b"a\xff")
    inside.mkdir()
    monkeypatch.chdir(inside)
    for opens in (
        lambda: run_folder("run"),
        lambda: read_manifest("data"),
        lambda: pretrained.open_pretrained("model"),
        lambda: staged_folder(Path("data"), lambda folder: None).__enter__(),
    ):
        with pytest.raises(UserError, match=r"a\\xff.* has a name that is not UTF-8.*mv"):
            opens()
    assert list(inside.iterdir()) == []


def test_a_published_model_is_no_folder_to_train_in(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    assert main(["train", "--config=quickstart", f"--workdir={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert "holds another program's config.json, and no run; take a new folder, and start" in said
    assert f"--config.init_from={tmp_path}" in said
    with pytest.raises(ConfigError, match=r"another program's \(it has architectures\), so it"):
        RunConfig.of_run({"architectures": ["LlamaForCausalLM"]})
    with pytest.raises(UserError, match="another program's"):
        open_run(tmp_path)


def test_a_config_that_the_system_withholds_is_not_another_programs(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match="config.json cannot be read"):
        is_run(tmp_path)
    assert not is_run(tmp_path / "nowhere")
    assert not is_run(Path(__file__))


def test_data_that_was_moved_is_looked_for_where_data_says(tmp_path, capsys):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    config = RunConfig.from_dict({"data": {"path": "/moved"}})
    folder.config_file.write_text(json.dumps(config.to_dict()))
    with pytest.raises(UserError, match="data.json is missing; .* manifest.json of the data"):
        folder.data()
    folder.data_file.write_text("{}")
    with pytest.raises(UserError, match="damaged .it lacks end_token, end_token_id.;"):
        folder.data()
    folder.data_file.write_text("{")
    with pytest.raises(UserError, match="data.json is damaged"):
        folder.data()
    about = {"end_token": "</s>", "end_token_id": 1, "tokenizer_sha256": "0"}
    folder.data_file.write_text(json.dumps(about))
    assert main(["evaluate", f"--workdir={folder.path}"]) == 2
    assert "is not in /moved any more; name where it is now with --data" in capsys.readouterr().err
    with pytest.raises(UserError, match="--data=/other holds no prepared data .manifest.json is"):
        prepared_data("run", "/moved", "/other")
    with pytest.raises(UserError, match="run was trained on no data here; name prepared data with"):
        prepared_data("run", "", None)
    with pytest.raises(UserError, match=r"--config.data.path of `train`, --data of `evaluate`"):
        read_manifest("/moved")


NO_DAMAGE = [
    MemoryError("no room"),
    FILES,
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte"),
    ValueError(f"Error opening driver: {os.strerror(errno.EACCES)}"),
    ConnectionError("reset by peer"),
]


@pytest.mark.parametrize("error", [*NO_DAMAGE, ValueError("checksum mismatch")], ids=repr)
def test_only_damage_is_called_damage(tmp_path, error):
    checkpoints = object.__new__(Checkpoints)
    checkpoints._folder = tmp_path
    checkpoints._manager = types.SimpleNamespace(all_steps=lambda: [12])
    checkpoints.restore = raiser(error)
    (tmp_path / "12").mkdir()
    message = "step 12 in .* cannot be read .* need not be damaged, and nothing was moved"
    with pytest.raises(UserError, match=message if error in NO_DAMAGE else "are damaged:"):
        checkpoints.restore_newest({}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["12"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_named_to_who_reads_it(tmp_path):
    """By `evaluate` and `generate`, which read all, and `export`, which reads array by array."""
    array = jax.numpy.ones(8)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = {"a": jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=device)}
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(3, {"a": array}, None, force=True)
    checkpoints.close()
    reading = Checkpoints(tmp_path / "checkpoints")
    assert reading.restore_parameters(None, template)["a"].sum() == 8
    shutil.rmtree(tmp_path / "checkpoints" / "3" / "parameters")
    message = r"the checkpoint of step 3 in .* is damaged .*; put a copy back, or read another by"
    for read in (reading.restore_parameters, reading.open_parameters):
        with pytest.raises(UserError, match=message):
            read(3, template)


def test_a_failed_save_is_told_what_helps(tmp_path):
    checkpoints = object.__new__(Checkpoints)
    checkpoints._folder, checkpoints._failures = tmp_path, (OSError, ValueError, RuntimeError)
    for error, words in ((FULL, "free some space"), (ValueError(FULL.strerror), "free some space"),
                         (ValueError("dtype"), r"\(dtype\)\. The earlier")):  # fmt: skip
        with pytest.raises(UserError, match=words), checkpoints._named_failures():
            raise error


def test_a_full_disk_here_is_no_fault_of_the_store(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    spool = Spool(epath.Path(tmp_path))
    spool.fetch(["config.json", "data.json", "published/"])
    assert [path.name for path in spool.local.iterdir()] == ["config.json"]
    shutil.rmtree(spool.local)
    spool.local.touch()
    with pytest.raises(UserError, match="cannot be written .*free some space there, or set TMPDIR"):
        spool.fetch(["config.json"])
    spool.local.unlink()


def test_a_model_that_the_system_withholds_is_not_damaged(tmp_path, monkeypatch):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(gguf.gguf, "GGUFReader", raiser(PermissionError(errno.EACCES, "denied")))
    with pytest.raises(UserError, match=r"model.gguf cannot be read \(denied\)"):
        gguf.GGUF(file)
    save_file({}, tmp_path / "model.safetensors")
    monkeypatch.setattr(pretrained, "safe_open", raiser(FILES))
    with pytest.raises(UserError, match="safetensors cannot be read .*ulimit"):
        pretrained._open_safetensors(tmp_path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_that_the_system_withholds_is_no_bad_text(tmp_path, monkeypatch, name):
    """It is not left out as such, and trained without."""
    (tmp_path / name).write_text("{}")
    request = PrepareOptions(sources=(str(tmp_path),), skip_bad_files=True)
    [unit] = find_units(request)
    monkeypatch.setattr(Path, "read_bytes", raiser(FILES))
    monkeypatch.setattr(Path, "open", raiser(FILES))
    with pytest.raises(UserError, match=f"{name} cannot be read .Too many.*ulimit -n"):
        list(DocumentReader(request).read(list(unit.pieces)))


def test_figures_have_a_place_before_they_are_computed(tmp_path, monkeypatch, capsys):
    for option, words in (
        (f"{tmp_path}/none/a.json", "there is no folder .*/none; make it first"),
        (tmp_path, "is a folder; name a file"),
    ):
        for verb in ("evaluate", "sweep", "export", "generate"):
            assert main([verb, "--workdir=/nowhere", f"--json={option}"]) == 2
            assert re.search(words, capsys.readouterr().err)
    monkeypatch.setattr(os, "replace", raiser(FULL))
    with pytest.raises(UserError, match="a.json cannot be written .*; free some space"):
        write_figures(tmp_path / "a.json", {})
    assert list(tmp_path.iterdir()) == []


def test_a_text_is_named_by_the_option_that_gave_it(tmp_path):
    with pytest.raises(UserError, match="--text=.*/none cannot be read .No such file"):
        read_prompt(tmp_path / "none", "--text")
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="--prompt-file=.*a.txt is not UTF-8 text"):
        read_prompt(tmp_path / "a.txt")


def test_a_pipe_that_is_not_the_output_is_not_quiet(monkeypatch):
    monkeypatch.setattr("layerskip_jax.commands.settings.main", raiser(BrokenPipeError()))
    with pytest.raises(BrokenPipeError):
        main(["settings"])
