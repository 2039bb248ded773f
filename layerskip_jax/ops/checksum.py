"""Checksums of sharded arrays, computed where the arrays are, equal on every mesh.

Each element's bits are mixed with its index in the whole array, and the results are added
modulo 2^32: a sum does not care how the elements are spread over devices.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

# Odd 32-bit constants of MurmurHash3's finalizer and of Knuth's multiplicative hash. They are
# numpy's: a jax array made at import would start the backend before the processes have met.
_KNUTH = np.uint32(2654435761)
_MIX_1, _MIX_2 = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)
_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def checksum(array: Array) -> UInt32[Array, ""]:
    """Returns the checksum of an array whose elements take 1, 2 or 4 bytes; for inside `jit`."""
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(array, _UNSIGNED[array.dtype.itemsize]).astype(jnp.uint32)
    # Built from one iota a dimension, each of which a device can make for its own part.
    index = jnp.zeros(array.shape, jnp.uint32)
    for dimension, size in enumerate(array.shape):
        index = index * np.uint32(size) + jax.lax.broadcasted_iota(
            jnp.uint32, array.shape, dimension
        )
    return _mix(bits ^ _mix(index * _KNUTH + np.uint32(1))).sum(dtype=jnp.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    x = (x ^ (x >> 16)) * _MIX_1
    x = (x ^ (x >> 13)) * _MIX_2
    return x ^ (x >> 16)


@jax.jit
def _checksums(tree: Any) -> list[Array]:
    return [checksum(leaf) for leaf in jax.tree.leaves(tree)]


def tree_checksums(tree: Any) -> dict[str, int]:
    """Returns the checksum of each array of a pytree, by its path."""
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    values = jax.device_get(_checksums(tree))
    return {path: int(value) for path, value in zip(paths, values, strict=True)}
