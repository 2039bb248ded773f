"""The device mesh, five axes from the slowest network to the fastest.

`slice` replicates over slices or islands that a slower network joins, `data` replicates within
one, `fsdp` shards parameters, `context` splits sequences, and `tensor` splits layers.
"""

import dataclasses
import math
from collections import defaultdict

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from layerskip_jax.schema import ConfigError, require

AXES = ("slice", "data", "fsdp", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each mesh axis; one of them may be -1, for all that are left.

    Attributes:
      data: copies of the parameters within a slice, each with its rows of the batch; -1 or at
        least 1.
      fsdp: parts of the parameters and of the optimizer's state, each with its rows; -1 or at
        least 1.
      tensor: parts of each layer's heads and hidden units, and of the vocabulary; -1 or at least 1.
      context: parts of each sequence; -1 or at least 1.
      slice: TPU slices, or groups of GPUs with a faster network inside, each of which has all
        parameters; -1 or at least 1.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    slice: int = 1

    def __post_init__(self):
        for axis in AXES:
            size = getattr(self, axis)
            require(size == -1 or size >= 1, f"{axis}={size} must be -1 or at least 1")
        first, *others = [axis for axis in AXES if getattr(self, axis) == -1] or [None]
        require(
            not others,
            f"{first}=-1 and {' and '.join(f'{axis}=-1' for axis in others)} exclude each other: "
            "-1 stands for all devices that are left, so one axis at most may have it; set "
            + " ".join(f"--config.mesh.shape.{axis}=1" for axis in (first, *others[:-1])),
        )

    def resolve(self, num_devices: int) -> tuple[int, ...]:
        """Returns the sizes of `AXES` for this many devices.

        Raises:
          ConfigError: the sizes do not multiply to `num_devices`.
        """
        sizes = [getattr(self, axis) for axis in AXES]
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
    """Lays `devices` (default: all) out as a mesh with the axes `AXES`.

    Within a slice `mesh_utils` puts the axes along the physical network.

    Raises:
      ConfigError: the sizes do not fit the devices, or `slice` does not fit the slices they are in.
    """
    devices = jax.devices() if devices is None else devices
    slices, *inner = shape.resolve(len(devices))
    grids = [
        mesh_utils.create_device_mesh(inner, part, allow_split_physical_axes=True)
        for part in _slices(devices, slices)
    ]
    return Mesh(np.stack(grids), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slices(devices: list, count: int) -> list[list]:
    """Returns the devices by slice.

    TPUs know the slice they are in. Other devices are split in the order of their processes, so
    that each part holds whole processes wherever `count` divides their number.
    """
    if devices[0].platform != "tpu":
        ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
        return [list(part) for part in np.array(ordered, object).reshape(count, -1)]
    by_slice = defaultdict(list)
    for device in devices:
        by_slice[getattr(device, "slice_index", 0)].append(device)
    if len(by_slice) != count:
        raise ConfigError(
            f"config.mesh.shape.slice={count}, but the {len(devices)} devices are in "
            f"{len(by_slice)} slice(s); set --config.mesh.shape.slice={len(by_slice)}"
        )
    return [by_slice[index] for index in sorted(by_slice)]


def parts(mesh: Mesh, axes: tuple[str, ...]) -> int:
    """Returns the number of parts that an array's dimension is split into over these axes."""
    return math.prod(mesh.shape[axis] for axis in axes)
