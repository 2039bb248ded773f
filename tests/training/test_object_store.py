"""Runs whose folder is on an object store: a real server of S3, on this machine."""

import importlib
import json
import logging
import os
import signal

import fsspec
import jax
import numpy as np
import pytest

from layerskip_jax import load
from layerskip_jax.cli import main
from layerskip_jax.distributed.processes import RESTART_EXIT_CODE
from layerskip_jax.run_folder.claim import opened_workdir
from layerskip_jax.run_folder.paths import open_run, read_json_lines
from layerskip_jax.training.checkpoint import Checkpoints
from layerskip_jax.training.guards import RollBack
from layerskip_jax.training.restore import load_run
from tests.stores import gs_store, s3_store

# Not the function of that name, which the package has.
train_module = importlib.import_module("layerskip_jax.training.train")


@pytest.fixture(scope="module")
def store():
    with s3_store() as address:
        yield address


def stopped_at(step, monkeypatch):
    """Sends SIGTERM to this process once the metrics of a step are written."""
    write = train_module.heartbeat

    def stop(folder, written):
        write(folder, written)
        if written == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train_module, "heartbeat", stop)


@pytest.fixture(scope="module")
def resumed(store, arguments):
    """The same run on the store, stopped in the middle; what went on had nothing local."""
    workdir = f"{store}/experiments/resumed"
    command = ["train", f"--workdir={workdir}", *arguments]
    with pytest.MonkeyPatch.context() as patch:
        stopped_at(6, patch)
        assert main(command) == RESTART_EXIT_CODE
    folder, _ = open_run(workdir)
    assert read_json_lines(folder.metrics_file)[-1]["step"] < 12
    assert main(command) == 0
    return workdir


def names(address):
    """What lies under an address, as paths relative to it."""
    filesystem, root = fsspec.core.url_to_fs(address)
    return sorted(name.removeprefix(f"{root}/") for name in filesystem.find(root))


def checksums(workdir, step=12):
    folder, _ = open_run(workdir)
    file = folder.checkpoints / str(step) / "record" / "metadata"
    return json.loads(file.read_text())["checksums"]


def records(workdir):
    keys = ("step", "loss", "exit_loss", "gradient_norm", "layers_run", "tokens", "batches")
    folder, _ = open_run(workdir)  # its local copies go with it
    lines = read_json_lines(folder.metrics_file)
    return [[line[key] for key in keys] for line in lines]


def test_a_stopped_run_goes_on_to_the_very_same_parameters(finished, resumed):
    ours, theirs = load_run(resumed), load_run(finished)
    assert ours.step == theirs.step == 12
    jax.tree.map(np.testing.assert_array_equal, ours.parameters, theirs.parameters)
    assert checksums(resumed) == checksums(finished)  # of the optimizer's arrays, too
    assert records(resumed) == records(finished)


def test_the_folder_on_the_store_holds_what_one_on_a_disk_holds(finished, resumed):
    on_disk = {p.relative_to(finished).parts[0] for p in finished.rglob("*") if p.is_file()}
    on_store = names(resumed)
    # The lock of a store goes with its holder, of a disk's the file stays.
    assert {name.split("/")[0] for name in on_store} == on_disk - {".lock"}
    steps = {name.split("/")[1] for name in on_store if name.startswith("checkpoints/")}
    assert steps == {"7", "10", "12"}
    assert len([name for name in on_store if name.startswith("tensorboard/")]) == 2
    read = fsspec.open(f"{resumed}/logs/process-0.jsonl", "r").open()
    with read as file:
        messages = [json.loads(line)["message"] for line in file]
    assert len([m for m in messages if m.startswith("compiled the train step")]) == 2
    assert "going on from the checkpoint of step 7" in messages
    with fsspec.open(f"{resumed}/logs/heartbeat-0.json") as file:
        assert json.load(file)["step"] == 12


@pytest.mark.slow
def test_the_verbs_read_the_run_and_write_beside_it(finished, resumed, tmp_path, capsys):
    figures = {}
    for name, workdir in (("store", resumed), ("disk", finished)):
        file = tmp_path / f"{name}.json"
        assert main(["evaluate", f"--workdir={workdir}", f"--json={file}"]) == 0
        assert main(["export", f"--workdir={workdir}", f"--output={tmp_path / name}"]) == 0
        figures[name] = json.loads(file.read_text())
    assert figures["store"] == figures["disk"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in figures]
    assert weights[0] == weights[1]

    imported = f"{resumed}-imported"
    source = [f"--source={tmp_path / 'store'}", "--dtype=float32"]
    assert main(["import", f"--workdir={imported}", *source]) == 0
    run, exported = load_run(imported), load_run(finished)
    assert run.step == 0
    jax.tree.map(np.testing.assert_array_equal, run.parameters, exported.parameters)
    assert main(["import", f"--workdir={imported}", *source]) == 2
    assert f"--workdir={imported} is not empty" in capsys.readouterr().err

    sweep = ["--exits=1", "--drafts=1", "--prompts=2", "--prompt-tokens=4", "--new-tokens=4"]
    assert main(["sweep", f"--workdir={resumed}", *sweep]) == 0
    assert {"speculation.json", "speculation.csv", "speculation.svg"} <= set(names(resumed))
    texts = [load(path).generate("Document", 8).texts for path in (resumed, finished)]
    assert texts[0] == texts[1]
    prompt = ["--prompt=Document", "--max-new-tokens=4", "--draft=best"]
    assert main(["generate", f"--workdir={resumed}", *prompt]) == 0

    capsys.readouterr()
    assert main(["report", f"--workdir={resumed}"]) == 0
    assert capsys.readouterr().out.startswith(f"{resumed}/report.html")
    with fsspec.open(f"{resumed}/report.html", "r") as file:
        page = file.read()
    assert "<title>resumed" in page and f"--workdir={resumed}" in page


