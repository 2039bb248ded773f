"""Whole runs: stopped and resumed, evaluated, refused. Real processes where one is stopped."""

import importlib
import importlib.util
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layerskip_jax.cli import main
from layerskip_jax.commands.evaluate import evaluate
from layerskip_jax.data.batches import BatchSource
from layerskip_jax.distributed.processes import RESTART_EXIT_CODE
from layerskip_jax.ops.checksum import checksum
from layerskip_jax.run_folder import lock
from layerskip_jax.run_folder.lock import locked
from layerskip_jax.run_folder.paths import RunFolder, read_json_lines
from layerskip_jax.schema import UserError
from layerskip_jax.training.flops import CostModel
from layerskip_jax.training.restore import load_run
from layerskip_jax.training.setup import TrainSetup
from tests.helpers import go_back

REPOSITORY = Path(__file__).parents[2]
# Not the function of that name, which the package has.
train_module = importlib.import_module("layerskip_jax.training.train")


def _command(workdir, arguments, *extra):
    """A run in a process of its own, on eight devices as the tests have."""
    start = (
        "import jax, sys; jax.config.update('jax_num_cpu_devices', 8); "
        "from layerskip_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    return [sys.executable, "-c", start, "train", f"--workdir={workdir}", *arguments, *extra]


def _parameters(workdir):
    return load_run(workdir).parameters


def _record(workdir, step=12):
    file = RunFolder(workdir).checkpoints / str(step) / "record" / "metadata"
    return json.loads(file.read_text())


def events(workdir):
    """What the event files of a run hold: a length, its checksum, an event and its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(RunFolder(workdir).tensorboard.iterdir()):
        content = file.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            yield Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def _assert_equal_runs(a, b):
    jax.tree.map(np.testing.assert_array_equal, _parameters(a), _parameters(b))
    # Of every array, the optimizer's too.
    assert _record(a)["checksums"] == _record(b)["checksums"]
    first, second = (read_json_lines(RunFolder(run).metrics_file) for run in (a, b))
    keys = ("step", "loss", "exit_loss", "gradient_norm", "layers_run", "tokens", "batches")
    assert [[r[k] for k in keys] for r in first] == [[r[k] for k in keys] for r in second]


def test_the_train_step_is_compiled_once_a_run(finished):
    records = json.loads((finished.parent / "compiled.json").read_text())
    steps = [r for r in records if "Finished XLA compilation" in r and "train_step" in r]
    assert len(steps) == 1, records


def test_a_run_leaves_what_it_should(finished):
    folder = RunFolder(finished)
    steps = [record["step"] for record in read_json_lines(folder.metrics_file)]
    assert steps == list(range(1, 13))
    assert sorted(int(p.name) for p in folder.checkpoints.iterdir()) == [5, 10, 12]
    assert list(folder.tensorboard.iterdir())
    (evaluation,) = read_json_lines(folder.evaluations_file)
    assert [e["layers"] for e in evaluation["exits"]] == [1, 2, 3, 4]
    assert load_run(finished).step == 12


def test_the_cost_is_logged_as_planned_and_as_done(finished, arguments, tmp_path, capsys):
    records = read_json_lines(RunFolder(finished).metrics_file)
    plain = CostModel(load_run(finished).config, 12).step(1.0, 0)
    for record in records:
        assert record["step_flops"] != record["step_flops_planned"] or record["layers_run"] == 1
        # one early exit a step (layer 0 has no weight) and the layers that ran
        expected = plain.exits * 2 + (plain.layers + plain.attention) * record["layers_run"]
        assert record["step_flops"] == pytest.approx(expected, rel=1e-6)
        assert "mfu" not in record  # no peak is known of a CPU
    flags = ["--config.training.steps=1", "--config.training.peak_tflops=0.5"]
    assert main(["train", f"--workdir={tmp_path / 'peak'}", *arguments, *flags]) == 0
    (record,) = read_json_lines(RunFolder(tmp_path / "peak").metrics_file)
    assert record["mfu"] == pytest.approx(record["flops_per_second"] / (8 * 0.5e12))
    assert "mfu" in capsys.readouterr().out


def test_a_run_older_than_a_setting_goes_on_with_its_default(finished, arguments, tmp_path):
    """A folder written before `z_loss` existed is the same run."""
    workdir = tmp_path / "older"
    shutil.copytree(finished, workdir)
    folder = RunFolder(workdir)
    config = json.loads(folder.config_file.read_text())
    del config["early_exit"]["z_loss"]
    folder.config_file.write_text(json.dumps(config))
    assert main(["train", f"--workdir={workdir}", *arguments]) == 0
    changed = [*arguments, "--config.early_exit.z_loss=1e-4"]
    assert main(["train", f"--workdir={workdir}", *changed]) == 2


def test_a_run_says_where_its_time_went_and_that_it_lives(finished):
    folder = RunFolder(finished)
    *_, last = read_json_lines(folder.metrics_file)
    assert {"start", "data", "checkpoint"} <= last["lost"].keys()
    assert 0 < last["goodput"] < 1
    assert json.loads((folder.logs / "heartbeat-0.json").read_text())["step"] == 12
    text = (folder.logs / "process-0.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert any("compiled the train step" in line["message"] for line in lines)
    assert {line["process"] for line in lines} == {0}


def test_a_trace_is_written_at_the_step_asked_for(arguments, tmp_path):
    flags = ["--config.training.steps=4", "--config.training.profile_step=2"]
    flags.append("--config.training.profile_steps=2")
    assert main(["train", f"--workdir={tmp_path / 'run'}", *arguments, *flags]) == 0
    (trace,) = RunFolder(tmp_path / "run").profiles.iterdir()
    assert trace.name == "step-2"
    assert list(trace.rglob("*.xplane.pb"))


def test_training_learns(finished):
    records = read_json_lines(RunFolder(finished).metrics_file)
    assert records[-1]["loss"] < records[0]["loss"] - 0.1


def test_the_same_command_again_does_nothing(finished, arguments, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    grows = ("tensorboard", "logs", ".lock")
    before = {
        p: p.stat().st_mtime_ns
        for p in workdir.rglob("*")
        if p.relative_to(workdir).parts[0] not in grows
    }
    assert main(["train", f"--workdir={workdir}", *arguments]) == 0
    files = {p: p.stat().st_mtime_ns for p in before if p.is_file() and p.suffix != ".json"}
    assert files == {p: before[p] for p in files}


# Over 20 s, as are the full disk and the read-only folder below: a process starts twice.
@pytest.mark.parametrize(
    "number, at",
    [(signal.SIGTERM, "step 6/12"), (signal.SIGKILL, "step 10/12  saving")],
    ids=["SIGTERM", "SIGKILL-in-a-save"],
)
def test_a_stopped_run_ends_with_the_very_same_parameters(
    finished, arguments, prepared, tmp_path, number, at
):
    """In front of an epoch's end and inside both schedules, with saves and reads under way."""
    epoch = BatchSource(prepared, "train", batch_size=24, seed=0).num_windows / 24
    assert 8 < epoch < 10 and epoch % 1, "the stops are meant to lie in front of the epoch's end"
    workdir = tmp_path / "run"
    command = _command(workdir, arguments)
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, stderr=subprocess.PIPE
    ) as process:
        for line in process.stdout:
            if line.startswith(at):
                process.send_signal(number)
                break
        _, errors = process.communicate(timeout=120)
    if number == signal.SIGTERM:
        assert process.returncode == RESTART_EXIT_CODE
        assert "stopped by SIGTERM after step" in errors
    else:
        assert process.returncode == -number
    resumed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on from the checkpoint of step" in resumed.stderr
    _assert_equal_runs(finished, workdir)


