"""launch/slurm.sh on a real SLURM of two nodes: stopped, preempted, killed, lost, and gone on with.

What each test saw of SLURM is printed as a row of a table (`pytest -m slurm -s`).
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from layerskip_jax.run_folder.paths import RunFolder
from layerskip_jax.training.restore import load_run
from tests.launch.scripts import REPOSITORY
from tests.launch.slurm_cluster import NoSlurm, processes_in, slurm_cluster, wait_for
from tests.multihost.test_processes import checksums, records

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
# The service that tells all processes of a stop looks once a second, so a run has to last a while.
STEPS, SAVED = 240, (60, 120, 180, 240)
SETTINGS = [
    "--config.mesh.shape.fsdp=-1",
    "--config.mesh.shape.data=1",
    "--config.layer_dropout.execution=mask",
    f"--config.training.steps={STEPS}",
    "--config.checkpoint.every_steps=60",
    f"--config.checkpoint.keep={len(SAVED) + 4}",
]


@pytest.fixture(scope="module")
def cluster():
    try:
        with slurm_cluster() as cluster:
            yield cluster
    except NoSlurm as error:
        pytest.skip(f"NO SLURM HERE, so launch/slurm.sh meets none: {error}")


class Job:
    """A job on the cluster, and what is seen of it."""

    def __init__(self, cluster, name: str):
        """Takes the number of the job, or ARRAY_INDEX of one in an array."""
        self.cluster, self.name = cluster, name
        self.number = self.told("JobId")
        self._log = cluster.folder / f"job-{self.number}.log"

    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def told(self, name: str) -> str:
        """What scontrol says of the job."""
        return self.cluster.job(self.name)[name]

    def starts(self) -> list[str]:
        """The log of each start."""
        return self.log().split("0: processes as named by SLURM")[1:]

    def step(self, start: int = 0) -> int:
        """The last step that it printed in its so-many-th start."""
        log = self.starts()[start] if len(self.starts()) > start else ""
        return max(map(int, re.findall(rf"0: step (\d+)/{STEPS}  loss", log)), default=0)

    def at(self, step: int, start: int = 0) -> None:
        """Waits until it is at a step, in its so-many-th start."""
        wait_for(f"step {step} of start {start}", lambda: self.step(start) >= step)

    def stopped(self) -> list[int]:
        """The steps that signals stopped it at, which its processes agree on."""
        said = r"(\d): stopped by SIGTERM to one of the processes after step (\d+)"
        steps = {"0": [], "1": []}
        for rank, step in re.findall(said, self.log()):
            steps[rank].append(int(step))
        assert steps["0"] == steps["1"]
        return steps["0"]

    def restarted(self, start: int, last: int, since: float) -> tuple[int, str]:
        """Waits for the first step of a start; returns where from, and the table's last cells."""
        self.at(1, start)
        took = time.monotonic() - since
        come_from = int(
            re.findall(r"0: going on from the checkpoint of step (\d+)", self.log())[-1]
        )
        return come_from, f"{last - come_from} | {took:.0f} s"

    def ended(self, state: str, code: str) -> None:
        """Waits for its end, which must be of that kind."""
        ending = ("RUNNING", "PENDING", "COMPLETING")
        wait_for("the end", lambda: self.told("JobState") not in ending)
        assert (self.told("JobState"), self.told("ExitCode")) == (state, code), self.log()


def submit(cluster, workdir, arguments, *options, script="launch/slurm.sh", more=()) -> str:
    """Submits a run to two nodes by the launcher, or to one by sbatch; returns the job's number."""
    recipe, data, _ = arguments
    log = f"{cluster.folder}/job-%j.log"
    words = [f"--python={sys.executable}", "--"]
    words += ["train", recipe, data, f"--workdir={workdir}", *SETTINGS, *more]
    if script == "launch/slurm.sh":
        words = [script, "--nodes=2", "--gpus=0", f"--log={log}", *options, *words]
    else:
        nodes = ["--nodes=1", "--ntasks-per-node=1", "--exclusive", "--requeue"]
        words = [
            "sbatch",
            *nodes,
            "--open-mode=append",
            f"--output={log}",
            *options,
            script,
            *words,
        ]
    said = cluster.run(*words, JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="1")
    return said.split()[-1]


def row(*cells: object) -> None:
    print("\n|", " | ".join(map(str, cells)), "|")


@pytest.fixture(scope="module")
def whole(cluster, arguments, made_once):
    """A job that nothing disturbs, from its start to its end."""

    def make(folder):
        job = Job(cluster, submit(cluster, folder / "whole", arguments))
        job.ended("COMPLETED", "0:0")
        assert job.told("Restarts") == "0"
        assert "launch/slurm.sbatch: the run is done" in job.log()
        assert "0: processes as named by SLURM: 0 of 2, coordinator n1:" in job.log()
        assert "1: processes as named by SLURM: 1 of 2, coordinator n1:" in job.log()
        steps = [record["step"] for record in records(folder / "whole")]
        assert steps == list(range(1, STEPS + 1))

    return made_once("slurm", make) / "whole"


