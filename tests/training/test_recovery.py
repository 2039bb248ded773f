"""What a run does when things go wrong: damaged checkpoints, NaNs, hangs, kills."""

import dataclasses
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layerskip_jax.cli import main
from layerskip_jax.config import GuardsConfig
from layerskip_jax.data.batches import BatchSource
from layerskip_jax.distributed.processes import RESTART_EXIT_CODE
from layerskip_jax.ops.checksum import checksum, tree_checksums
from layerskip_jax.run_folder.paths import RunFolder, read_json_lines
from layerskip_jax.schema import UserError
from layerskip_jax.training.checkpoint import Checkpoints
from layerskip_jax.training.guards import Guards
from layerskip_jax.training.restore import load_run
from layerskip_jax.training.setup import TrainSetup, make_setup
from layerskip_jax.training.step import Batch, StepMetrics
from tests.helpers import SEQUENCE, random_batch, run_steps, small_run, with_training
from tests.training.test_train import REPOSITORY, _command

KILLS = int(os.environ.get("LAYERSKIP_TEST_KILLS", "10"))  # of the long lane


def state_checksums(workdir, step=12):
    file = RunFolder(workdir).checkpoints / str(step) / "record" / "metadata"
    return json.loads(file.read_text())["checksums"]


def same_batches(a, b):
    first, second = (read_json_lines(RunFolder(run).metrics_file) for run in (a, b))
    return [(r["step"], r["batches"]) for r in first] == [(r["step"], r["batches"]) for r in second]


# Checksums


def test_a_checksum_does_not_depend_on_the_mesh():
    array = jax.random.normal(jax.random.key(0), (8, 6, 4))
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    spec = jax.sharding.PartitionSpec
    whole = tree_checksums({"x": array})
    for parts in (spec("a"), spec(None, "b"), spec(("a", "b")), spec("b", None, "a")):
        sharded = jax.device_put(array, jax.sharding.NamedSharding(mesh, parts))
        assert tree_checksums({"x": sharded}) == whole


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool"])
def test_a_checksum_sees_one_element_and_the_order(dtype):
    array = jnp.arange(24).reshape(4, 6).astype(dtype)
    sums = {int(checksum(array)), int(checksum(array[::-1])), int(checksum(array.T))}
    # Of a flag only the position tells the elements apart, and here just one is False.
    assert len(sums) == (3 if dtype != "bool" else 2)
    for index in ((0, 0), (3, 5)):
        changed = array.at[index].set(~array[index] if dtype == "bool" else array[index] + 100)
        assert int(checksum(changed)) != int(checksum(array))


# Damaged checkpoints


def zero(folder):
    """The same sizes, other contents: what only a checksum or orbax's own can see."""
    for file in folder.rglob("d/*"):
        file.write_bytes(bytes(file.stat().st_size))


def truncate(folder):
    for file in folder.rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(folder):
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


def half_delete(folder):
    shutil.rmtree(folder / "optimizer")


def garble(folder):
    for name in ("_METADATA", "_CHECKPOINT_METADATA", "metadata"):
        for file in folder.rglob(name):
            file.write_text("{]")


def lose_record(folder):
    shutil.rmtree(folder / "record")


def flip(folder):
    """A checkpoint that reads well and whose record says something else."""
    file = folder / "record" / "metadata"
    record = json.loads(file.read_text())
    record["checksums"] = {k: v ^ 1 for k, v in record["checksums"].items()}
    file.write_text(json.dumps(record))


DAMAGES = [zero, truncate, empty, half_delete, garble, lose_record, flip]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_left_for_the_one_before(
    finished, arguments, tmp_path, caplog, damage
):
    workdir = shutil.copytree(finished, tmp_path / "run")
    folder = RunFolder(workdir)
    damage(folder.checkpoints / "12")
    with caplog.at_level(logging.INFO, logger="layerskip_jax"):
        assert main(["train", f"--workdir={workdir}", *arguments]) == 0
    assert "the checkpoint of step 12 is damaged" in caplog.text
    assert "going on from the checkpoint of step 10" in caplog.text
    assert state_checksums(workdir) == state_checksums(finished)
    assert same_batches(workdir, finished)
    (aside,) = (workdir / "checkpoints_damaged").iterdir()
    assert aside.name.startswith("12-")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_when_all_are_damaged_nothing_is_touched(finished, arguments, tmp_path, capsys):
    workdir = shutil.copytree(finished, tmp_path / "run")
    for checkpoint in RunFolder(workdir).checkpoints.iterdir():
        half_delete(checkpoint)
    before = {p: p.stat().st_mtime_ns for p in RunFolder(workdir).checkpoints.rglob("*")}
    assert main(["train", f"--workdir={workdir}", *arguments]) == 2
    errors = capsys.readouterr().err
    assert "all checkpoints in" in errors and "step 5:" in errors and "step 12:" in errors
    assert {p: p.stat().st_mtime_ns for p in RunFolder(workdir).checkpoints.rglob("*")} == before
    assert not (workdir / "checkpoints_damaged").exists()