CONSTANT = (
    "--config.optimizer.schedule=constant", "--config.optimizer.warmup_steps=2",
    "--config.layer_dropout.time_schedule=constant",
    "--config.early_exit.curriculum=rotational", "--config.checkpoint.every_steps=3",
)  # fmt: skip


def test_a_run_that_knows_no_end_can_be_lengthened(arguments, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    whole, lengthened = tmp_path / "whole", tmp_path / "lengthened"
    flags = [*arguments, *CONSTANT]
    assert main(["train", f"--workdir={whole}", *flags, "--config.training.steps=6"]) == 0
    for steps in (4, 6):
        command = ["train", f"--workdir={lengthened}", *flags, f"--config.training.steps={steps}"]
        assert main(command) == 0
    assert caplog.text.count("of 4 steps, of which 4 are done, becomes one of 6") == 1
    ends = [load_run(workdir, 6).parameters for workdir in (whole, lengthened)]
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), *ends))
    first, second = (read_json_lines(RunFolder(w).metrics_file)[-1] for w in (whole, lengthened))
    assert first["batches"] == second["batches"]
    assert load_run(lengthened).config.training.steps == 6
    before = (lengthened / "config.json").read_bytes()
    assert main(["train", f"--workdir={lengthened}", *flags, "--config.training.steps=5"]) == 2
    assert "cannot become one of 5: 6 steps are done" in capsys.readouterr().err
    assert (lengthened / "config.json").read_bytes() == before


