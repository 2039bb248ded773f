"""Memory, traffic and time of a training step on GPUs, by arithmetic alone."""

import dataclasses
import functools
import math

import jax

from layerskip_jax.config import RunConfig
from layerskip_jax.distributed.mesh import AXES
from layerskip_jax.distributed.sharding import least_accumulation
from layerskip_jax.hardware.topology import Topology
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.model.definition import ModelDefinition
from layerskip_jax.ops.attention import choose_kernel
from layerskip_jax.ops.remat import REMAT_POLICIES
from layerskip_jax.planning.step_plan import Memory, Plan, Traffic, timed
from layerskip_jax.training.flops import CostModel
from layerskip_jax.training.muon import stacks
from layerskip_jax.training.optimizer import state_share
from layerskip_jax.training.trainable import trained


def calculate_step(config: RunConfig, topology: Topology, length: int) -> Plan:
    """Returns what a step takes by arithmetic alone.

    Memory: parameters and optimizer state by their shards; a float32 gradient beside them; one
    layer's weights gathered in the compute dtype, twice; the activations that remat keeps; the exit
    buffer; a chunk of logits with its gradient. Traffic: a layer's weights gathered forward and
    backward and their gradients scattered, over fsdp; replicas of gradients reduced over data and
    slice; under `tensor` four gathers or scatters of the residual stream a layer, forward and
    backward each; with Muon each device's part of the layers' matrices there and back over fsdp and
    tensor, and back to those that hold copies. Where exits alone are trained, there is no backward
    pass, and gradients and optimizer state are theirs.
    """
    shape = dict(zip(AXES, config.mesh.shape.resolve(topology.num_devices), strict=True))
    training, chip = config.training, topology.chip
    kernel = choose_kernel(
        config.model.attention,
        chip.platform,
        packing_mask=config.model.packing_mask,
        context=shape["context"],
        window=config.model.sliding_window,
        dtype=config.model.dtype,
        head_dim=config.model.head_dim,
    )
    model = dataclasses.replace(config.model, attention=kernel)
    config = dataclasses.replace(config, model=model)
    shards = shape["slice"] * shape["data"] * shape["fsdp"]
    accumulation = training.gradient_accumulation or least_accumulation(
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
    kept = REMAT_POLICIES[model.remat].kept(model.model_dim, model.ffn_dim)
    per_value = tokens * model.num_layers * width / shape["tensor"]
    activations = 0.0 if training.trainable == "exits" else float(per_value * kept)
    cost = CostModel(config, length).at_full_batch
    _, early = cost.schedule
    frozen = training.trainable == "exits"
    count = len(model.exits.trained(model.num_layers)) if frozen else float(early.max())
    exits = count * tokens * model.model_dim * width / shape["tensor"]
    logits = 2 * 4 * rows * training.loss_chunk * model.vocab_rows / shape["tensor"]
    working = tokens * (4 * model.model_dim + 3 * model.ffn_dim) * width / shape["tensor"]
    part, whole = _sizes(model, training.trainable)
    changed = 4.0 * part if frozen else parameters * part / whole
    temporaries = changed + gathered + exits + logits + working
    optimizer = changed * state_share(config.optimizer, model, training.trainable)
    memory = Memory(
        parameters, optimizer, activations, temporaries,
        parameters + optimizer + activations + temporaries, chip.memory,
        host=float(per_value * model.model_dim) if model.remat == "offload" and not frozen else 0.0,
    )  # fmt: skip

    layer_bytes = float(layer * width)
    traffic = _traffic(config, topology, shape, accumulation, layer_bytes, tokens, changed)
    planned = cost.planned(0, training.steps)
    return timed(config, topology, False, memory, traffic, planned, 0.0)


@functools.cache
def _sizes(model: ModelConfig, trainable: str) -> tuple[int, int]:
    """Returns the scalars that are trained, and all; kept, since a search asks for every layout."""
    shapes = ModelDefinition(model).shapes
    trees = trained(shapes, trainable), shapes
    part, whole = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in trees)
    return part, whole


def _traffic(
    config: RunConfig,
    topology: Topology,
    shape: dict[str, int],
    accumulation: int,
    layer_bytes: float,
    tokens: float,
    changed: float,
) -> tuple[Traffic, ...]:
    """Returns the collectives of a step, given the bytes of a layer in the compute dtype.

    And those of the parameters that it changes, in float32.
    """
    model, chip = config.model, topology.chip
    width = 2 if model.dtype == "bfloat16" else 4

    def line(kind, axis, size, turns):
        count, inside = shape[axis], math.prod(shape[a] for a in _inner(axis))
        near = axis != "slice" if chip.dimensions else count * inside <= chip.per_host
        over = "links" if near else "network"
        factor = (2 if kind == "all-reduce" else 1) * (count - 1) / count
        seconds = size * turns * factor / (chip.links if over == "links" else chip.network)
        return Traffic(kind, kind, count, over, turns, size * turns, seconds)

    traffic = []
    turns = float(model.num_layers * accumulation)
    passes = 1 if config.training.trainable == "exits" else 2
    if shape["fsdp"] > 1:
        size = layer_bytes / shape["tensor"]
        traffic += [line("all-gather", "fsdp", size, passes * turns)]
        if passes == 2:
            traffic += [line("reduce-scatter", "fsdp", size, turns)]
    for axis in ("data", "slice"):
        if shape[axis] > 1:
            traffic += [line("all-reduce", axis, changed * width / 4, float(accumulation))]
    if shape["tensor"] > 1:
        size = tokens * model.model_dim * width
        traffic += [line("all-gather", "tensor", size, 2 * passes * turns)]
        traffic += [line("reduce-scatter", "tensor", size, 2 * passes * turns)]
    if config.optimizer.name == "muon" and passes == 2:
        moved = stacks(model, 1, config.training.trainable)
        whole = float(sum(stack.count * stack.m * stack.n for stack in moved)) * width
        size = whole / (shape["fsdp"] * shape["tensor"])
        for axis in ("fsdp", "tensor", "data", "context"):
            if shape[axis] > 1:
                dealt = axis in ("fsdp", "tensor")
                kind, turns = ("all-to-all", 2.0) if dealt else ("all-gather", 1.0)
                traffic += [line(kind, axis, size, turns)]
    return tuple(traffic)


def _inner(axis: str) -> tuple[str, ...]:
    return AXES[AXES.index(axis) + 1 :]
