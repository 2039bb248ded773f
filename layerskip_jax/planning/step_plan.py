"""What a training step takes: memory, traffic and time.

The time is a bound, not a forecast: what the step computes at the chip's full peak, or what it
sends at the full bandwidth of its links, whichever is longer, and then the optimizer's pass over
its state at the full bandwidth of the memory:

    compute = FLOPs computed / (devices x peak)
    traffic = sum over collectives of turns x size x c (n - 1) / n / bandwidth,
              c = 2 for an all-reduce, 1 otherwise; n devices in a group
    update  = (3 x parameters + 2 x optimizer state, bytes of a device) / memory bandwidth
              (parameter, gradient and state are read, all but the gradient written, in float32)
              + Muon's FLOPs of the device that has most matrices / peak
    step    >= max(compute, traffic) + update,      MFU <= FLOPs needed / (step x devices x peak)
"""

import dataclasses

from layerskip_jax.config import RunConfig
from layerskip_jax.hardware.chips import GIB
from layerskip_jax.hardware.topology import Topology
from layerskip_jax.training.flops import StepFlops
from layerskip_jax.training.muon import stacks

DEFECT = (
    "the compiler's process ended before it was done, see above: a defect of its own, or too "
    "little memory on this machine"
)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
      parameters: float32, its share.
      optimizer: its state, such as two moments.
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
      memory: what one device holds.
      traffic: by kind and group.
      flops_needed: FLOPs of a step over all devices, the mean over the run.
      flops_computed: with what is computed again or masked.
      compute_seconds: the time to compute at full peak, as above.
      traffic_seconds: the time to send at full bandwidth, as above.
      update_seconds: the optimizer's pass over its state, and its products, as above.
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


def timed(
    config: RunConfig,
    topology: Topology,
    compiled: bool,
    memory: Memory,
    traffic: tuple[Traffic, ...],
    planned: StepFlops,
    seconds: float,
) -> Plan:
    """Returns the plan with its times.

    Args:
      config: the run, resolved for the devices.
      topology: the devices.
      compiled: whether the compiler says so.
      memory: what one device holds.
      traffic: by kind and group.
      planned: FLOPs of a step, the mean over the run.
      seconds: what the compiler took.
    """
    chip = topology.chip
    own_seconds = 0.0
    if planned.optimizer:
        devices = topology.num_devices // max(config.mesh.shape.slice, 1)
        dealt = sum(
            stack.flops for stack in stacks(config.model, devices, config.training.trainable)
        )
        own_seconds = dealt / devices / chip.flops
    computed = planned.computed - planned.optimizer
    return Plan(
        config=config,
        topology=topology,
        compiled=compiled,
        memory=memory,
        traffic=traffic,
        flops_needed=planned.needed,
        flops_computed=planned.computed,
        compute_seconds=computed / (chip.flops * topology.num_devices),
        traffic_seconds=sum((line.seconds for line in traffic), 0.0),
        update_seconds=(3 * memory.parameters + 2 * memory.optimizer) / chip.memory_bandwidth
        + own_seconds,
        compile_seconds=seconds,
    )


def fits_text(plan: Plan) -> str:
    """Returns the verdict in words."""
    memory = plan.memory
    if memory.total is None:
        verdict = "not compiled" if memory.message == DEFECT else "does not fit"
        return f"{verdict}: {memory.message}"
    share = f"{memory.total / GIB:.2f} of {memory.limit / GIB:.2f} GiB a device"
    return f"fits: {share}" if plan.fits else f"does not fit: {share}"
