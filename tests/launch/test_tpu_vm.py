"""launch/tpu_vm.sh, run with a fake gcloud."""

import os
import shlex
import signal
import subprocess

import pytest

from tests.launch.scripts import AWKWARD, LAUNCH, Fakes, run
from tests.launch.test_scripts import VM

ABSENT = (1, "ERROR: NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/run'")
ACTIVE, GONE = (0, "ACTIVE"), (0, "SUSPENDED")


@pytest.fixture
def gcloud(tmp_path):
    fakes = Fakes(tmp_path / "fakes", "gcloud", "git")
    fakes.answer("describe", ABSENT, (0, "PROVISIONING"), ACTIVE)
    return fakes


def ended(*codes):
    """What gcloud prints and returns when workers ended with these codes."""
    lines = [f"step 1/9\nlayerskip-exit-code {code}" for code in codes]
    return next((code for code in codes if code), 0), "\n".join(lines)


INSTALLED = (0, "")


def launch(fakes, *options):
    return run("tpu_vm.sh", *VM, "--poll=0", *options, "--", *AWKWARD, fakes=fakes)


def verbs(fakes):
    """The calls in order, of ssh whether it installs or runs, without looks at the state."""
    found = []
    for call in fakes.calls():
        (line,) = [word for word in call if word.startswith("--command=")] or [""]
        kind = {True: " install", False: " run"}["tar -xzf" in line] if line else ""
        if call[0] == "gcloud" and call[4] != "describe":
            found.append(call[4] + kind)
    return found


def test_done_is_deleted(gcloud):
    gcloud.answer("ssh", INSTALLED, ended(0, 0))
    done = launch(gcloud, "--spot")
    assert done.returncode == 0, done.stderr
    assert verbs(gcloud) == ["create", "scp", "ssh install", "ssh run", "delete"]
    (create,) = gcloud.calls("create")
    assert {"--spot", "--zone=us-east5-b", "--accelerator-type=v6e-16", "--node-id=run"} <= {
        *create
    }
    line = gcloud.calls("ssh")[1][-1].removeprefix("--command=")
    words = shlex.split(line)
    start = words.index("layerskip_jax") + 1
    assert words[start : start + len(AWKWARD) - 1] == AWKWARD[:-1]
    for call in gcloud.calls("ssh"):
        assert {"--node=all", "--worker=all", "--batch-size=all"} <= {*call}
    # What the run printed goes through, and the states are told once each.
    assert "step 1/9" in done.stdout
    assert done.stderr.count("run is PROVISIONING") == 1


def test_a_bucket_is_mounted_before_each_start(gcloud):
    gcloud.answer("ssh", INSTALLED, ended(75), ended(0))
    assert launch(gcloud, "--data-bucket=gs://bucket/web", "--data-cache-gib=9").returncode == 0
    _, *runs = [call[-1].removeprefix("--command=") for call in gcloud.calls("ssh")]
    assert len(runs) == 2
    for line in runs:
        words = shlex.split(line)
        start, end = words.index("launch/mounted.sh"), words.index("--")
        data = ["--data-bucket=gs://bucket/web", "--data-mount=/data", "--data-cache-gib=9"]
        assert words[start + 1 : end] == [*data, "--install"]
        # The lock is not held by what stays behind.
        assert words[end + 1] == "flock"


def test_kept_when_asked(gcloud):
    gcloud.answer("ssh", INSTALLED, ended(0))
    done = launch(gcloud, "--keep")
    assert done.returncode == 0
    assert "delete" not in verbs(gcloud)
    assert "to delete it: gcloud compute tpus queued-resources delete run" in done.stderr


def test_one_that_exists_is_used(gcloud):
    gcloud.answer("describe", ACTIVE)
    gcloud.answer("ssh", INSTALLED, ended(0))
    assert launch(gcloud).returncode == 0
    assert verbs(gcloud) == ["scp", "ssh install", "ssh run", "delete"]


def test_bad_input_is_not_tried_again(gcloud):
    gcloud.answer("ssh", INSTALLED, ended(1, 2))
    assert launch(gcloud).returncode == 2
    assert verbs(gcloud) == ["create", "scp", "ssh install", "ssh run", "delete"]