def test_a_branch_goes_on_with_the_state_and_the_batches_of_its_step(
    finished, arguments, tmp_path, capsys
):
    """The same settings from step 5 of 12 end in the same bits; the first run is not touched."""
    before = sorted((file, file.stat().st_mtime_ns) for file in finished.rglob("*"))
    branch = tmp_path / "branch"
    command = [
        "train", f"--workdir={branch}", *arguments, f"--config.init_from={finished}",
        "--config.init_step=5", "--config.init_state=all",
    ]  # fmt: skip
    assert main(command) == 0
    ends = [load_run(workdir, 12).parameters for workdir in (finished, branch)]
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), *ends))
    records = [
        {record["step"]: record["batches"] for record in read_json_lines(RunFolder(w).metrics_file)}
        for w in (finished, branch)
    ]
    assert min(records[1]) > 5 and records[0][12] == records[1][12]
    assert main(command) == 0  # done, from its own checkpoints
    assert sorted((file, file.stat().st_mtime_ns) for file in finished.rglob("*")) == before
    config = json.loads((branch / "config.json").read_text())
    assert (config["init_from"], config["init_step"]) == (str(finished), 5)
    assert main(["report", f"--workdir={branch}", f"--output={tmp_path / 'page.html'}"]) == 0
    assert f"branched from step 5 of {finished.name}" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--config.init_step=7"], "no checkpoint of step 7; it has [5, 10, 12]"),
        (["--config.init_step=12", "--config.init_state=all"], "init_step=12, to be in 1..11"),
        (
            ["--config.init_step=5", "--config.init_state=all", "--config.optimizer.name=muon"],
            "whose config.optimizer.name is 'adamw', not 'muon'",
        ),
    ],
)
def test_a_branch_that_cannot_be_is_refused(finished, arguments, tmp_path, capsys, flags, message):
    command = ["train", f"--workdir={tmp_path / 'no'}", *arguments]
    assert main([*command, f"--config.init_from={finished}", *flags]) == 2
    assert message in capsys.readouterr().err
    assert main([*command, "--config.init_step=5"]) == 2
    assert "say what to take of init_from, and that is empty" in capsys.readouterr().err


def test_a_run_whose_schedules_know_its_end_keeps_to_it(finished, arguments, capsys):
    """By name, and before anything is written."""
    before = (finished / "config.json").read_bytes()
    assert main(["train", f"--workdir={finished}", *arguments, "--config.training.steps=20"]) == 2
    said = capsys.readouterr().err
    assert "a run of 12 steps, of which 12 are done, cannot become one of 20" in said
    assert "config.optimizer.warmup_steps=100, by which step 1 was another" in said
    assert (finished / "config.json").read_bytes() == before


def test_a_run_by_muon_goes_on_bit_for_bit(arguments, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags = [
        *arguments, "--config.training.steps=4", "--config.checkpoint.every_steps=2",
        "--config.optimizer.name=muon",
    ]  # fmt: skip
    assert main(["train", f"--workdir={whole}", *flags]) == 0
    shutil.copytree(whole, resumed)
    shutil.rmtree(RunFolder(resumed).checkpoints / "4")
    assert main(["train", f"--workdir={resumed}", *flags]) == 0
    ends = [load_run(workdir, 4).parameters for workdir in (whole, resumed)]
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), *ends))


def test_evaluate_prints_every_exit(finished, tmp_path, capsys):
    file = tmp_path / "evaluation.json"
    assert main(["evaluate", f"--workdir={finished}", f"--json={file}"]) == 0
    printed = capsys.readouterr().out
    result = json.loads(file.read_text())
    (recorded,) = read_json_lines(RunFolder(finished).evaluations_file)
    assert result["step"] == 12
    for ours, theirs in zip(result["exits"], recorded["exits"], strict=True):
        assert ours["layers"] == theirs["layers"]
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)
        assert f"{ours['loss']:.4f}" in printed
    with pytest.raises(UserError, match=r"no checkpoint of step 7; it has \[5, 10, 12\]"):
        evaluate(finished, step=7)