def test_the_record_says_what_was_saved(finished):
    file = RunFolder(finished).checkpoints / "10" / "record" / "metadata"
    record = json.loads(file.read_text())
    assert record["step"] == 10
    assert record["config"] == json.loads(RunFolder(finished).config_file.read_text())
    assert record["data"] == json.loads(RunFolder(finished).data_file.read_text())["fingerprint"]
    assert record["version"]


def test_checkpoints_of_an_interval_are_kept_for_good(arguments, tmp_path):
    flags = ["--config.checkpoint.every_steps=2", "--config.checkpoint.keep=1"]
    flags.append("--config.checkpoint.keep_every_steps=4")
    assert main(["train", f"--workdir={tmp_path / 'run'}", *arguments, *flags]) == 0
    saved = RunFolder(tmp_path / "run").checkpoints
    assert sorted(int(p.name) for p in saved.iterdir()) == [4, 8, 12]


def test_checkpoints_of_a_time_interval_are_kept_for_good(tmp_path):
    """One second apart; of two saved in quick succession the later one goes."""
    second = 1 / 3600
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, keep_every_hours=second)
    for step in range(1, 6):
        if step % 2:
            time.sleep(1.1)
        checkpoints.save(step, {"a": jnp.ones(3)}, {"b": jnp.zeros(2)})
    checkpoints.close()
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert kept == [1, 3, 5]


# Steps that are not finite


def test_a_step_that_is_not_finite_changes_nothing():
    """A parameter is made so large that the loss overflows, as a bad batch would make it."""
    config = small_run()
    setup = make_setup(config, jax.devices()[:2])

    def batch(seed):
        rows = random_batch(seed, rows=config.training.batch_size)
        return setup.placement.place(Batch(*(array[setup.placement.rows] for array in rows)))

    with jax.set_mesh(setup.mesh):
        state = setup.init()
        step = setup.compile_step(SEQUENCE)
        state, metrics = step(state, batch(0))
        assert not metrics.skipped
        scale = state.parameters["final_norm"]["scale"]
        broken = jax.tree.map(jnp.copy, state)
        broken.parameters["final_norm"]["scale"] = jax.device_put(
            scale.at[0].set(jnp.nan), scale.sharding
        )
        before = tree_checksums((broken.parameters, broken.optimizer))
        broken, metrics = step(broken, batch(1))
        assert metrics.skipped and not np.isfinite(metrics.loss)
        assert tree_checksums((broken.parameters, broken.optimizer)) == before
        assert int(broken.step) == 2
        # With the value mended the next step is a step again.
        broken.parameters["final_norm"]["scale"] = scale
        mended, metrics = step(broken, batch(2))
        assert not metrics.skipped
        assert tree_checksums(mended.optimizer) != tree_checksums(state.optimizer)


def test_the_checksum_of_a_batch_is_the_same_on_every_mesh_and_accumulation():
    base = small_run()
    base = dataclasses.replace(
        base, layer_dropout=dataclasses.replace(base.layer_dropout, p_max=0.0)
    )
    sums = []
    for devices, accumulation in ((1, 1), (2, 1), (4, 2)):
        config = with_training(base, gradient_accumulation=accumulation)
        _, _, history = run_steps(config, 2, devices)
        sums.append([int(metrics.batch) for metrics in history])
    assert sums[0] == sums[1] == sums[2]
    assert sums[0][0] != sums[0][1]


def test_more_skipped_steps_in_a_row_than_allowed_end_the_run():
    def metrics(skipped):
        fields = dict.fromkeys(StepMetrics._fields, np.float32(1))
        fields.update(loss=np.float32(np.nan if skipped else 2), skipped=np.bool_(skipped))
        return StepMetrics(**{**fields, "batch": np.uint32(7)})

    guards = Guards(GuardsConfig(nonfinite_limit=2), lambda step: [step, 100], lambda: 40)
    for step, skipped in enumerate((True, True, False, True, True), start=41):
        guards.check(step, metrics(skipped))
    with pytest.raises(
        UserError, match=r"3 steps in a row, 44 to 46(.|\n)*Last checkpoint: step 4"
    ):
        guards.check(46, metrics(True))


@pytest.mark.parametrize("limit", [0, 3])
def test_a_run_that_diverges_stops_with_advice(arguments, tmp_path, capsys, caplog, limit):
    """A learning rate of 1e30 makes the second step's loss overflow, and all after it."""
    flags = ["--config.optimizer.learning_rate=1e30", "--config.optimizer.warmup_steps=0"]
    flags += [f"--config.guards.nonfinite_limit={limit}", "--config.checkpoint.every_steps=1"]
    with caplog.at_level(logging.INFO, logger="layerskip_jax"):
        assert main(["train", f"--workdir={tmp_path / 'run'}", *arguments, *flags]) == 2
    errors = capsys.readouterr().err
    assert f"{limit + 1} steps in a row" in errors
    assert "Lower config.optimizer.learning_rate" in errors
    assert re.search(r"step \d+: \[\d+, ", errors)
    assert re.search(r"Last checkpoint: step \d+", errors)
    assert caplog.text.count("skipped, parameters and optimizer are as before") == limit + 1


