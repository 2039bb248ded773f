"""How fast the device reads its memory: what decoding at batch 1 can at best be bound by."""

import functools
import time

import jax
import jax.numpy as jnp

PROBE_BYTES = 2**28


@functools.cache
def read_bandwidth(num_bytes: int = PROBE_BYTES) -> float:
    """Measures the bytes a second at which the first device reads a float32 array.

    Measured once in a process, as the best of five sums over the array.

    Args:
      num_bytes: size of the array; it should not fit in the caches.
    """
    array = jnp.ones(num_bytes // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    total(array).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        total(array).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return array.nbytes / min(seconds)