def test_stopped_goes_on_whatever_restarts_says(gcloud):
    gcloud.answer("ssh", INSTALLED, ended(75, 134), ended(75), ended(0))
    done = launch(gcloud, "--restarts=0")
    assert done.returncode == 0, done.stderr
    assert verbs(gcloud) == ["create", "scp", "ssh install", *["ssh run"] * 3, "delete"]


def test_preempted_is_requested_and_installed_again_and_is_no_crash(gcloud):
    states = [ABSENT, ACTIVE, (0, "SUSPENDING"), (0, "SUSPENDING"), GONE, ABSENT, ACTIVE]
    gcloud.answer("describe", *states)
    gcloud.answer("ssh", INSTALLED, (255, "connection lost"), INSTALLED, ended(0))
    done = launch(gcloud, "--restarts=0")
    assert done.returncode == 0, done.stderr
    once = ["create", "scp", "ssh install", "ssh run", "delete"]
    assert verbs(gcloud) == once * 2
    assert "run is SUSPENDING: it was taken away" in done.stderr


def test_preempted_while_it_is_installed(gcloud):
    gcloud.answer("describe", ABSENT, ACTIVE, GONE, GONE, ABSENT, ACTIVE)
    gcloud.answer("ssh", (255, "connection lost"), INSTALLED, ended(0))
    assert launch(gcloud, "--restarts=0").returncode == 0
    install = ["create", "scp", "ssh install"]
    assert verbs(gcloud) == [*install, "delete", *install, "ssh run", "delete"]


def test_crashes_restart_so_many_times(gcloud):
    gcloud.answer("ssh", INSTALLED, ended(0, 1), (255, "lost"), ended(134, 1))
    done = launch(gcloud, "--restarts=2")
    assert done.returncode == 1
    assert verbs(gcloud) == ["create", "scp", "ssh install", *["ssh run"] * 3, "delete"]
    assert "crashed (exit codes: 0 1): restarting, 1 of 2" in done.stderr
    assert "crashed (exit codes: none): restarting, 2 of 2" in done.stderr
    assert "crash 3 (exit codes: 1 134), and --restarts=2: giving up" in done.stderr


def test_a_request_that_fails_ends_the_launcher(gcloud):
    gcloud.answer("describe", ABSENT, (0, "WAITING_FOR_RESOURCES"), (0, "FAILED"))
    done = launch(gcloud)
    assert done.returncode == 1
    assert verbs(gcloud) == ["create", "delete"]
    assert "the request failed" in done.stderr


def test_a_request_that_is_refused_ends_the_launcher(gcloud):
    gcloud.answer("describe", ABSENT)
    gcloud.answer("create", (1, "ERROR: quota exceeded"))
    done = launch(gcloud)
    assert done.returncode == 1
    assert verbs(gcloud) == ["create"]
    assert "quota exceeded" in done.stderr and "the resource was not requested" in done.stderr


def test_without_credentials_it_does_not_wait(gcloud):
    gcloud.answer("describe", (1, "ERROR: You do not currently have an active account selected."))
    done = launch(gcloud)
    assert done.returncode == 2
    assert verbs(gcloud) == []
    assert "active account" in done.stderr and "gcloud does not tell of run" in done.stderr


def test_a_state_that_cannot_be_read_later_on_is_waited_for(gcloud):
    gcloud.answer("describe", ABSENT, (1, "ERROR: 503"), ACTIVE)
    gcloud.answer("ssh", INSTALLED, ended(0))
    assert launch(gcloud).returncode == 0
    assert verbs(gcloud) == ["create", "scp", "ssh install", "ssh run", "delete"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_the_resource_and_says_how_to_go_on(gcloud, number):
    gcloud.answer("describe", (0, "PROVISIONING"))
    # Started in the background, as by nohup, the tests may themselves have to ignore SIGINT.
    heard = ["env", f"--default-signal={number.name[3:]}"]
    command = [*heard, "bash", str(LAUNCH / "tpu_vm.sh"), *VM, "--poll=60", "--", *AWKWARD]
    path = f"{gcloud.bin}:{os.environ['PATH']}"
    with subprocess.Popen(
        command, env={**os.environ, "PATH": path}, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr.readline() == "launch/tpu_vm.sh: run is PROVISIONING\n"
        process.send_signal(number)
        said = process.stderr.read()
    assert process.returncode == 75
    assert "run is left as it is, and the same command goes on with it" in said
    assert verbs(gcloud) == []
