"""launch/slurm.sh and what it submits, run with fake commands of SLURM."""

import os
import shlex
import signal
import subprocess
import sys

import pytest

from layerskip_jax.run_folder.paths import RunFolder, read_json_lines
from tests.launch.scripts import AWKWARD, LAUNCH, REPOSITORY, Fakes, run

COMMAND = ["python3", "-m", "layerskip_jax"]


@pytest.fixture
def slurm(tmp_path):
    return Fakes(tmp_path / "fakes", "sbatch", "srun", "scontrol", "squeue")


def batch(fakes, *arguments):
    """Runs the batch script as SLURM would."""
    return run("slurm.sbatch", *arguments, "--", *AWKWARD, fakes=fakes, SLURM_JOB_ID="77")


def test_sbatch_is_called_with_the_printed_command(slurm):
    options = ["--nodes=4", "--gpus=8", "--partition=gpu"]
    assert run("slurm.sh", *options, "--", *AWKWARD, fakes=slurm).returncode == 0
    printed = run("slurm.sh", *options, "--dry-run", "--", *AWKWARD).stdout
    assert slurm.calls() == [shlex.split(printed)]
    assert "--signal=TERM@300" in slurm.calls()[0] and "--requeue" in slurm.calls()[0]


def test_done_is_done(slurm):
    slurm.answer("srun", (0, ""))
    done = batch(slurm, "--python=venv/bin/python")
    assert done.returncode == 0
    (call,) = slurm.calls()
    start = call.index("venv/bin/python")
    assert call[start:] == ["venv/bin/python", "-m", "layerskip_jax", *AWKWARD]
    assert "--ntasks-per-node=1" in call[:start]
    assert not any(word.startswith("--kill-on-bad-exit") for word in call)


def test_stopped_is_requeued(slurm):
    slurm.answer("srun", (75, ""))
    slurm.answer("squeue", (0, "RUNNING"))
    assert batch(slurm).returncode == 0
    assert [call[0] for call in slurm.calls()] == ["srun", "squeue", "scontrol"]
    assert slurm.calls("scontrol") == [["scontrol", "requeue", "77"]]


def test_stopped_is_requeued_when_the_controller_does_not_tell_the_state(slurm):
    slurm.answer("srun", (75, ""))
    slurm.answer("squeue", (1, "slurm_load_jobs error: Unable to contact slurm controller"))
    assert batch(slurm).returncode == 0
    assert len(slurm.calls("scontrol")) == 1


def test_cancelled_is_not_requeued(slurm):
    slurm.answer("srun", (75, ""))
    slurm.answer("squeue", (0, "COMPLETING"))
    done = batch(slurm)
    assert done.returncode == 75
    assert slurm.calls("scontrol") == []
    assert "the job is COMPLETING" in done.stderr


def test_a_refused_requeue_says_so(slurm):
    slurm.answer("srun", (75, ""))
    slurm.answer("squeue", (0, "RUNNING"))
    slurm.answer("scontrol", (1, "Requested operation is presently disabled"))
    done = batch(slurm)
    assert done.returncode == 75
    assert "submit it again to go on" in done.stderr


def test_bad_input_is_not_tried_again(slurm):
    slurm.answer("srun", (2, ""))
    assert batch(slurm).returncode == 2
    assert [call[0] for call in slurm.calls()] == ["srun"]


def test_crashes_restart_in_the_allocation_so_many_times(slurm):
    slurm.answer("srun", (1, ""), (134, ""), (137, ""))
    done = batch(slurm, "--restarts=2")
    assert done.returncode == 137
    assert [call[0] for call in slurm.calls()] == ["srun"] * 3
    assert "exit code 134: restarting, 2 of 2" in done.stderr
    assert "crash 3 (exit code 137), and --restarts=2: giving up" in done.stderr


def test_a_node_that_does_not_answer_is_waited_for(tmp_path):
    """Where it is lost, SLURM requeues the job meanwhile; each start would be a crash."""
    slurm = Fakes(tmp_path / "fakes", "srun", "sinfo", "sleep")
    slurm.answer("srun", (1, ""), (0, ""))
    lost = "n1=alloc\nn2=alloc*\nn2=alloc*"  # once for each partition
    slurm.answer("sinfo", (0, lost), (0, lost), (0, "n1=alloc\nn2=alloc"))
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[1-2]"}
    done = run("slurm.sbatch", "--", "train", fakes=slurm, **job)
    assert done.returncode == 0
    assert [call[0] for call in slurm.calls()] == ["srun", *["sinfo", "sleep"] * 2, "sinfo", "srun"]
    assert "--nodes=n[1-2]" in slurm.calls("sinfo")[0]
    assert done.stderr.count("waiting for n2: no answer") == 1


def test_a_crash_and_then_a_stop(slurm):
    slurm.answer("srun", (1, ""), (75, ""))
    slurm.answer("squeue", (0, "RUNNING"))
    assert batch(slurm).returncode == 0
    assert [call[0] for call in slurm.calls()] == ["srun", "srun", "squeue", "scontrol"]


