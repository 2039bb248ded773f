"""Threads for CPU devices that wait for each other."""

import os
import subprocess
import sys
import types

import jax
import pytest
from jax._src import xla_bridge

from layerskip_jax.distributed import cpu_threads
from tests.conftest import REPOSITORY

FORCED = {"XLA_FLAGS": "--xla_dump_to=x --xla_force_host_platform_device_count=4"}


@pytest.mark.parametrize(
    "environment, devices, several, threads",
    [
        ({}, 1, False, None),
        ({}, 8, False, "64"),
        (FORCED, 1, False, "32"),
        ({}, 1, True, "16"),
        ({"NPROC": "3"}, 8, True, "3"),
    ],
)
def test_devices_that_wait_have_threads_to_spare(
    monkeypatch, environment, devices, several, threads
):
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: False)
    monkeypatch.setattr(jax, "config", types.SimpleNamespace(jax_num_cpu_devices=devices))
    given = dict(environment)
    cpu_threads.spare_threads_for_waiting(given, several_processes=several)
    assert given.get("NPROC") == threads


def test_once_there_are_devices_it_is_too_late():
    jax.devices()
    given = {}
    cpu_threads.spare_threads_for_waiting(given, several_processes=True)
    assert given == {}


def test_xla_starts_so_many_threads():
    """Or a later XLA reads another variable."""
    count = (
        "import os, jax; from layerskip_jax.distributed.cpu_threads import *; "
        "jax.config.update('jax_num_cpu_devices', int(os.environ['DEVICES'])); "
        "spare_threads_for_waiting(); jax.block_until_ready(jax.numpy.ones(3) + 1); "
        "print(len(os.listdir('/proc/self/task')))"
    )

    def threads(devices):
        environment = {**os.environ, "DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", count]
        return int(subprocess.check_output(command, env=environment, cwd=REPOSITORY, text=True))

    assert threads(4) - threads(1) >= 4 * cpu_threads.THREADS_PER_DEVICE - (os.cpu_count() or 1)
