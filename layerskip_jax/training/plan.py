"""Memory, traffic and time of a training step on devices that are not here.

For a TPU topology the very step that `train` would run is compiled by the TPU's own compiler. For
GPUs there is none without a GPU, so what is said of them is arithmetic alone, and labelled so.

The time is a bound, not a forecast: what the step computes at the chip's full peak, or what it
sends at the full bandwidth of its links, whichever is longer, and then the optimizer's pass over
its state at the full bandwidth of the memory:

    compute = FLOPs computed / (devices x peak)
    traffic = sum over collectives of turns x size x c (n - 1) / n / bandwidth,
              c = 2 for an all-reduce, 1 otherwise; n devices in a group
    update  = 28 bytes x parameters of a device / memory bandwidth
              (read parameter, gradient and two moments, write all but the gradient, float32)
    step    >= max(compute, traffic) + update,      MFU <= FLOPs needed / (step x devices x peak)
"""

import collections
import dataclasses
import math
import re
import time

import jax
import numpy as np
from jax.errors import JaxRuntimeError

from layerskip_jax.config import RunConfig
from layerskip_jax.ops.attention import choose_kernel
from layerskip_jax.parallel.chips import GIB, Chip
from layerskip_jax.parallel.hlo import Collective, Program
from layerskip_jax.parallel.mesh import AXES
from layerskip_jax.parallel.sharding import least_accumulation
from layerskip_jax.parallel.topology import Topology, tpu_devices
from layerskip_jax.training.cost import CostModel
from layerskip_jax.training.setup import TrainSetup, make_setup

