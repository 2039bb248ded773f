"""Names of topologies, what is known of chips, and the compiler's settings for them."""

import types

import jax
import pytest
from jax._src.compiler import get_compile_options

from layerskip_jax.hardware.chips import CHIPS, chip_of
from layerskip_jax.hardware.compiler_options import compiler_options, compiler_table, keep_compiled
from layerskip_jax.hardware.topology import parse_topology, tpu_devices
from layerskip_jax.schema import ConfigError


def test_a_topology_is_a_chip_and_its_number():
    slices = parse_topology("v5p:4x4x8", 2)
    assert (slices.chip.name, slices.shape, slices.num_devices) == ("v5p", (4, 4, 8), 256)
    assert str(slices) == "2 x v5p:4x4x8"
    assert parse_topology("h100:64", 2).num_devices == 64


@pytest.mark.parametrize(
    "text, slices, message",
    [
        ("v7:4x4", 1, "no chip 'v7'; known are v4, v5e, .*"),
        ("v5p", 1, "the sizes are missing; write v5p:4x4x8"),
        ("v5p:4x4", 1, "v5p wants 3 sizes, as in v5p:4x4x8"),
        ("v5e:4x0", 1, "the sizes are missing; write v5e:8x8"),
        ("h100:8x8", 1, "h100 wants the number of GPUs, as in h100:64"),
        ("v5e:4x4", 0, "--slices=0 must be at least 1"),
    ],
)
def test_a_topology_that_is_none_is_refused(text, slices, message):
    with pytest.raises(ConfigError, match=message):
        parse_topology(text, slices)


def test_a_shape_that_the_compiler_does_not_know_is_refused():
    with pytest.raises(ConfigError, match="--topology=v5e:3x5: .*not divisible"):
        tpu_devices(parse_topology("v5e:3x5"))


def test_devices_of_several_slices_know_theirs():
    devices = tpu_devices(parse_topology("v5e:4x4", 2))
    assert [device.slice_index for device in devices].count(1) == 16
    assert chip_of(devices[0]) is CHIPS["v5e"]


@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("name", ["v5e", "v5p", "v6e"])
def test_the_compiler_for_tpus_takes_every_option(name):
    device = tpu_devices(parse_topology(f"{name}:2x2" + "x1" * (CHIPS[name].dimensions == 3)))[0]
    x = jax.ShapeDtypeStruct(
        (8, 128), "float32", sharding=jax.sharding.SingleDeviceSharding(device)
    )
    lowered = jax.jit(lambda x: x + 1).lower(x)
    options = compiler_options(CHIPS[name], slices=2)
    assert len(options) == len(compiler_table(CHIPS[name], 2)) >= 6
    assert lowered.compile(options)
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        lowered.compile({**options, "xla_tpu_no_such_option": True})


def test_xla_knows_every_option_for_gpus():
    """Options of all backends are known to each; a CPU ignores them."""
    assert jax.jit(lambda x: x + 1).lower(1.0).compile(compiler_options(CHIPS["h100"]))


def test_options_can_be_changed_added_and_taken_out():
    changes = ("xla_tpu_scoped_vmem_limit_kib=65536", "xla_jf_x=a", "xla_gpu_y=false")
    options = compiler_options(CHIPS["v6e"], changes=changes)
    assert options["xla_tpu_scoped_vmem_limit_kib"] == 65536
    assert options["xla_jf_x"] == "a" and options["xla_gpu_y"] is False
    without = compiler_options(CHIPS["v6e"], changes=("xla_tpu_scoped_vmem_limit_kib=",))
    assert "xla_tpu_scoped_vmem_limit_kib" not in without
    with pytest.raises(ConfigError, match="'scoped_vmem' is not of the form xla_NAME=VALUE"):
        compiler_options(CHIPS["v6e"], changes=("scoped_vmem",))


def test_other_devices_have_no_options():
    assert chip_of(types.SimpleNamespace(device_kind="cpu")) is None
    assert compiler_options(None) == {}


def test_programs_are_kept_beside_the_run_on_accelerators():
    before = jax.config.jax_compilation_cache_dir
    try:
        assert keep_compiled("auto", "run/compiled", "cpu") == ""
        assert jax.config.jax_compilation_cache_dir == before
        assert keep_compiled("auto", "run/compiled", "tpu") == "run/compiled"
        assert jax.config.jax_compilation_cache_dir == "run/compiled"
        assert keep_compiled("/elsewhere", "run/compiled", "cpu") == "/elsewhere"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(
    "cache, folder, where",
    [
        ("auto", "s3://bucket/run/compiled", ""),
        ("gs://bucket/programs", "run/compiled", ""),
        ("auto", "/run/compiled", "/run/compiled/xla_gpu_per_fusion_autotune_cache_dir"),
        ("", "run/compiled", ""),  # jax's own setting, by JAX_COMPILATION_CACHE_DIR
    ],
)
def test_xla_is_given_no_cache_on_an_object_store(cache, folder, where):
    """XLA tunes fusions for GPUs into a folder beside jax's cache, by the paths of a disk alone."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_enable_xla_caches")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        if not cache:
            jax.config.update("jax_compilation_cache_dir", "gs://bucket/mine")
        keep_compiled(cache, folder, "gpu")
        options = get_compile_options(num_replicas=1, num_partitions=1)
        debug = options.executable_build_options.debug_options
        assert debug.xla_gpu_per_fusion_autotune_cache_dir == where
        assert debug.xla_gpu_kernel_cache_file == ""
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
