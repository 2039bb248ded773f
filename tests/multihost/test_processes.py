"""Runs of several real processes on this machine: topologies, preemption, crashes, disagreement."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from layerskip_jax.distributed.processes import RESTART_EXIT_CODE, VARIABLES
from layerskip_jax.run_folder.paths import RunFolder, read_json_lines
from layerskip_jax.training.restore import load_run
from tests.evaluation.conftest import tasks  # noqa: F401
from tests.helpers import go_back
from tests.training.test_train import REPOSITORY

slow = pytest.mark.slow
TIMEOUT = 900  # ends what hangs; other tests may load the machine
SETTINGS = [
    "--config.layer_dropout.execution=gather",
    "--config.mesh.shape.data=1",
    # Four devices take the batch of 24 at once, two in two microbatches, one in four.
    "--config.training.gradient_accumulation=0",
    "--config.training.rows_per_device=6",
]
FSDP = ["--config.mesh.shape.fsdp=-1"]
# What is done to a run comes some steps later than asked for, and before the next checkpoint.
LONG = [*FSDP, "--config.training.steps=60", "--config.checkpoint.every_steps=25"]
SAME = ("step", "layers_run", "tokens", "batches")


@pytest.fixture(scope="module")
def train(arguments):
    """The arguments of a run of 12 steps, but its folder and mesh."""
    recipe, data, _ = arguments
    return ["train", recipe, data, *SETTINGS]


def launch(processes, devices, arguments, *options):
    return [
        sys.executable,
        "launch/local.py",
        f"--processes={processes}",
        f"--devices={devices}",
        "--grace=20",
        *options,
        "--",
        *map(str, arguments),
    ]


def run(command, code=0):
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == code, done.stderr
    return done


def interrupt(command, at, action):
    """Starts a command, calls `action(pids)` when a line begins with `at`; returns code, stderr."""
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        pids = re.search(r"started processes ([\d ]+)", process.stderr.readline())
        acted = False
        for line in process.stdout:
            if line.startswith(at) and not acted:
                action([int(pid) for pid in pids[1].split()])
                acted = True
        _, errors = process.communicate(timeout=TIMEOUT)
    assert acted, errors
    return process.returncode, errors


def waited_for_ever(errors, lost):
    """Whether all others waited in gloo for one that is lost, and only the launcher said so."""
    names, kill = f"process {lost} ended with -9", "20 s after the first ended: killing the others"
    return errors.find(names) < errors.find(kill) and errors.count(kill) == 1


def records(workdir):
    return [{k: r[k] for k in SAME} for r in read_json_lines(RunFolder(workdir).metrics_file)]


def checksums(workdir, step=12):
    file = RunFolder(workdir).checkpoints / str(step) / "record" / "metadata"
    return json.loads(file.read_text())["checksums"]


@pytest.fixture(scope="module")
def whole(train, made_once):
    """Twelve steps by two processes of two devices that nothing interrupted."""

    def make(folder):
        run(launch(2, 2, [*train, *FSDP, f"--workdir={folder / 'whole'}"]))

    return made_once("processes", make) / "whole"


@pytest.fixture(scope="module")
def long(train, made_once):
    """Sixty steps by two processes of two devices, and a checkpoint each 25."""

    def make(folder):
        run(launch(2, 2, [*train, *LONG, f"--workdir={folder / 'long'}"]))

    return made_once("long", make) / "long"


@slow
def test_two_processes_train_as_one_does(whole, train, tmp_path):
    run(launch(1, 4, [*train, *FSDP, f"--workdir={tmp_path / 'one'}"]))
    assert records(whole) == records(tmp_path / "one")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
        load_run(whole).parameters,
        load_run(tmp_path / "one").parameters,
    )


@slow
def test_two_processes_score_tasks_as_one_does(train, tasks, tmp_path, monkeypatch):  # noqa: F811
    """Each asks all questions, and has all answers of the shards that the others hold."""
    pytest.importorskip("lm_eval", reason="the test requirements install it")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    flags = [
        "--config.training.steps=2", "--config.evaluation.tasks=('local_choice',)",
        f"--config.evaluation.include_path={tasks}", "--config.evaluation.exits=(1, 4)",
        "--config.evaluation.every=1",
    ]  # fmt: skip
    for processes in (1, 2):
        workdir = f"--workdir={tmp_path / str(processes)}"
        run(launch(processes, 4 // processes, [*train, *FSDP, *flags, workdir]))
    one, two = (read_json_lines(RunFolder(tmp_path / name).tasks_file) for name in "12")
    assert [record["step"] for record in one] == [1, 2] and one == two


@slow
def test_two_processes_grow_their_batch_as_one_does(train, tmp_path):
    """8 windows for two steps, then 16, then 32, a microbatch for each device's 6 or fewer."""
    flags = [
        "--config.training.steps=6", "--config.training.batch_size=32",
        "--config.training.batch_ramp=(2, 4)",
    ]  # fmt: skip
    for processes in (1, 2):
        workdir = f"--workdir={tmp_path / str(processes)}"
        run(launch(processes, 4 // processes, [*train, *FSDP, *flags, workdir]))
    assert records(tmp_path / "1") == records(tmp_path / "2")
    assert [r["tokens"] for r in records(tmp_path / "2")][-1] == 12 * (2 * 8 + 2 * 16 + 2 * 32)


# Over 20 s, since up to four processes start at once, on two cores.
@pytest.mark.parametrize(
    "processes, devices, mesh, microbatches",
    [
        (1, 4, FSDP, 1),
        (4, 1, FSDP, 1),
        pytest.param(1, 1, FSDP, 4, marks=slow),
        (2, 2, ["--config.mesh.shape.fsdp=2", "--config.mesh.shape.tensor=2"], 2),
    ],
    ids=["1x4", "4x1", "1x1", "tensor"],
)
def test_saved_by_two_processes_and_gone_on_with_elsewhere(
    whole, train, tmp_path, processes, devices, mesh, microbatches
):
    """Begun by 2x2, gone on with from its step 5: equal state when restored, equal batches."""
    workdir = shutil.copytree(whole, tmp_path / "run")
    folder = RunFolder(workdir)
    go_back(workdir)
    lines = folder.metrics_file.read_text().splitlines()
    folder.metrics_file.write_text("\n".join(lines[:5]) + "\n")
    done = run(launch(processes, devices, [*train, *mesh, f"--workdir={workdir}"]))
    # Restoring compares the checksum of every array with those of the processes that saved it.
    assert "going on from the checkpoint of step 5" in done.stderr
    assert "damaged" not in done.stderr
    assert f"24 a step in {microbatches} microbatch(es)" in done.stderr
    assert records(workdir) == records(whole)


@slow
def test_sigterm_to_one_process_saves_all_and_the_launcher_goes_on(long, train, tmp_path):
    """The service that tells the others looks once a second, so the run has to last a while."""
    workdir = tmp_path / "run"
    command = launch(2, 2, [*train, *LONG, f"--workdir={workdir}"], "--restarts=0")
    code, errors = interrupt(command, "step 6/60", lambda pids: os.kill(pids[1], signal.SIGTERM))
    assert code == 0, errors
    stopped = re.findall(r"stopped by SIGTERM to one of the processes after step (\d+)", errors)
    assert len(stopped) == 2 and len(set(stopped)) == 1, errors
    for number in (0, 1):
        assert f"process {number} ended with {RESTART_EXIT_CODE}" in errors
    assert f"going on from the checkpoint of step {stopped[0]}" in errors
    assert records(workdir) == records(long)
    assert checksums(workdir, 60) == checksums(long, 60)


@slow
def test_a_process_killed_takes_the_run_to_its_last_checkpoint(long, train, tmp_path):
    workdir = tmp_path / "run"
    command = launch(2, 2, [*train, *LONG, f"--workdir={workdir}"], "--restarts=1")
    code, errors = interrupt(command, "step 30/60", lambda pids: os.kill(pids[1], signal.SIGKILL))
    assert code == 0, errors
    assert "process 1 ended with -9" in errors
    assert "restarting all processes" in errors
    # One line, and what else there was to say in the log of the process; or it saw nothing.
    log = RunFolder(workdir).logs / "process-0.stderr"
    lost = re.findall("lost process 1 of 2 .*; what it saw is in (.*)", errors)
    assert "Traceback" not in errors
    if lost or not waited_for_ever(errors, lost=1):
        assert lost == [str(log)]
        assert "Traceback" in log.read_text()
    assert "going on from the checkpoint of step 25" in errors
    assert records(workdir) == records(long)
    assert checksums(workdir, 60) == checksums(long, 60)


@slow
def test_four_processes_restart_when_one_is_killed(long, train, tmp_path):
    """Four of one device each, started again by the launcher, end where two of two devices do."""
    workdir = tmp_path / "run"
    command = launch(4, 1, [*train, *LONG, f"--workdir={workdir}"], "--restarts=1")
    code, errors = interrupt(command, "step 30/60", lambda pids: os.kill(pids[3], signal.SIGKILL))
    assert code == 0, errors
    assert "process 3 ended with -9" in errors
    if "lost process" in errors or not waited_for_ever(errors, lost=3):
        assert errors.count("lost process 3 of 4 (on ") == errors.count("lost process") == 1
    assert errors.count("restarting all processes") == 1
    # Each says so, once it is started again.
    assert errors.count("going on from the checkpoint of step 25") == 4
    for number in range(4):
        named = f"processes as named by LAYERSKIP_*: {number} of 4, coordinator localhost:"
        assert errors.count(named) == 2
    assert records(workdir) == records(long)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
        load_run(workdir).parameters,
        load_run(long).parameters,
    )


@slow
def test_a_damaged_checkpoint_is_left_by_all_processes_together(whole, train, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    folder = RunFolder(workdir)
    for file in (folder.checkpoints / "12" / "parameters").rglob("d/*"):
        content = bytearray(file.read_bytes())
        content[:] = bytes(len(content))
        file.write_bytes(content)
    done = run(launch(2, 2, [*train, *FSDP, f"--workdir={workdir}"]))
    assert "the checkpoint of step 12 is damaged" in done.stderr
    assert "going on from the checkpoint of step 10" in done.stderr
    assert checksums(workdir) == checksums(whole)


@slow
def test_processes_that_disagree_say_how(train, tmp_path):
    """Two processes, started by hand with different configs."""
    workdir = tmp_path / "run"
    port = 20000 + os.getpid() % 20000
    processes = []
    for number in (0, 1):
        values = (f"localhost:{port}", "2", str(number))
        environment = {**os.environ, **dict(zip(VARIABLES, values, strict=True))}
        environment.update(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES=str(2 - number))
        command = [sys.executable, "-m", "layerskip_jax", *train, *FSDP, f"--workdir={workdir}"]
        command.append(f"--config.optimizer.learning_rate={1 + number}e-3")
        processes.append(
            subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True
            )
        )
    for process in processes:
        _, errors = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 2, errors
        assert "config.optimizer.learning_rate: process 0: 0.001, process 1: 0.002" in errors
        assert "devices of each process: process 0: 2, process 1: 1" in errors
    assert not workdir.exists()


@slow
def test_bad_input_is_not_tried_again(train, tmp_path):
    done = run(
        launch(2, 2, [*train, f"--workdir={tmp_path / 'run'}", "--config.mesh.shape.fsdp=3"]), 2
    )
    assert "does not fit 4 device" in done.stderr
    assert "restarting" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_dry_run_prints_what_would_run():
    options = ["--dry-run", "--port=1234"]
    lines = run(launch(2, 4, ["train", "--workdir=a b"], *options)).stdout.splitlines()
    assert lines == [
        f"LAYERSKIP_COORDINATOR=localhost:1234 LAYERSKIP_NUM_PROCESSES=2 LAYERSKIP_PROCESS_ID={i} "
        "JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 "
        f"{sys.executable} -m layerskip_jax train '--workdir=a b'"
        for i in (0, 1)
    ]