def test_another_config_is_refused_and_named(finished, arguments, tmp_path, capsys):
    workdir = shutil.copytree(finished, tmp_path / "run")
    config = (workdir / "config.json").read_bytes()
    code = main(["train", f"--workdir={workdir}", *arguments, "--config.optimizer.beta1=0.8"])
    assert code == 2
    assert "config.optimizer.beta1: 0.9 -> 0.8" in capsys.readouterr().err
    assert (workdir / "config.json").read_bytes() == config


def test_other_data_is_refused(finished, arguments, prepared, tmp_path, capsys):
    from layerskip_jax.commands import prepare

    workdir = shutil.copytree(finished, tmp_path / "run")
    other = tmp_path / "other"
    texts = prepared.parent / "texts"
    options = ["--vocab-size=300", "--sequence-length=12", "--validation-fraction=0.3"]
    assert prepare.main([f"--source={texts}", f"--output={other}", *options]) == 0
    code = main(["train", f"--workdir={workdir}", *arguments, f"--config.data.path={other}"])
    assert code == 2
    assert "holds a run on other data" in capsys.readouterr().err


def test_a_run_on_a_mixture_keeps_to_its_weights(arguments, prepared, tmp_path, capsys):
    copy = shutil.copytree(prepared, tmp_path / "copy")
    flags = [*arguments, f"--config.data.mixture=('{copy}',)", "--config.training.steps=2"]
    first = f"--workdir={tmp_path / 'run'}"
    assert main(["train", first, *flags, "--config.data.weights=(2.0, 1.0)"]) == 0
    assert main(["train", first, *flags, "--config.data.weights=(1.0, 1.0)"]) == 2
    assert "holds a run on other data" in capsys.readouterr().err
    assert main(["train", f"--workdir={tmp_path / 'no'}", *flags]) == 2
    assert "config.data.weights=() must have 2 numbers" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_mixture_whose_weights_change_goes_on_with_the_very_same_batches(
    arguments, prepared, tmp_path, capsys, caplog
):
    """Interrupted after step 2 of 5, read by two threads or by three, and another schedule."""
    caplog.set_level(logging.INFO, "layerskip_jax")
    copy = shutil.copytree(prepared, tmp_path / "copy")
    flags = [
        *arguments, f"--config.data.mixture=('{copy}',)", "--config.data.weights=(2.0, 1.0)",
        "--config.training.steps=5", "--config.checkpoint.every_steps=2",
        "--config.training.log_every=1",
    ]  # fmt: skip
    changes = "--config.data.weight_changes=((1, (1.0, 3.0)), (3, (0.0, 1.0)), (9, (1.0, 0.0)))"
    whole, workdir = tmp_path / "whole", tmp_path / "killed"
    assert main(["train", f"--workdir={whole}", *flags, changes]) == 0
    assert "(1.0, 3.0) from step 2 on; (0.0, 1.0) from step 4 on" in caplog.text
    assert "the 5 steps end before step 10, from which on" in caplog.text
    shutil.copytree(whole, workdir)
    for step in (4, 5):
        shutil.rmtree(RunFolder(workdir).checkpoints / str(step))
    another = changes.replace("(1.0, 3.0)", "(1.0, 2.0)")
    for other in ([], [another]):
        assert main(["train", f"--workdir={workdir}", *flags, *other]) == 2
        assert "holds a run on other data" in capsys.readouterr().err
    threads = "--config.data.read_threads=3"
    assert main(["train", f"--workdir={workdir}", *flags, changes, threads]) == 0
    assert "going on from the checkpoint of step 2" in caplog.text
    ours, theirs = (read_json_lines(RunFolder(run).metrics_file) for run in (workdir, whole))
    assert [r["batches"] for r in ours] == [r["batches"] for r in theirs]
    assert [r["loss"] for r in ours] == [r["loss"] for r in theirs]
    # And they are those of the schedule, with the evaluation's figures of a run that was whole.
    source = BatchSource(
        prepared, "train", batch_size=24, seed=0, mixture=(str(copy),), weights=(2.0, 1.0),
        weight_changes=((1, (1.0, 3.0)), (3, (0.0, 1.0))),
    )  # fmt: skip
    windows = source.num_windows // 2
    of_first = [sum(n < windows for n in source.window_numbers(step)) for step in range(5)]
    assert of_first == [16, 6, 6, 0, 0]
    sums = [int(checksum(jnp.asarray(source.batch(step).tokens))) for step in range(5)]
    assert [r["batches"] for r in theirs] == [
        zlib.crc32(np.array([value], "<u4").tobytes()) for value in sums
    ]


