"""One training at a time in a folder, on a disk and on a store."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import fsspec
import pytest

from layerskip_jax.run_folder import lock
from layerskip_jax.run_folder.lock import locked
from layerskip_jax.run_folder.paths import RunFolder, run_folder
from layerskip_jax.schema import UserError
from tests.stores import gs_store, s3_store

HOLD = """
import sys, time
from pathlib import Path
from layerskip_jax.run_folder.lock import locked
from layerskip_jax.run_folder.paths import RunFolder
with locked(RunFolder(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(lock, "LEASE_SECONDS", 1.0)


def test_a_second_process_is_told_who_has_the_folder_and_a_killed_one_leaves_it(tmp_path):
    workdir = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(workdir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        named = f"run is being trained by process {process.pid} on {socket.gethostname()} since 2"
        with pytest.raises(UserError, match=named), locked(RunFolder(workdir)):
            pass
        process.send_signal(signal.SIGKILL)
    with locked(RunFolder(workdir)):
        assert json.loads((workdir / ".lock").read_text())["process"] == os.getpid()
    assert (workdir / ".lock").read_text() == ""


def test_a_file_system_without_locks_is_said_so(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with locked(RunFolder(tmp_path)):
        assert "cannot be locked (No locks available)" in caplog.text


@pytest.fixture(scope="module", params=[s3_store, gs_store], ids=["s3", "gs"])
def store(request):
    with request.param() as address:
        yield address


def leave(workdir, **changes):
    """Leaves a lock as another process would, and returns how to write it anew."""
    filesystem, name = fsspec.core.url_to_fs(f"{workdir}/.lock")
    holder = {"host": "elsewhere", "process": 17, "since": "yesterday", **changes}

    def write():
        filesystem.pipe_file(name, json.dumps({**holder, "renewed": time.time()}).encode())

    write()
    return write


def test_a_store_has_one_training_at_a_time_too(store):
    workdir = f"{store}/one"
    lives = leave(workdir, host=socket.gethostname(), process=os.getppid())
    done = threading.Event()

    def renew():
        while not done.wait(0.1):
            lives()

    thread = threading.Thread(target=renew)
    thread.start()
    with (
        pytest.raises(UserError, match=f"by process {os.getppid()} on .* since yesterday"),
        locked(run_folder(workdir)),
    ):
        pass
    done.set()
    thread.join()


def test_the_lock_of_a_store_goes_with_its_holder(store):
    folder = run_folder(f"{store}/goes")
    with locked(folder):
        seen = lock._LockObject(folder.home)
        time.sleep(0.3)
        assert seen.read()["renewed"] > seen.first["renewed"]
        if store.startswith(
            "s3"
        ):  # whoever comes at the same moment; the other knows no such write
            assert not lock._LockObject(folder.home).create()
    assert not (folder.home / ".lock").exists()


def test_a_lock_left_on_a_store_is_taken_over_once_it_is_no_more_renewed(store, caplog):
    workdir = f"{store}/left"
    leave(workdir)
    with locked(run_folder(workdir)):
        assert "a sign of life of process 17 on elsewhere since yesterday" in caplog.text
        # In one request: it may be renewed between looking for its size and reading it.
        held = lock._LockObject(run_folder(workdir).home).read()
        assert held["process"] == os.getpid()


def test_a_lock_left_by_a_process_of_this_host_is_free_at_once(store, caplog):
    workdir = f"{store}/here"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    leave(workdir, host=socket.gethostname(), process=gone.pid)
    with locked(run_folder(workdir)):
        assert "waiting" not in caplog.text


def test_who_loses_the_lock_of_a_store_ends(store, monkeypatch):
    workdir, ended = f"{store}/lost", []
    monkeypatch.setattr(lock, "end_for_restart", ended.append)
    with locked(run_folder(workdir)):
        leave(workdir)
        for _ in range(50):
            time.sleep(0.05)
            if ended:
                break
    assert ended and ended[0].startswith("another process has taken over")
    assert (run_folder(workdir).home / ".lock").exists(), "it is not ours to remove"