@pytest.fixture
def begun(cluster, whole, request):
    """A folder of that run as it was at step 60."""
    folder = RunFolder(shutil.copytree(whole, cluster.folder / request.node.name))
    for step in SAVED[1:]:
        shutil.rmtree(folder.checkpoints / str(step))
    lines = folder.metrics_file.read_text().splitlines()
    folder.metrics_file.write_text("\n".join(lines[:60]) + "\n")
    return folder.home


def assert_as(whole, workdir, to=STEPS):
    """Equal batches up to a step, and equal parameters wherever both saved."""
    assert records(workdir)[:to] == records(whole)[:to]
    assert records(workdir)[to - 1]["step"] == to
    saved = [step for step in SAVED if step <= to]
    for step in saved:
        assert checksums(workdir, step) == checksums(whole, step)


def noticed(pid: int) -> bool:
    """Whether SIGTERM came to a stopped process; where SLURM woke it first, it may have ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True
    waiting = [int(mask, 16) for mask in re.findall(r"Pnd:\t(\w+)", status)]
    return "T (stopped)" not in status or any(mask >> (signal.SIGTERM - 1) & 1 for mask in waiting)


def test_stopped_by_scancel_and_requeued_then_the_controller_restarts(
    cluster, whole, begun, arguments
):
    job = Job(cluster, submit(cluster, begun, arguments, "--restarts=0"))
    job.at(70)
    since = time.monotonic()
    cluster.run("scancel", "--signal=TERM", job.number)
    wait_for("the requeue", lambda: job.told("Restarts") == "1")
    (stopped,) = job.stopped()
    assert f"exit code 75: requeueing job {job.number}" in job.log()
    last, after = job.restarted(1, stopped, since)
    row("`scancel --signal=TERM`", "requeued under its id", 75, after)
    assert last == stopped

    cluster.kill_daemon("slurmctld")
    since, step = time.monotonic(), job.step(1)
    job.at(step + 5, 1)
    after = f"0 | {time.monotonic() - since:.0f} s"
    cluster.start_controller()
    job.ended("COMPLETED", "0:0")
    row("controller ended and started", "nothing: the run goes on", 0, after)
    assert job.told("Restarts") == "1"
    assert_as(whole, begun)


def test_preempted_and_then_at_its_time_limit(cluster, whole, begun, arguments):
    job = Job(cluster, submit(cluster, begun, arguments, "--restarts=0", "--grace=45", "--time=30"))
    job.at(70)
    since = time.monotonic()
    command = ["sbatch", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=true"]
    urgent = cluster.run(*command).split()[-1]
    wait_for("the urgent job", lambda: cluster.job(urgent)["JobState"] == "COMPLETED")
    (stopped,) = job.stopped()
    last, after = job.restarted(1, stopped, since)
    row("preempted by a higher partition", "SIGTERM, requeued under its id", 75, after)
    assert last == stopped and job.told("Restarts") == "1"

    # SLURM looks at its limits twice a minute; meanwhile the run stands still.
    tasks = [cluster.task(job.number, rank) for rank in (0, 1)]
    for task in tasks:
        os.kill(task, signal.SIGSTOP)
    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=1")
    wait_for("the notice", lambda: all(map(noticed, tasks)))
    since = time.monotonic()
    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=30")
    for task in tasks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(task, signal.SIGCONT)
    wait_for("the requeue", lambda: job.told("Restarts") == "2")
    stopped = job.stopped()[1]
    last, after = job.restarted(2, stopped, since)
    row("notice of the time limit", "SIGTERM, requeued under its id", 75, after)
    assert last == stopped
    job.ended("COMPLETED", "0:0")
    assert_as(whole, begun)


def test_tasks_killed_restart_it_as_often_as_restarts_says(cluster, whole, begun, arguments):
    job = Job(cluster, submit(cluster, begun, arguments, "--restarts=1"))
    job.at(70)
    os.kill(cluster.task(job.number, 1), signal.SIGKILL)
    since, step = time.monotonic(), job.step()
    last, after = job.restarted(1, step, since)
    row("`kill -9` of task 1", "step ended; launcher restarts in the allocation", 137, after)
    assert last == 60
    job.at(130, 1)
    os.kill(cluster.task(job.number, 0), signal.SIGKILL)
    job.ended("FAILED", "137:0")
    row("`kill -9` of task 0, `--restarts` used up", "job FAILED", 137, "- | -")
    log = job.log()
    assert "exit code 137: restarting, 1 of 1" in log
    assert "crash 2 (exit code 137), and --restarts=1: giving up" in log
    # One line each, and what else there was to say in the logs of the processes.
    errors = RunFolder(begun).logs / "process-0.stderr"
    says = "this process ends, so that the launcher restarts the run; what it saw is in"
    assert log.count(f"0: lost process 1 of 2 (on n2); {says} {errors}\n") == 1
    # The coordinator takes jax's client with it, which may end the other before it can say so.
    assert log.count("1: lost process 0 of 2 (on n1)") == 1 or "n1: task 0: Killed" in log
    assert "Traceback" not in log and "coordination_service" not in log
    assert "Traceback" in errors.read_text()
    assert_as(whole, begun, 120)


def test_a_node_lost_and_back_then_cancelled_for_good(cluster, whole, begun, arguments):
    job = Job(cluster, submit(cluster, begun, arguments, "--restarts=1"))
    job.at(70)
    task, since, step = cluster.task(job.number, 1), time.monotonic(), job.step()
    cluster.kill_daemon("slurmd.n2")
    keeper = re.search(r"PPid:\t(\d+)", Path(f"/proc/{task}/status").read_text())[1]
    for pid in (int(keeper), task):
        os.kill(pid, signal.SIGKILL)
    wait_for("the requeue", lambda: job.told("Restarts") == "1")
    assert cluster.node_state("n2") == "down*"
    assert "Node failure on n2" in job.log() or "waiting for n2: no answer" in job.log()
    cluster.start_node("n2")
    start = len(job.starts())
    last, after = job.restarted(start, step, since)
    row("node lost, and back", "requeued under its id", "-", after)
    assert last == 60

    job.at(130, start)
    cluster.run("scancel", job.number)
    job.ended("CANCELLED", "0:15")
    (stopped,) = job.stopped()
    row("`scancel`", "job CANCELLED, not requeued", 75, "0 | -")
    assert job.told("Restarts") == "1"
    # Reading it compares the checksum of every array.
    assert stopped > 120 and load_run(begun).step == stopped
    assert_as(whole, begun, 120)


def test_of_an_array_on_one_workdir_one_trains_at_a_time(cluster, whole, begun, arguments):
    """Two jobs for all that SLURM cares, of one node each; so the run changes their number, too."""
    array = submit(cluster, begun, arguments, "--array=0-1", script="launch/slurm.sbatch")

    def runs(index):
        return cluster.job(f"{array}_{index}")["JobState"] == "RUNNING"

    def works(job):
        return f"0: step 61/{STEPS}" in job.log()

    # Before, its elements have no numbers of their own.
    wait_for("both to start", lambda: runs(0) and runs(1))
    jobs = [Job(cluster, f"{array}_{index}") for index in (0, 1)]
    wait_for("one of both at work", lambda: any(map(works, jobs)))
    first, second = sorted(jobs, key=works, reverse=True)
    task = cluster.task(first.number, 0)
    os.kill(task, signal.SIGSTOP)
    second.ended("FAILED", "2:0")
    os.kill(task, signal.SIGCONT)
    row("two jobs, or an array, on one workdir", "the second job FAILED", 2, "- | -")
    assert "is being trained by process" in second.log()
    assert "bad input: not tried again" in second.log()
    first.ended("COMPLETED", "0:0")
    assert records(begun) == records(whole)


def test_bad_input_ends_once(cluster, arguments):
    workdir = cluster.folder / "bad"
    job = Job(cluster, submit(cluster, workdir, arguments, more=["--config.mesh.shape.fsdp=3"]))
    job.ended("FAILED", "2:0")
    row("bad input", "job FAILED", 2, "- | -")
    assert job.log().count("0: processes as named by SLURM") == 1
    assert "bad input: not tried again" in job.log()
    assert job.told("Restarts") == "0" and not workdir.exists()


def test_nothing_is_left_however_it_ends(cluster):
    """The process that started a cluster is killed while a job runs."""
    kept = [Path("/etc/hosts"), Path("/proc/mounts")]
    before = [file.read_text() for file in kept]
    start = (
        "import signal; from tests.launch.slurm_cluster import slurm_cluster\n"
        "with slurm_cluster() as cluster:\n"
        "    cluster.run('sbatch', '--nodes=2', '--output=/dev/null', '--wrap=srun sleep 1000')\n"
        "    print(cluster.folder, cluster.namespace, flush=True)\n"
        "    signal.pause()\n"
    )
    command = [sys.executable, "-c", start]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        folder, namespace = process.stdout.readline().split()
        assert len(processes_in(namespace)) > 4 and Path(folder).exists()
        process.kill()
    wait_for("its processes to end", lambda: not processes_in(namespace))
    assert not Path(folder).exists() and not Path("/etc/slurm").exists()
    assert before == [file.read_text() for file in kept]
