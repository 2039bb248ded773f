"""Threads enough for CPU devices that wait for each other.

XLA's CPU backend starts the collectives of a program that do not depend on each other at once, and
each keeps a thread until all devices have come to it. All devices of a process share as many
threads as there are cores, or devices if they are more. So eight devices on two cores stand still
for good as soon as one of them holds two of the eight threads and the last one has none to come
with. Training on eight devices and one core did so after a hundred steps, two times out of three;
with threads to spare it did not.
"""

import os
import re
from collections.abc import MutableMapping

# What XLA takes for the number of cores, read when it first looks for devices.
VARIABLE = "NPROC"
# Collectives of one device that may wait at once.
THREADS_PER_DEVICE = 8


def spare_threads_for_waiting(
    environment: MutableMapping[str, str] = os.environ, *, several_processes: bool = False
) -> None:
    """Gives XLA's CPU backend threads to spare, where devices wait for each other.

    Nothing changes for one device in one process, whose products had best be split over as many
    threads as there are cores, nor where the variable is set, nor once jax has found its devices.

    Args:
      environment: the process's variables, of which `NPROC` is set.
      several_processes: whether the devices of other processes are waited for too.
    """
    from jax._src import xla_bridge

    devices = _cpu_devices(environment)
    if xla_bridge.backends_are_initialized() or (devices == 1 and not several_processes):
        return
    threads = max(_cores(), THREADS_PER_DEVICE * devices)
    environment.setdefault(VARIABLE, str(threads))


def _cores() -> int:
    """Returns the cores that this process may use, as XLA counts them: few on a shared node."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_devices(environment) -> int:
    import jax

    flags = environment.get("XLA_FLAGS", "")
    forced = re.search(r"--xla_force_host_platform_device_count=(\d+)", flags)
    return max(jax.config.jax_num_cpu_devices, int(forced[1]) if forced else 1, 1)