DATA = ["--data-bucket=s3://bucket/web", "--data-mount=/tmp/data", "--mounted=/x/mounted.sh"]
MOUNTED = ["bash", "/x/mounted.sh", *DATA[:2]]


def after_options(call):
    """What srun is to run."""
    return call[call.index("--label") + 1 :]


def test_a_bucket_is_mounted_in_the_step_of_the_run_and_taken_away_at_the_end(slurm):
    slurm.answer("srun", (0, ""), (1, ""), (0, ""))
    assert batch(slurm, *DATA).returncode == 0
    run_it = [*MOUNTED, "--", *COMMAND, *AWKWARD]
    expected = [[*MOUNTED, "--", "true"], run_it, run_it, [*MOUNTED, "--unmount"]]
    assert [after_options(call) for call in slurm.calls("srun")] == expected


def test_a_bucket_is_taken_away_before_the_job_is_requeued(slurm):
    slurm.answer("srun", (0, ""), (75, ""), (0, ""))
    slurm.answer("squeue", (0, "RUNNING"))
    assert batch(slurm, *DATA).returncode == 0
    names = [call[-1] if call[0] == "srun" else call[0] for call in slurm.calls()]
    assert names == ["true", AWKWARD[-1], "squeue", "--unmount", "scontrol"]


def test_a_bucket_that_one_node_cannot_mount_ends_the_job_before_the_run(slurm):
    slurm.answer("srun", (2, ""), (0, ""))
    done = batch(slurm, *DATA)
    assert done.returncode == 2
    assert [call[-1] for call in slurm.calls()] == ["true", "--unmount"]
    assert "exit code 2: the bucket was not mounted on every node" in done.stderr


def test_outside_of_a_job_it_says_how_to_submit_it(slurm):
    done = run("slurm.sbatch", "--", "train", fakes=slurm, SLURM_JOB_ID="")
    assert done.returncode == 2 and slurm.calls() == []
    assert "submit it by launch/slurm.sh" in done.stderr


# Starts two tasks here as srun does on two nodes, tells them of each other by the variables of a
# step, and ends with the highest code. SIGTERM, as of --signal, goes to the tasks.
SRUN = """#!{python}
import os, signal, subprocess, sys

words = sys.argv[1:]
command = words[words.index({python!r}) :]
step = {{
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
}}
tasks = [
    subprocess.Popen(command, env={{**os.environ, **step, "SLURM_PROCID": str(number)}})
    for number in range(2)
]
signal.signal(signal.SIGTERM, lambda *_: [task.send_signal(signal.SIGTERM) for task in tasks])
with open({pids!r}, "w") as file:
    print(os.getpid(), file=file)
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""


@pytest.mark.slow
def test_a_run_of_two_tasks_is_stopped_requeued_and_gone_on_with(slurm, tmp_path, arguments):
    """The real batch script and the real run; SLURM alone is played."""
    pids, workdir = tmp_path / "srun.pid", tmp_path / "run"
    recipe, data, _ = arguments
    (slurm.bin / "srun").write_text(SRUN.format(python=sys.executable, pids=str(pids)))
    slurm.answer("squeue", (0, "RUNNING"))
    command = ["bash", str(LAUNCH / "slurm.sbatch"), f"--python={sys.executable}", "--restarts=0"]
    command += ["--", "train", recipe, data, f"--workdir={workdir}"]
    command += ["--config.mesh.shape.fsdp=-1", "--config.mesh.shape.data=1"]
    command += ["--config.layer_dropout.execution=mask"]
    # The service that tells the other task looks once a second, so the run has to last a while.
    command += ["--config.training.steps=300", "--config.checkpoint.every_steps=100"]
    path = f"{slurm.bin}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SLURM_JOB_ID": str(os.getpid())}

    def job(at=None):
        """One stay in the allocation; SLURM's notice comes when a line begins with `at`."""
        errors = tmp_path / "errors"
        with (
            errors.open("w") as file,
            subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            ) as process,
        ):
            for line in process.stdout:
                if at and line.startswith(at):
                    os.kill(int(pids.read_text()), signal.SIGTERM)
                    at = None
        assert at is None
        return process.returncode, errors.read_text()

    code, errors = job("step 4/300")
    assert code == 0, errors
    assert "processes as named by SLURM: 1 of 2, coordinator localhost:" in errors
    assert errors.count("stopped by SIGTERM to one of the processes") == 2
    assert f"requeueing job {environment['SLURM_JOB_ID']}" in errors
    assert len(slurm.calls("scontrol")) == 1
    code, errors = job()
    assert code == 0, errors
    assert "going on from the checkpoint of step" in errors and "the run is done" in errors
    steps = [record["step"] for record in read_json_lines(RunFolder(workdir).metrics_file)]
    assert steps == list(range(1, 301))