def test_a_run_rolls_back_and_leaves_the_bad_batches_out(arguments, tmp_path, caplog, monkeypatch):
    """Batches 6 to 8 of the order are poison: parameters are restored and they are never seen."""
    compile_step = TrainSetup.compile_step
    poisoned = {}

    def compile_poisoned(self, sequence_length):
        step = compile_step(self, sequence_length)

        def run(state, batch):
            number = zlib.crc32(np.asarray(batch.tokens).tobytes())
            if number in poisoned:
                embedding = state.parameters["embedding"]
                state.parameters["embedding"] = jax.device_put(
                    jnp.full(embedding.shape, jnp.nan), embedding.sharding
                )
                after, metrics = step(state, batch)
                after.parameters["embedding"] = embedding
                return after, metrics
            return step(state, batch)

        return run

    data = next(a.split("=")[1] for a in arguments if a.startswith("--config.data.path"))
    order = BatchSource(data, "train", batch_size=24, seed=0)
    for step in (6, 7, 8):
        poisoned[zlib.crc32(np.asarray(order.batch(step).tokens).tobytes())] = step
    monkeypatch.setattr(TrainSetup, "compile_step", compile_poisoned)
    workdir = tmp_path / "run"
    flags = ["--config.guards.nonfinite_limit=2", "--config.guards.roll_backs=1"]
    command = ["train", f"--workdir={workdir}", *arguments, *flags]
    with caplog.at_level(logging.INFO, logger="layerskip_jax"):
        assert main(command) == RESTART_EXIT_CODE
        assert "steps 7 to 9 were not finite; rolled back to step 5, and 3 batches" in caplog.text
        assert main(command) == 0
    assert RunFolder(workdir).skips() == [(6, 3)]
    assert "going on from the checkpoint of step 5" in caplog.text
    expected = [0, 1, 2, 3, 4, 5, 9, 10, 11, 12, 13, 14]
    sums = [int(checksum(jnp.asarray(order.batch(step).tokens))) for step in expected]
    crcs = [zlib.crc32(np.array([value], "<u4").tobytes()) for value in sums]
    records = read_json_lines(RunFolder(workdir).metrics_file)
    assert [record["batches"] for record in records] == crcs


# Hangs and kills


@pytest.mark.slow
def test_a_hang_is_ended_with_the_stacks_in_the_log(arguments, tmp_path):
    """The reading of batch 3 waits for ever; the watchdog's limit is eight seconds."""
    hang = (
        "import threading; from layerskip_jax.data.batches import BatchSource; "
        "rows = BatchSource.rows; "
        "BatchSource.rows = lambda self, step, wanted: "
        "threading.Event().wait() if step == 3 else rows(self, step, wanted); "
    )
    command = _command(tmp_path / "run", [*arguments, "--config.guards.step_timeout=8"])
    command[2] = hang + command[2]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stderr
    assert "Timeout (0:00:08)!" in done.stderr
    assert re.search(r'Thread 0x.*\n(.*\n)*.*train.py", line \d+ in train', done.stderr)


# Over 20 s, since four processes start, one after the other.
@pytest.mark.parametrize("steps, kills", [(12, 2), pytest.param(60, KILLS, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_happened(
    finished, arguments, tmp_path, steps, kills
):
    """SIGKILL after a random number of lines, again and again, a save every second step."""
    flags = ["--config.checkpoint.every_steps=2"]
    whole, workdir = finished, tmp_path / "killed"
    if steps != 12:
        flags += [f"--config.training.steps={steps}", "--config.layer_dropout.p_max=0.0"]
        whole = tmp_path / "whole"
        assert main(["train", f"--workdir={whole}", *arguments, *flags]) == 0
    command, draw = _command(workdir, arguments, *flags), random.Random(0)
    done, killed = False, 0
    while killed < kills:
        lines = draw.randrange(1, 8)  # one for each step, one more where it is saved
        with subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, stderr=subprocess.PIPE
        ) as process:
            for _ in range(lines):
                line = process.stdout.readline()
                done = not line
            if not done:
                process.send_signal(signal.SIGKILL)
            _, errors = process.communicate(timeout=120)
        assert "damaged" not in errors
        if done:
            assert process.returncode == 0, errors
            shutil.rmtree(RunFolder(workdir).checkpoints / str(steps))
            continue
        killed += 1
    last = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert last.returncode == 0, last.stderr
    assert state_checksums(workdir, steps) == state_checksums(whole, steps)
    # The last line of each step counts: no step is missing, each has the batch it should have.
    assert same_batches(workdir, whole)
    jax.tree.map(
        np.testing.assert_array_equal, load_run(workdir).parameters, load_run(whole).parameters
    )
