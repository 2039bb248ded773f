"""What each process contributes: the rows of the batch that its own devices hold."""

from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

BatchT = TypeVar("BatchT", bound=tuple)


class BatchPlacement:
    """Lays rows of the global batch out on the mesh as `[accumulation, rows, ...]` arrays.

    Microbatch a is the a-th run of consecutive rows, split over the batch axes of the mesh,
    so each step of the accumulation finds its rows where they are.

    Attributes:
      rows: the global row numbers this process has to read, ascending.
    """

    def __init__(self, mesh: Mesh, batch_axes: tuple[str, ...], batch_size: int, accumulation: int):
        self.sharding = NamedSharding(mesh, PartitionSpec(None, batch_axes or None))
        self._shape = (accumulation, batch_size // accumulation)
        numbers = np.arange(batch_size).reshape(self._shape)
        wanted = [
            numbers[i] for i in self.sharding.addressable_devices_indices_map(self._shape).values()
        ]
        self.rows: Sequence[int] = np.unique(np.concatenate([w.ravel() for w in wanted])).tolist()
        self._local = np.full(batch_size, -1)
        self._local[self.rows] = np.arange(len(self.rows))
        self._numbers = numbers

    def place(self, batch: BatchT) -> BatchT:
        """Returns global arrays for a tuple of arrays that hold exactly `rows`, in that order."""

        def one(array: np.ndarray) -> jax.Array:
            def shard(index):
                return array[self._local[self._numbers[index[:2]]]]

            shape = (*self._shape, *array.shape[1:])
            return jax.make_array_from_callback(shape, self.sharding, shard)

        return type(batch)(*map(one, batch))