def damage(folder, split):
    """Spoils some records of a split in a copy of prepared data."""
    file = folder / f"{split}-00000.array_record"
    content = bytearray(file.read_bytes())
    for start in (200, 3000):
        content[start : start + 64] = bytes(64)
    file.write_bytes(content)


def left_out_in(data, split, batches):
    """How many damaged records so many batches hold, on one process."""
    shuffle = split == "train"
    source = BatchSource(data, split, batch_size=24, seed=0, shuffle=shuffle, skip_damaged=True)
    for step in range(batches or source.steps_per_epoch):
        source.batch(step)
    return source.damaged


def test_damaged_records_and_a_stop_within_an_evaluation(
    arguments, prepared, tmp_path, monkeypatch, capsys, caplog
):
    """Left out and counted from first to last step; the evaluation is made up afterwards."""
    data = shutil.copytree(prepared, tmp_path / "data")
    damage(data, "train")
    damage(data, "validation")
    workdir, evaluations = tmp_path / "run", []
    command = ["train", f"--workdir={workdir}", *arguments, f"--config.data.path={data}"]
    command += ["--config.training.evaluate_every=6", "--config.checkpoint.every_steps=4"]
    assert main(command) == 2
    assert "is damaged" in capsys.readouterr().err
    shutil.rmtree(workdir)
    command.append("--config.data.on_damaged=skip")
    evaluate_exits = train_module.evaluate_exits

    def stopped(*evaluation):
        evaluations.append(evaluation)
        if len(evaluations) in (1, 3):  # at step 6, and at the end
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate_exits(*evaluation)

    monkeypatch.setattr(train_module, "evaluate_exits", stopped)

    def evaluated():
        return [line["step"] for line in read_json_lines(RunFolder(workdir).evaluations_file)]

    assert main(command) == RESTART_EXIT_CODE
    assert "stopped by SIGTERM after step 6 of 12" in caplog.text
    assert evaluated() == []
    assert main(command) == RESTART_EXIT_CODE
    assert "stopped by SIGTERM after step 12 of 12" in caplog.text
    assert evaluated() == [6]
    assert main(command) == 0
    assert evaluated() == [6, 12]
    counts = [line["left_out"] for line in read_json_lines(RunFolder(workdir).metrics_file)]
    assert counts == [left_out_in(data, "train", step) for step in range(1, 13)]
    assert 0 < counts[5] < counts[-1]
    file = tmp_path / "evaluation.json"
    verb = ["evaluate", f"--workdir={workdir}", f"--json={file}"]
    assert main(verb) == 0
    result = json.loads(file.read_text())
    assert result["left_out"] == left_out_in(data, "validation", 0) > 0
    assert f"{result['left_out']} damaged" in capsys.readouterr().out
    assert main([*verb, "--on-damaged=stop"]) == 2
    assert main(["sweep", f"--workdir={workdir}", "--on-damaged=stop"]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_a_damaged_index_of_the_validation_set_is_found_before_the_first_step(
    arguments, prepared, tmp_path, capsys
):
    data = shutil.copytree(prepared, tmp_path / "data")
    file = data / "validation-00000.array_record"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-65536] + bytes(min(size, 65536)))
    assert file.stat().st_size == size
    code = main(
        ["train", f"--workdir={tmp_path / 'run'}", *arguments, f"--config.data.path={data}"]
    )
    assert code == 2
    assert "validation-00000.array_record: its index is damaged" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_epochs_give_the_length_and_many_are_warned_of(arguments, prepared, tmp_path, caplog):
    caplog.set_level(logging.INFO, "layerskip_jax")
    windows = BatchSource(prepared, "train", batch_size=24, seed=0).num_windows
    workdir = tmp_path / "run"
    command = ["train", f"--workdir={workdir}", *arguments, "--config.training.epochs=0.2"]
    assert main(command) == 0
    steps = -(-windows // (24 * 5))
    assert json.loads((workdir / "config.json").read_text())["training"]["steps"] == steps
    planned = f"epochs planned in {steps} steps: {prepared} {steps * 24 / windows:.3g}"
    assert planned in caplog.text
    assert "learn it by heart" not in caplog.text
    often = ["train", f"--workdir={tmp_path / 'often'}", *arguments, "--config.training.epochs=5"]
    with patch.object(TrainSetup, "init", side_effect=UserError("enough")):
        assert main(often) == 2
    assert "5.1 times; beyond 4 times" in caplog.text
    source = BatchSource(prepared, "train", batch_size=24, seed=0)
    assert source.epochs(2 * windows) == [(str(prepared), 48.0)]
    mixed = BatchSource(
        prepared, "train", batch_size=24, seed=0, mixture=[str(prepared)], weights=(3.0, 1.0)
    )
    assert [count for _, count in mixed.epochs(windows)] == [18, 6]


def test_a_second_training_in_one_folder_is_refused(finished, arguments, tmp_path, capsys):
    workdir = shutil.copytree(finished, tmp_path / "run")
    with patch.object(lock, "GRACE_SECONDS", 0.2), locked(RunFolder(workdir)):
        assert main(["train", f"--workdir={workdir}", *arguments]) == 2
    assert f"is being trained by process {os.getpid()} on" in capsys.readouterr().err
    assert main(["train", f"--workdir={workdir}", *arguments]) == 0


def test_a_foreign_folder_is_left_alone(arguments, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    assert main(["train", f"--workdir={tmp_path}", *arguments]) == 2
    assert "is not empty and holds no run (it has thesis.tex)" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "extra, message",
    [
        ("--config.data.path=/nowhere", "holds no prepared data"),
        ("--config.model.vocab_size=100", "vocab_size=100 is smaller than the tokenizer's 300"),
        ("--config.model.max_sequence_length=8", "shorter than the windows of 12"),
        ("--config.training.batch_size=12", "batch_size=12 .* not divisible by the 8 batch"),
        ("--config.mesh.shape.tensor=3", "does not fit 8 device"),
        ("--config.layer_dropout.row_groups=4", "groups=4 must be a multiple of 8"),
    ],
)
def test_nothing_is_written_for_a_run_that_cannot_be(arguments, tmp_path, capsys, extra, message):
    workdir = tmp_path / "run"
    gather = ["--config.layer_dropout.execution=gather"]
    assert main(["train", f"--workdir={workdir}", *arguments, *gather, extra]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not workdir.exists()


def test_a_workdir_that_cannot_be_written_is_named(arguments, capsys):
    """/proc refuses new folders to everyone, root included."""
    assert main(["train", "--workdir=/proc/run", *arguments]) == 2
    assert "--workdir=/proc/run cannot be written" in capsys.readouterr().err


def test_a_full_disk_stops_the_run_and_spares_what_is_saved(arguments, tmp_path):
    """The kernel refuses to let any file grow past a limit, as a full disk would."""
    workdir = tmp_path / "run"
    limited = ["bash", "-c", 'ulimit -f 40; exec "$@"', "bash", *_command(workdir, arguments)]
    full = subprocess.run(limited, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert full.returncode != 0
    assert "File too large" in full.stderr
    saved = RunFolder(workdir).checkpoints
    assert not [p for p in saved.iterdir() if p.name.isdigit()], "no half checkpoint may count"
    done = subprocess.run(_command(workdir, arguments), cwd=REPOSITORY, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert load_run(workdir).step == 12


@pytest.mark.slow
def test_with_a_full_disk_a_run_goes_on_where_that_is_asked_for(arguments, tmp_path):
    """Every save fails and is logged; the last one, which nothing makes up for, is an error."""
    workdir = tmp_path / "run"
    command = _command(workdir, arguments, "--config.checkpoint.on_failure=continue")
    limited = ["bash", "-c", 'ulimit -f 40; exec "$@"', "bash", *command]
    full = subprocess.run(limited, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert full.returncode == 2, full.stderr
    assert "going on, as config.checkpoint.on_failure has it" in full.stderr
    assert "layerskip train: a checkpoint could not be written" in full.stderr
    assert [r["step"] for r in read_json_lines(RunFolder(workdir).metrics_file)][-1] == 12
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("on_failure", ["stop", pytest.param("continue", marks=pytest.mark.slow)])
def test_a_folder_that_has_become_read_only_is_said_so(finished, arguments, tmp_path, on_failure):
    workdir = shutil.copytree(finished, tmp_path / "run")
    saved = RunFolder(workdir).checkpoints
    go_back(workdir)
    command = _command(workdir, arguments, f"--config.checkpoint.on_failure={on_failure}")
    RunFolder(workdir).metrics_file.unlink()
    # Root writes to read-only folders too, unless it gives that up.
    as_others = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []
    saved.chmod(0o555)
    refused = subprocess.run(
        [*as_others, *command], cwd=REPOSITORY, capture_output=True, text=True, timeout=240
    )
    saved.chmod(0o755)
    assert refused.returncode == 2, refused.stderr
    assert f"a checkpoint could not be written to {saved}" in refused.stderr
    assert "Permission denied" in refused.stderr
    assert [p.name for p in saved.iterdir()] == ["5"]
    last = read_json_lines(RunFolder(workdir).metrics_file)[-1]["step"]
    assert last == (12 if on_failure == "continue" else 10)
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "going on from the checkpoint of step 5" in done.stderr
    assert _record(workdir)["checksums"] == _record(finished)["checksums"]


@pytest.mark.parametrize("on_failure, code", [("stop", 2), ("continue", 0)])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_too_full_for_metrics_is_said_so(
    finished, arguments, tmp_path, capsys, caplog, on_failure, code
):
    """The metrics, the log, then the curves too lie where nothing can be written."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    folder = RunFolder(workdir)
    go_back(workdir)
    for file in (folder.metrics_file, folder.logs / "process-0.jsonl"):
        file.unlink()
        file.symlink_to("/dev/full")
    command = ["train", f"--workdir={workdir}", *arguments]
    assert main([*command, f"--config.checkpoint.on_failure={on_failure}"]) == code
    errors = capsys.readouterr().err
    assert errors.count("process-0.jsonl cannot be written (No space left on device)") == 1
    said = f"{workdir} cannot be written (No space left on device); free some space"
    assert said in (errors if on_failure == "stop" else caplog.text)
    assert "Traceback" not in errors
    assert code == 2 or _record(workdir)["checksums"] == _record(finished)["checksums"]


def test_the_curves_are_those_of_the_metrics(finished):
    from tensorboardX.proto.event_pb2 import SessionLog

    starts, losses = [], {}
    for event in events(finished):
        if event.session_log.status == SessionLog.START:
            starts.append(event.step)
        losses |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
    assert starts == [0]
    for record in read_json_lines(RunFolder(finished).metrics_file):
        assert losses["train/loss", record["step"]] == pytest.approx(record["loss"], rel=1e-6)


@pytest.mark.slow
def test_the_curves_go_to_weights_and_biases_too(finished, arguments, tmp_path):
    """The real package, offline: what it would send lies in a file for each start of the run."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    command = _command(workdir, arguments, "--config.training.wandb=trial")
    environment = {**os.environ, "WANDB_MODE": "offline"}
    for _ in range(2):
        go_back(workdir)
        RunFolder(workdir).evaluations_file.unlink()
        done = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, env=environment
        )
        assert done.returncode == 0, done.stderr
    files = list(workdir.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    for file in files:
        assert file.stem == f"run-{RunFolder(workdir).wandb_file.read_text()}"
        sent = file.read_bytes()
        for name in (b"trial", b"train/loss", b"train/lost_checkpoint", b"validation/loss_exit_04"):
            assert name in sent


def test_weights_and_biases_is_missed_before_anything_is_written(
    arguments, tmp_path, capsys, monkeypatch
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == "wandb" else find(name, *a)
    )
    flags = ["--config.training.wandb=trial"]
    assert main(["train", f"--workdir={tmp_path / 'run'}", *arguments, *flags]) == 2
    assert "`pip install wandb`" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_is_not_the_datas_is_refused(prepared, arguments, tmp_path, capsys):
    copy = tmp_path / "data"
    shutil.copytree(prepared, copy)
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    code = main(
        ["train", f"--workdir={tmp_path / 'run'}", *arguments, f"--config.data.path={copy}"]
    )
    assert code == 2
    assert "is not the tokenizer" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["data"]
