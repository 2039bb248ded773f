"""Devices that are not here: TPU topologies to compile for, GPU clusters to calculate for."""

import dataclasses
import math
import os
import re

from layerskip_jax.hardware.chips import CHIPS, Chip
from layerskip_jax.schema import ConfigError, UserError, nearest

# libtpu looks for the TPU that it runs on. There is none: what it asks for is told here, so that it
# neither waits for a server of metadata nor warns, and two processes may compile side by side.
_WITHOUT_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many devices of one kind, joined in one way.

    Attributes:
      chip: their kind.
      shape: devices along each dimension of a TPU slice's torus; (N,) for N GPUs.
      slices: TPU slices of that shape, or groups of GPUs of which `shape` are all.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """As `parse_topology` reads it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def num_devices(self) -> int:
        """Devices of all slices together."""
        in_slices = self.slices if self.chip.platform == "tpu" else 1
        return math.prod(self.shape) * in_slices

    def __str__(self) -> str:
        """The name, and the number of slices where there are several."""
        times = f"{self.slices} x " if self.slices > 1 else ""
        return f"{times}{self.name}"


def parse_topology(text: str, slices: int = 1) -> Topology:
    """Reads `v5p:4x4x8` (the shape of a TPU slice) or `h100:64` (so many GPUs).

    Raises:
      ConfigError: it names no known chip, or no shape that this chip has.
    """
    name, _, sizes = text.partition(":")
    if name not in CHIPS:
        raise ConfigError(
            f"--topology={text}: there is no chip {name!r}; known are {', '.join(CHIPS)}."
            f"{nearest(name, CHIPS)}"
        )
    chip = CHIPS[name]
    example = {0: "64", 2: "8x8", 3: "4x4x8"}[chip.dimensions]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
        raise ConfigError(f"--topology={text}: the sizes are missing; write {name}:{example}")
    shape = tuple(map(int, sizes.split("x")))
    if len(shape) != max(chip.dimensions, 1):
        wanted = f"{chip.dimensions} sizes" if chip.dimensions else "the number of GPUs"
        raise ConfigError(f"--topology={text}: {name} wants {wanted}, as in {name}:{example}")
    if slices < 1:
        raise ConfigError(f"--slices={slices} must be at least 1")
    return Topology(chip, shape, slices)


def tpu_devices(topology: Topology) -> list:
    """Returns the devices of a TPU topology, which programs can be compiled for but not run on.

    Raises:
      UserError: libtpu is not installed.
      ConfigError: the compiler knows no such topology.
    """
    for name, value in _WITHOUT_TPU.items():
        os.environ.setdefault(name, value)
    try:
        import libtpu  # noqa: F401  only to see whether it is there
    except ModuleNotFoundError:
        raise UserError(
            "compiling for TPUs needs libtpu, which runs without one: "
            "pip install 'libtpu==0.0.42.*' (jax 0.10.2) or pip install 'jax[tpu]' (jax 0.12)"
        ) from None
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    if topology.chip.name == "v4":
        raise ConfigError(
            "--topology: v4 shows two devices a chip when compiled for without one; choose among "
            "v5e, v5p and v6e"
        )
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, num_slices=topology.slices
        )
    except (JaxRuntimeError, ValueError) as error:
        raise ConfigError(f"--topology={topology}: {error}") from error
    return list(described.devices)
