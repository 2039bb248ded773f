"""What is known of each accelerator: its peaks, its networks, and the compiler's settings for it.

Peaks and bandwidths are the published ones: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e), NVIDIA's
data sheets of the A100, H100 and H200 SXM. Memory of a TPU is what its compiler allows a program.
"""

import dataclasses

GIB = 2**30
GPU_MEMORY = 0.92  # share of a GPU's memory that `layerskip train` has jax take


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation of accelerators; bandwidths in bytes/s, of one device, one way.

    Attributes:
      name: as topologies are named.
      platform: `tpu` or `gpu`.
      kinds: `Device.device_kind` of its devices.
      flops: dense bfloat16 peak in FLOP/s.
      memory: bytes that a program may use.
      memory_bandwidth: between the device and its memory.
      links: to the other devices of its slice (TPU) or host (GPU), over all links.
      network: beyond that.
      dimensions: how many the TPU's torus has; 0 where every device reaches every other one alike.
      per_host: devices of one host.
    """

    name: str
    platform: str
    kinds: tuple[str, ...]
    flops: float
    memory: float
    memory_bandwidth: float
    links: float
    network: float
    dimensions: int = 0
    per_host: int = 8


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v4", "tpu", ("TPU v4",), 275e12, 31.25 * GIB, 1.2e12, 300e9, 6.25e9,
            dimensions=3, per_host=4,
        ),
        Chip(
            "v5e", "tpu", ("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * GIB, 819e9, 200e9, 3.125e9,
            dimensions=2, per_host=4,
        ),
        Chip(
            "v5p", "tpu", ("TPU v5", "TPU v5p"), 459e12, 95.74 * GIB, 2765e9, 600e9, 6.25e9,
            dimensions=3, per_host=4,
        ),
        Chip(
            "v6e", "tpu", ("TPU v6 lite", "TPU v6e"), 918e12, 31.25 * GIB, 1638e9, 400e9, 12.5e9,
            dimensions=2, per_host=4,
        ),
        Chip(
            "a100", "gpu", ("NVIDIA A100-SXM4-80GB",),
            312e12, GPU_MEMORY * 80e9, 2039e9, 300e9, 25e9,
        ),
        Chip(
            "a100-40gb", "gpu", ("NVIDIA A100-SXM4-40GB",),
            312e12, GPU_MEMORY * 40e9, 1555e9, 300e9, 25e9,
        ),
        Chip(
            "h100", "gpu", ("NVIDIA H100 80GB HBM3",),
            989e12, GPU_MEMORY * 80e9, 3350e9, 450e9, 50e9,
        ),
        Chip(
            "h200", "gpu", ("NVIDIA H200",), 989e12, GPU_MEMORY * 141e9, 4800e9, 450e9, 50e9,
        ),
    )
}  # fmt: skip


def chip_of(device) -> Chip | None:
    """Returns what is known of a `jax.Device`'s chip; None for others, such as a CPU."""
    return next((chip for chip in CHIPS.values() if device.device_kind in chip.kinds), None)


def peak_flops(devices: list, tflops: float = 0.0) -> float | None:
    """Returns the peak of all devices together in FLOP/s; None where it is not known.

    Args:
      devices: `jax.Device`s.
      tflops: peak of one device in TFLOP/s; 0 takes the published one.
    """
    chip = chip_of(devices[0])
    one = tflops * 1e12 or (chip and chip.flops)
    return one * len(devices) if one else None
