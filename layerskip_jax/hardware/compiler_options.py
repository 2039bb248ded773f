"""Settings of the compiler for each generation of chips, each with its reason.

They are those that published training recipes for these chips share. They move work in time and
memory; the mathematics stays, but sums may be formed in another order.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax

from layerskip_jax.hardware.chips import Chip
from layerskip_jax.schema import ConfigError

Value = bool | int | str


class Option(NamedTuple):
    """One setting, its value, and why."""

    name: str
    value: Value
    reason: str


# From jax 0.11.1 on the compiler calls these otherwise, and refuses the names of before.
_PIPELINE, _ON = (
    ("xla_gpu_pipeline_", "COLLECTIVE_PIPELINING_MODE_ON")
    if jax.__version_info__ >= (0, 11, 1)
    else ("xla_gpu_enable_pipelined_", True)
)
_TPU = (
    Option(
        "xla_tpu_enable_async_collective_fusion", True,
        "collectives run beside the products that do not need them",
    ),
    Option(
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather", True,
        "of these the all-gathers of fsdp above all",
    ),
    Option(
        "xla_tpu_enable_async_collective_fusion_multiple_steps", True,
        "one of them may span several products",
    ),
    Option(
        "xla_tpu_overlap_compute_collective_tc", True,
        "the core that computes also drives the links meanwhile",
    ),
)  # fmt: skip
_SLICES = (
    Option(
        "xla_tpu_enable_data_parallel_all_reduce_opt", True,
        "gradients cross between slices while the backward pass goes on",
    ),
    Option(
        "xla_tpu_data_parallel_opt_different_sized_ops", True,
        "the same for gradients of unequal sizes",
    ),
)  # fmt: skip
_COMBINE = 128 * 2**20
_GPU = (
    Option(
        "xla_gpu_enable_latency_hiding_scheduler", True,
        "collectives start early and are waited for late",
    ),
    Option(
        f"{_PIPELINE}all_gather", _ON,
        "the next layer's weights are gathered while this one computes",
    ),
    Option(
        f"{_PIPELINE}reduce_scatter", _ON,
        "the last layer's gradients are scattered while this one computes",
    ),
    Option(
        "xla_gpu_all_gather_combine_threshold_bytes", _COMBINE,
        "the matrices of one layer travel together: few large messages fill the links",
    ),
    Option("xla_gpu_reduce_scatter_combine_threshold_bytes", _COMBINE, "the same for gradients"),
    Option("xla_gpu_all_reduce_combine_threshold_bytes", _COMBINE, "the same between replicas"),
    Option(
        "xla_gpu_enable_triton_gemm", False,
        "large bfloat16 products run in cuBLAS, and nothing is tuned at compilation",
    ),
)  # fmt: skip
_BY_CHIP = {
    # Its core has 128 MiB of vector memory, of which a fusion may use 16 by default.
    "v6e": (
        Option("xla_tpu_scoped_vmem_limit_kib", 98304, "larger tiles for the products of a fusion"),
    ),
}


def compiler_table(chip: Chip | None, slices: int = 1) -> tuple[Option, ...]:
    """Returns the settings for a chip; none for a device that is not in the table of chips."""
    if chip is None:
        return ()
    if chip.platform == "gpu":
        return _GPU
    return _TPU + _BY_CHIP.get(chip.name, ()) + (_SLICES if slices > 1 else ())


def compiler_options(
    chip: Chip | None, slices: int = 1, changes: Iterable[str] = ()
) -> dict[str, Value]:
    """Returns the options to compile with, as `jax.stages.Lowered.compile` takes them.

    Args:
      chip: what it is compiled for.
      slices: how many groups of devices a slower network joins.
      changes: `NAME=VALUE` adds or replaces an option, `NAME=` takes one out.

    Raises:
      ConfigError: a change is not of that form.
    """
    options = {option.name: option.value for option in compiler_table(chip, slices)}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or not name.startswith("xla_"):
            raise ConfigError(
                f"config.compiler.options: {change!r} is not of the form xla_NAME=VALUE"
            )
        if text:
            options[name] = _value(text)
        else:
            options.pop(name, None)
    return options


def _value(text: str) -> Value:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return int(text)
    except ValueError:
        return text


def keep_compiled(cache: str, folder: str, platform: str) -> str:
    """Has jax keep compiled programs, and returns where; an empty string for nowhere.

    In a folder on an object store jax keeps them itself. What XLA would put beside them for GPUs,
    the tuning of single fusions, stays out: XLA reads and writes disks alone.

    Args:
      cache: `auto`, a folder, or empty (see `CompilerConfig`), which leaves jax's own setting.
      folder: what `auto` takes on accelerators. A CPU's programs are quick to compile and fit that
        CPU only.
      platform: the devices' platform.
    """
    if cache == "auto":
        cache = "" if platform == "cpu" else folder
    if cache:
        jax.config.update("jax_compilation_cache_dir", cache)
    if "://" in (jax.config.jax_compilation_cache_dir or ""):
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    return cache
