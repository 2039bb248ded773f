"""The step of a run, compiled for devices that are not here.

For a TPU topology the very step that `train` would run is compiled by the TPU's own compiler. For
GPUs there is none without a GPU, so what is said of them is arithmetic alone, and labelled so.
"""

import collections
import dataclasses
import math
import multiprocessing
import re
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import jax
import numpy as np
from jax.errors import JaxRuntimeError

from layerskip_jax.config import RunConfig
from layerskip_jax.hardware.chips import Chip
from layerskip_jax.hardware.topology import Topology, tpu_devices
from layerskip_jax.planning.arithmetic import calculate_step
from layerskip_jax.planning.hlo import Collective, Program
from layerskip_jax.planning.step_plan import DEFECT, Memory, Plan, Traffic, timed
from layerskip_jax.training.flops import CostModel
from layerskip_jax.training.setup import TrainSetup, make_setup


def plan_step(config: RunConfig, topology: Topology, sequence_length: int = 0) -> Plan:
    """Returns what a step of a run takes on a topology.

    Args:
      config: the run; its vocabulary must be known.
      topology: the devices. A TPU's are compiled for.
      sequence_length: S of the windows; 0 takes the longest that the model allows.

    Raises:
      ConfigError: run and devices do not fit each other, memory apart.
    """
    length = sequence_length or config.model.max_sequence_length
    if topology.chip.platform == "gpu":
        return calculate_step(config, topology, length)
    return _compile(config, topology, length)


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
        except KeyboardInterrupt:
            for child in multiprocessing.active_children():
                child.terminate()  # or leaving the pool would wait for the compiler
            raise
    estimate = calculate_step(config, topology, sequence_length or config.model.max_sequence_length)
    memory = dataclasses.replace(estimate.memory, total=None, message=DEFECT)
    return dataclasses.replace(estimate, compiled=True, memory=memory, traffic=())


def _leave_devices_alone() -> None:
    """Keeps the process from taking the accelerators of its machine, and Ctrl-C to its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    jax.config.update("jax_platforms", "cpu")


def _compile(config: RunConfig, topology: Topology, length: int) -> Plan:
    setup = make_setup(config, tpu_devices(topology))
    start = time.monotonic()
    text, stats, message = "", None, ""
    with jax.set_mesh(setup.mesh):
        lowered = setup.lower_step(length)
        try:
            compiled = lowered.compile(setup.compiler_options)
            text, stats = compiled.as_text(), compiled.memory_analysis()
        except JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            message = str(error)
    seconds = time.monotonic() - start
    cost = CostModel(setup.config, length).at_full_batch
    planned = cost.planned(0, config.training.steps)
    parameters, optimizer = _state_bytes(setup)
    limit = topology.chip.memory
    memory = Memory(parameters, optimizer, 0.0, 0.0, None, limit, message=_own_words(message))
    traffic: tuple[Traffic, ...] = ()
    if stats is not None:
        program = Program(text, _loss_turns(setup.config, cost, length))
        saved = _saved_bytes(program, setup)
        memory = dataclasses.replace(
            memory,
            activations=saved,
            temporaries=max(stats.temp_size_in_bytes - saved, 0.0),
            total=float(
                stats.argument_size_in_bytes
                + stats.output_size_in_bytes
                - stats.alias_size_in_bytes
                + stats.temp_size_in_bytes
                + stats.generated_code_size_in_bytes
            ),
            host=float(stats.host_temp_size_in_bytes),
        )
        traffic = _traffic(program.collectives(), list(setup.mesh.devices.flat), topology)
    return timed(setup.config, topology, True, memory, traffic, planned, seconds)


def _state_bytes(setup: TrainSetup) -> tuple[float, float]:
    """Returns bytes of one device's parameters and of its optimizer state."""

    def total(tree) -> float:
        leaves = jax.tree.leaves(tree)
        sizes = (math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
        return float(sum(n * leaf.dtype.itemsize for n, leaf in zip(sizes, leaves, strict=True)))

    state = setup.abstract_state()
    return total(state.parameters), total(state.optimizer)


def _saved_bytes(program: Program, setup: TrainSetup) -> float:
    """Returns what the forward scan over layers carries out of each layer.

    Those are the arrays with a leading axis of L in its state that are not parameters; one in the
    host's memory, which the compiler calls space 5, takes none of the device's.
    """
    layers = setup.config.model.num_layers
    shards = collections.Counter(
        tuple(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(setup.abstract_state().parameters["layers"])
    )
    most = 0.0
    for lines in program.computations.values():
        for line in lines:
            if line.op != "while" or program.turns(line) != layers:
                continue
            left, total = shards.copy(), 0.0
            for kind, sizes, place in re.findall(
                r"([a-z]+\d+)\[([\d,]+)\](\{[^}]*\})?", line.shape
            ):
                if "S(5)" in place:
                    continue
                shape = tuple(map(int, sizes.split(",")))
                if shape[0] != layers or len(shape) < 3:
                    continue
                if left[shape]:
                    left[shape] -= 1
                    continue
                total += math.prod(shape) * int(re.search(r"\d+", kind)[0]) / 8
            most = max(most, total)
    return most


def _loss_turns(config: RunConfig, cost: CostModel, length: int) -> float:
    """Returns the mean turns of the loops over chunks of the loss, whose bound is an array's."""
    _, early = cost.schedule
    chunks = math.ceil(length / config.training.loss_chunk)
    loops = 2 if early.max() > 0 else 1
    return chunks * (1 + float(early.mean())) / loops


def _own_words(message: str) -> str:
    """Returns the sentence of the compiler's message that has the figures."""
    found = re.search(r"(Ran out of memory.*?(?:Exceeded \w+ capacity by [\d.]+\w\.|\n))", message)
    found = found or re.search(r"(RESOURCE_EXHAUSTED[^\n]*)", message)
    return found[1].strip() if found else message[:300]


def _traffic(
    collectives: list[Collective], devices: list, topology: Topology
) -> tuple[Traffic, ...]:
    """Adds up the collectives by kind and group."""
    lines: dict[tuple, list[float]] = collections.defaultdict(lambda: [0.0, 0.0, 0.0])
    for one in collectives:
        if one.between_slices:
            count, bandwidth, over = topology.slices, topology.chip.network, "network"
        else:
            group = [devices[i] for i in one.group] or devices  # none is named: all of them
            count = len(group)
            bandwidth, over = _bandwidth(group, topology.chip)
        factor = 2 if one.written == "all-reduce" else 1
        share = (count - 1) / count if one.kind != "collective-permute" else 1
        entry = lines[one.kind, one.written, count, over]
        entry[0] += one.turns
        entry[1] += one.turns * one.size
        entry[2] += one.turns * one.size * factor * share / bandwidth
    return tuple(
        Traffic(*key, *values) for key, values in sorted(lines.items(), key=lambda i: -i[1][2])
    )


def _bandwidth(group: list, chip: Chip) -> tuple[float, str]:
    """Returns bytes/s of a device within a group, and over what.

    A torus of d dimensions offers a group the links of the dimensions that it extends along.
    """
    if len({getattr(device, "slice_index", 0) or 0 for device in group}) > 1:
        return chip.network, "network"
    coordinates = np.array([device.coords for device in group]).reshape(len(group), -1)
    extends = int((coordinates.max(axis=0) > coordinates.min(axis=0)).sum())
    return chip.links * max(extends, 1) / chip.dimensions, "links"
