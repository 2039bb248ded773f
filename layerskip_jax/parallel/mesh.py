"""The device mesh: `data` replicates, `fsdp` shards parameters, `tensor` splits layers."""

import dataclasses
import math

import jax
from jax.sharding import AxisType, Mesh

from layerskip_jax.schema import ConfigError, require

AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each mesh axis; one of them may be -1, for all that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        for axis, size in zip(AXES, sizes, strict=True):
            require(size == -1 or size >= 1, f"{axis}={size} must be -1 or at least 1")
        require(sizes.count(-1) <= 1, f"only one of {AXES} may be -1, not {sizes}")

    def resolve(self, num_devices: int) -> tuple[int, ...]:
        """Returns the sizes of `AXES` for this many devices.

        Raises:
          ConfigError: the sizes do not multiply to `num_devices`.
        """
        sizes = dataclasses.astuple(self)
        fixed = math.prod(size for size in sizes if size != -1)
        left = num_devices // fixed
        if fixed * (left if -1 in sizes else 1) != num_devices:
            wanted = ", ".join(f"{a}={s}" for a, s in zip(AXES, sizes, strict=True))
            raise ConfigError(
                f"config.mesh.shape ({wanted}) does not fit {num_devices} device(s); the sizes "
                "must multiply to that number, and one of them may be -1"
            )
        return tuple(left if size == -1 else size for size in sizes)


def make_mesh(shape: MeshShape, devices: list | None = None) -> Mesh:
    """Lays `devices` (default: all) out as a mesh with the axes `AXES`."""
    devices = jax.devices() if devices is None else devices
    sizes = shape.resolve(len(devices))
    return jax.make_mesh(sizes, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def batch_shards(mesh: Mesh, batch_axes: tuple[str, ...]) -> int:
    """Returns the number of parts the batch is split into."""
    return math.prod(mesh.shape[axis] for axis in batch_axes)