UPDATE_BYTES = 28
DEFECT = (
    "the compiler's process ended before it was done, see above: a defect of its own, or too "
    "little memory on this machine"
)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
      parameters: float32, its share.
      optimizer: both moments.
      activations: what the scan over layers saves for the backward pass.
      temporaries: everything else that the step needs beside its arguments.
      total: all of it at once, the program included; None where it does not fit.
      limit: what a program may use.
      host: what the step keeps in the memory of the device's host instead.
      message: the compiler's own words where it does not fit.
    """

    parameters: float
    optimizer: float
    activations: float
    temporaries: float
    total: float | None
    limit: float
    host: float = 0.0
    message: str = ""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind over one group of devices.

    Attributes:
      kind: what they are for.
      written: what the compiler wrote them as.
      devices: in a group.
      over: `links` (within a slice or host) or `network`.
      turns: how many a step runs.
      size: bytes that they gather, scatter or reduce in a step, on one device.
      seconds: at the full bandwidth.
    """

    kind: str
    written: str
    devices: int
    over: str
    turns: float
    size: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step takes.

    Attributes:
      config: the run, resolved for the devices.
      topology: the devices.
      compiled: whether the compiler says so, not arithmetic alone.
      memory: of one device.
      traffic: by kind and group.
      flops_needed: of a step, over all devices, the mean over the run.
      flops_computed: with what is computed again or masked.
      compute_seconds: see the module.
      traffic_seconds: see the module.
      update_seconds: see the module.
      compile_seconds: what the compiler took.
    """

    config: RunConfig
    topology: Topology
    compiled: bool
    memory: Memory
    traffic: tuple[Traffic, ...]
    flops_needed: float
    flops_computed: float
    compute_seconds: float
    traffic_seconds: float
    update_seconds: float
    compile_seconds: float

    @property
    def fits(self) -> bool:
        """Whether the devices have the memory."""
        return self.memory.total is not None and self.memory.total <= self.memory.limit

    @property
    def step_seconds(self) -> float:
        """The least time of a step."""
        return max(self.compute_seconds, self.traffic_seconds) + self.update_seconds

    @property
    def mfu(self) -> float:
        """The most that MFU can be."""
        peak = self.topology.chip.flops * self.topology.num_devices
        return self.flops_needed / (self.step_seconds * peak)


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
    cost = CostModel(setup.config, length)
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
    return _timed(setup.config, topology, True, memory, traffic, planned, parameters, seconds)


def _timed(config, topology, compiled, memory, traffic, planned, parameters, seconds) -> Plan:
    chip = topology.chip
    return Plan(
        config=config,
        topology=topology,
        compiled=compiled,
        memory=memory,
        traffic=traffic,
        flops_needed=planned.needed,
        flops_computed=planned.computed,
        compute_seconds=planned.computed / (chip.flops * topology.num_devices),
        traffic_seconds=sum((line.seconds for line in traffic), 0.0),
        update_seconds=UPDATE_BYTES / 4 * parameters / chip.memory_bandwidth,
        compile_seconds=seconds,
    )


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


def calculate_step(config: RunConfig, topology: Topology, length: int) -> Plan:
    """Returns what a step takes by arithmetic alone.

    Memory: parameters and moments by their shards; a float32 gradient beside them; one layer's
    weights gathered in the compute dtype, twice; the activations that remat keeps; the exit buffer;
    a chunk of logits with its gradient. Traffic: a layer's weights gathered forward and backward
    and their gradients scattered, over fsdp; replicas of gradients reduced over data and slice;
    under `tensor` four gathers or scatters of the residual stream a layer, forward and backward
    each.
    """
    shape = dict(zip(AXES, config.mesh.shape.resolve(topology.num_devices), strict=True))
    training, chip = config.training, topology.chip
    kernel = choose_kernel(
        config.model.attention,
        chip.platform,
        packing_mask=config.model.packing_mask,
        context=shape["context"],
    )
    model = dataclasses.replace(config.model, attention=kernel)
    config = dataclasses.replace(config, model=model)
    shards = shape["slice"] * shape["data"] * shape["fsdp"]
    accumulation = training.accumulation or least_accumulation(
        training.batch_size, training.rows_per_device, shards
    )
    rows = training.batch_size / shards / accumulation
    tokens = rows * length / shape["context"]
    layer = model.head_dim * model.model_dim * (2 * model.num_heads + 2 * model.num_kv_heads)
    layer += 3 * model.model_dim * model.ffn_dim
    heads = model.vocab_rows * model.model_dim * (1 if model.tie_embeddings else 2)
    split = shape["fsdp"] * shape["tensor"]
    parameters = 4.0 * (layer * model.num_layers + heads) / split
    width = 2 if model.dtype == "bfloat16" else 4
    gathered = 2 * layer * width / shape["tensor"]
    kept = {  # values a token that a layer keeps, over the residual stream and over `tensor`
        "none": 6 * model.model_dim + 3 * model.ffn_dim,
        "dots": 4 * model.model_dim + 2 * model.ffn_dim,
        "save_attention": 2 * model.model_dim,
        "full": model.model_dim,
        "offload": 0,
    }[model.remat]
    per_value = tokens * model.num_layers * width / shape["tensor"]
    activations = float(per_value * kept)
    cost = CostModel(config, length)
    _, early = cost.schedule
    exits = float(early.max()) * tokens * model.model_dim * width / shape["tensor"]
    logits = 2 * 4 * rows * training.loss_chunk * model.vocab_rows / shape["tensor"]
    working = tokens * (4 * model.model_dim + 3 * model.ffn_dim) * width / shape["tensor"]
    temporaries = parameters + gathered + exits + logits + working
    memory = Memory(
        parameters, 2 * parameters, activations, temporaries,
        3 * parameters + activations + temporaries, chip.memory,
        host=float(per_value * model.model_dim) if model.remat == "offload" else 0.0,
    )  # fmt: skip

    def line(kind, axis, size, turns):
        count, inside = shape[axis], math.prod(shape[a] for a in _inner(axis))
        near = axis != "slice" if chip.dimensions else count * inside <= chip.per_host
        over = "links" if near else "network"
        factor = (2 if kind == "all-reduce" else 1) * (count - 1) / count
        seconds = size * turns * factor / (chip.links if over == "links" else chip.network)
        return Traffic(kind, kind, count, over, turns, size * turns, seconds)

    traffic = []
    turns = float(model.num_layers * accumulation)
    if shape["fsdp"] > 1:
        size = layer * width / shape["tensor"]
        traffic += [line("all-gather", "fsdp", size, 2 * turns)]
        traffic += [line("reduce-scatter", "fsdp", size, turns)]
    for axis in ("data", "slice"):
        if shape[axis] > 1:
            traffic += [line("all-reduce", axis, parameters * width / 4, float(accumulation))]
    if shape["tensor"] > 1:
        size = tokens * model.model_dim * width
        traffic += [line("all-gather", "tensor", size, 4 * turns)]
        traffic += [line("reduce-scatter", "tensor", size, 4 * turns)]
    planned = cost.planned(0, training.steps)
    return _timed(config, topology, False, memory, tuple(traffic), planned, parameters, 0.0)


def _inner(axis: str) -> tuple[str, ...]:
    return AXES[AXES.index(axis) + 1 :]


def fits_text(plan: Plan) -> str:
    """Returns the verdict in words."""
    memory = plan.memory
    if memory.total is None:
        verdict = "not compiled" if memory.message == DEFECT else "does not fit"
        return f"{verdict}: {memory.message}"
    share = f"{memory.total / GIB:.2f} of {memory.limit / GIB:.2f} GiB a device"
    return f"fits: {share}" if plan.fits else f"does not fit: {share}"
