"""A plan compiled in a process of its own, which the compiler may end."""

import dataclasses
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import jax

from layerskip_jax.config import RunConfig
from layerskip_jax.parallel.topology import Topology
from layerskip_jax.training.plan import DEFECT, Plan, calculate_step, plan_step


def plan_step_apart(config: RunConfig, topology: Topology, sequence_length: int = 0) -> Plan:
    """Returns what `plan_step` does, compiled in a process of its own.

    A compiler that meets a defect of its own ends its process; the plan then has no total, and
    its message says so. See `plan_step` for the arguments and what is raised.
    """
    if topology.chip.platform == "gpu":
        return plan_step(config, topology, sequence_length)
    # Forking is not safe once jax has threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_leave_devices_alone) as pool:
        try:
            return pool.submit(plan_step, config, topology, sequence_length).result()
        except BrokenProcessPool:
            pass
    estimate = calculate_step(config, topology, sequence_length or config.model.max_sequence_length)
    memory = dataclasses.replace(estimate.memory, total=None, message=DEFECT)
    return dataclasses.replace(estimate, compiled=True, memory=memory, traffic=())


def _leave_devices_alone() -> None:
    """Keeps the process from taking the accelerators of its machine."""
    jax.config.update("jax_platforms", "cpu")
