"""Other layouts of a run for the same devices: which fit, and which is fastest.

Arithmetic orders the candidates, and the compiler is asked about the first of them only.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from layerskip_jax.config import RunConfig
from layerskip_jax.data.batch_sizes import BatchSizes
from layerskip_jax.distributed.mesh import AXES
from layerskip_jax.hardware.topology import Topology
from layerskip_jax.ops.remat import REMAT_POLICIES
from layerskip_jax.planning.arithmetic import calculate_step
from layerskip_jax.planning.compile import plan_step_apart
from layerskip_jax.planning.step_plan import Plan
from layerskip_jax.schema import ConfigError

# Arithmetic leaves out what the compiler adds; candidates above this share are not tried.
MOST_OF_MEMORY = 0.95


class Candidate(NamedTuple):
    """A layout of the run.

    Attributes:
      config: the run in this layout.
      changes: its settings that differ from the run's, as they stand on a command line.
      estimate: what arithmetic says of it.
    """

    config: RunConfig
    changes: tuple[str, ...]
    estimate: Plan


def candidates(config: RunConfig, topology: Topology, length: int) -> list[Candidate]:
    """Returns the layouts that arithmetic finds room for, the fastest first.

    Args:
      config: the run.
      topology: the devices.
      length: S of the windows.
    """
    found = []
    for changed in _layouts(config, topology):
        try:
            estimate = calculate_step(changed, topology, length)
        except ConfigError:
            continue
        if estimate.memory.total <= MOST_OF_MEMORY * estimate.memory.limit:
            found.append(Candidate(changed, _changes(config, changed), estimate))
    # Of two that are about equally fast, the one that changes less, then the one with more room.
    return sorted(
        found,
        key=lambda one: (
            round(math.log(one.estimate.step_seconds), 2), len(one.changes), -_room(one)
        ),
    )  # fmt: skip


def search(
    config: RunConfig,
    topology: Topology,
    length: int,
    most: int,
    say: Callable[[str], None] = lambda line: None,
) -> list[tuple[Candidate, Plan]]:
    """Returns the fastest layouts that fit, by the compiler where there is one.

    Args:
      config: the run.
      topology: the devices.
      length: S of the windows.
      most: candidates that the compiler is asked about.
      say: told of each, as it is tried.
    """
    found = []
    for candidate in candidates(config, topology, length)[:most]:
        plan = _try(candidate, topology, length, say)
        if plan is not None and plan.fits:
            found.append((candidate, plan))
    return sorted(found, key=lambda pair: pair[1].step_seconds)


def nearest_that_fits(
    config: RunConfig,
    topology: Topology,
    length: int,
    most: int = 4,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Candidate, Plan] | None:
    """Returns the layout that changes least and fits; None if none of the first `most` does."""
    ordered = sorted(
        candidates(config, topology, length), key=lambda c: (len(c.changes), -_room(c))
    )
    ordered = [candidate for candidate in ordered if candidate.changes]
    for candidate in ordered[:most]:
        plan = _try(candidate, topology, length, say)
        if plan is not None and plan.fits:
            return candidate, plan
    return None


def _room(candidate: Candidate) -> float:
    memory = candidate.estimate.memory
    return memory.limit - memory.total


def _try(candidate: Candidate, topology: Topology, length: int, say) -> Plan | None:
    say("trying " + (" ".join(candidate.changes) or "the run as it is"))
    try:
        return plan_step_apart(candidate.config, topology, length)
    except ConfigError as error:
        say(f"  {error}")
        return None


def _layouts(config: RunConfig, topology: Topology) -> Iterator[RunConfig]:
    """Yields the run under every remat, mesh and accumulation worth a thought."""
    inside = topology.num_devices // config.mesh.shape.slice
    meshes = []
    for tensor, context in itertools.product((1, 2, 4, 8), (1, 2)):
        left = inside // (tensor * context)
        if left * tensor * context != inside or config.model.num_kv_heads % tensor:
            continue
        meshes += [
            (left // fsdp, fsdp, context, tensor)
            for fsdp in (left, left // 2, left // 4)
            if fsdp and left % fsdp == 0
        ]
    batch, first = config.training.batch_size, BatchSizes.of(config.training).stages[0][1]
    for remat, (data, fsdp, context, tensor) in itertools.product(REMAT_POLICIES, meshes):
        if remat == "none":
            continue
        shape = dataclasses.replace(
            config.mesh.shape, data=data, fsdp=fsdp, context=context, tensor=tensor
        )
        shards = config.mesh.shape.slice * data * fsdp
        for accumulation in (1, 2, 4, 8, 16):
            if batch % (shards * accumulation) or first % shards:
                continue
            groups = config.layer_dropout.row_groups
            if config.layer_dropout.p_max and config.layer_dropout.execution == "gather":
                groups = math.lcm(groups, shards * accumulation)
                if first % groups:
                    continue
            yield dataclasses.replace(
                config,
                model=dataclasses.replace(config.model, remat=remat),
                mesh=dataclasses.replace(config.mesh, shape=shape),
                training=dataclasses.replace(
                    config.training, gradient_accumulation=accumulation, rows_per_device=0
                ),
                layer_dropout=dataclasses.replace(config.layer_dropout, row_groups=groups),
            )


def _changes(old: RunConfig, new: RunConfig) -> tuple[str, ...]:
    sizes = zip(AXES, old.mesh.shape.resolve(_devices(new)), strict=True)
    pairs = [(f"mesh.shape.{axis}", size, getattr(new.mesh.shape, axis)) for axis, size in sizes]
    pairs += [
        ("model.remat", old.model.remat, new.model.remat),
        (
            "training.gradient_accumulation",
            old.training.gradient_accumulation,
            new.training.gradient_accumulation,
        ),
        ("training.rows_per_device", old.training.rows_per_device, 0),
        ("layer_dropout.row_groups", old.layer_dropout.row_groups, new.layer_dropout.row_groups),
    ]
    return tuple(f"--config.{name}={b}" for name, a, b in pairs if a != b)


def _devices(config: RunConfig) -> int:
    return math.prod(getattr(config.mesh.shape, axis) for axis in AXES)