@pytest.mark.slow
def test_a_run_on_the_store_starts_another_and_lends_its_tokenizer(
    resumed, store, arguments, tmp_path, prepared, capsys
):
    flags = [f"--config.init_from={resumed}", "--config.training.evaluate_every=1"]
    flags.append("--config.training.steps=1")
    workdir = f"{store}/second"
    assert main(["train", f"--workdir={workdir}", *arguments, *flags]) == 0
    first, second = (open_run(path)[0] for path in (resumed, workdir))
    # Before its first step the new run is scored as the old one was after its last.
    before = read_json_lines(first.evaluations_file)[-1]
    assert read_json_lines(second.evaluations_file)[0]["exits"] == before["exits"]
    texts = prepared.parent / "texts"
    options = [f"--source={texts}", "--sequence-length=12", f"--output={tmp_path / 'data'}"]
    for tokenizer in (resumed, f"{resumed}/tokenizer.json"):
        assert main(["prepare", *options, f"--tokenizer={tokenizer}"]) == 0


def test_what_must_stay_is_refused_and_stays(resumed, store, arguments, capsys):
    before = names(resumed)
    other = ["--config.optimizer.beta1=0.8"]
    assert main(["train", f"--workdir={resumed}", *arguments, *other]) == 2
    error = capsys.readouterr().err
    assert f"--workdir={resumed} holds a run with another config" in error
    assert "config.optimizer.beta1: 0.9 -> 0.8" in error
    assert names(resumed) == before

    with fsspec.open(f"{store}/papers/thesis.tex", "w") as file:
        file.write("precious")
    assert main(["train", f"--workdir={store}/papers", *arguments]) == 2
    assert "is not empty and holds no run (it has thesis.tex)" in capsys.readouterr().err
    assert names(f"{store}/papers") == ["thesis.tex"]


def test_a_bucket_that_is_not_there_is_named(store, arguments, capsys):
    assert main(["train", "--workdir=s3://nowhere/run", *arguments]) == 2
    error = capsys.readouterr().err
    assert "s3://nowhere/run/.lock cannot be read or written" in error
    assert "bucket does not exist" in error


# Reads that orbax leaves under way when one of them fails end after its event loop.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_moved_aside_whole(finished, store, arguments, caplog):
    workdir = f"{store}/damaged"
    command = ["train", f"--workdir={workdir}", *arguments]
    assert main(command) == 0
    filesystem, root = fsspec.core.url_to_fs(f"{workdir}/checkpoints/12")
    objects = filesystem.find(root)
    for name in objects:
        if "/d/" in name:
            filesystem.pipe_file(name, bytes(filesystem.info(name)["size"]))
    with caplog.at_level(logging.INFO, logger="layerskip_jax"):
        assert main(command) == 0
    assert "the checkpoint of step 12 is damaged" in caplog.text
    assert "going on from the checkpoint of step 10" in caplog.text
    aside = [name.split("/", 1)[1] for name in names(f"{workdir}/checkpoints_damaged")]
    assert aside == sorted(name.removeprefix(f"{root}/") for name in objects)
    assert checksums(workdir) == checksums(finished)


def test_a_checkpoint_half_saved_does_not_count(resumed, store):
    """One is whole when it holds the file that says so, which orbax writes last."""
    filesystem, root = fsspec.core.url_to_fs(f"{store}/half")
    filesystem.copy(resumed, root, recursive=True)
    folder, _ = open_run(f"{store}/half")
    assert Checkpoints(folder.checkpoints).latest_step == 12
    filesystem.rm_file(f"{root}/checkpoints/12/commit_success.txt")
    assert Checkpoints(folder.checkpoints).latest_step == 10


def test_a_roll_back_is_on_the_store_before_the_run_ends(resumed, store):
    filesystem, root = fsspec.core.url_to_fs(f"{store}/rolled")
    filesystem.copy(resumed, root, recursive=True)
    with opened_workdir(f"{store}/rolled") as folder:
        checkpoints = Checkpoints(folder.checkpoints, keep=3)
        checkpoints.close()
        bad = RollBack(9, 10)
        assert train_module._roll_back(folder, checkpoints, bad) == RESTART_EXIT_CODE
        assert "skipped_batches.json" in names(f"{store}/rolled")
    folder, _ = open_run(f"{store}/rolled")
    assert folder.skips() == [(8, 2)]
    assert Checkpoints(folder.checkpoints).latest_step == 7
    assert {name.split("-")[0] for name in names(f"{folder.home}/checkpoints_rolled_back")} == {
        "10", "12",
    }  # fmt: skip


def test_on_google_cloud_storage_a_stopped_run_goes_on_as_well(finished, arguments, monkeypatch):
    with gs_store() as address:
        workdir = f"{address}/experiments/run"
        command = ["train", f"--workdir={workdir}", *arguments]
        with monkeypatch.context() as patch:
            stopped_at(6, patch)
            assert main(command) == RESTART_EXIT_CODE
        assert main(command) == 0
        assert checksums(workdir) == checksums(finished)
        assert records(workdir) == records(finished)
        ours, theirs = load_run(workdir), load_run(finished)
        jax.tree.map(np.testing.assert_array_equal, ours.parameters, theirs.parameters)


@pytest.mark.slow
def test_a_trace_of_the_device_arrives(store, arguments):
    flags = ["--config.training.steps=3", "--config.training.profile_step=2"]
    assert main(["train", f"--workdir={store}/traced", *arguments, *flags]) == 0
    traces = [name for name in names(f"{store}/traced") if name.endswith(".xplane.pb")]
    assert [name.split("/")[:2] for name in traces] == [["profiles", "step-2"]]
