import dataclasses

import jax
import numpy as np
import pytest

from layerskip_jax.distributed.mesh import MeshShape, make_mesh
from layerskip_jax.distributed.processes import BatchPlacement
from layerskip_jax.distributed.sharding import ShardingRules
from layerskip_jax.early_exit_loss import EarlyExitConfig
from layerskip_jax.schema import ConfigError
from layerskip_jax.training.setup import make_setup
from layerskip_jax.training.step import Batch
from tests.helpers import random_batch, small_model, small_run, with_training


def _on_mesh(config, shape, rules=None):
    mesh = dataclasses.replace(config.mesh, shape=shape, rules=rules or config.mesh.rules)
    return dataclasses.replace(config, mesh=mesh)


@pytest.mark.parametrize(
    "shape, expected",
    [
        (MeshShape(), (1, 8, 1, 1, 1)),
        (MeshShape(1, -1, 2), (1, 1, 4, 1, 2)),
        (MeshShape(2, 2, 2), (1, 2, 2, 1, 2)),
        (MeshShape(1, -1, context=2, slice=2), (2, 1, 2, 2, 1)),
    ],
)
def test_one_axis_may_be_left_open(shape, expected):
    assert shape.resolve(8) == expected


@pytest.mark.parametrize("shape", [MeshShape(3, -1, 1), MeshShape(2, 2, 1), MeshShape(16, 1, 1)])
def test_a_mesh_that_does_not_fit_is_refused(shape):
    with pytest.raises(ConfigError, match="does not fit 8 device"):
        shape.resolve(8)


def test_bad_mesh_sizes_are_refused():
    with pytest.raises(ConfigError, match="fsdp=0 must be -1 or at least 1"):
        MeshShape(fsdp=0)
    with pytest.raises(ConfigError, match="data=-1 and fsdp=-1 .* one axis at most"):
        MeshShape(-1, -1, 1)
    with pytest.raises(ConfigError, match="'model' is no mesh axis"):
        ShardingRules(mlp=("model",))


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="batch_size=12 .* 8 batch shards .* multiple of 8"):
        make_setup(with_training(small_run(), batch_size=12))
    with pytest.raises(ConfigError, match="accumulation=3 must divide .*batch_size=16"):
        make_setup(with_training(small_run(), gradient_accumulation=3))


def test_heads_that_tensor_does_not_divide_are_refused():
    config = _on_mesh(small_run(), MeshShape(2, 1, 4))
    with pytest.raises(ConfigError, match="attention.k: its axis 'kv_heads' of size 2 .* 4 dev"):
        make_setup(config)


def test_two_dimensions_on_one_mesh_axis_are_refused():
    config = _on_mesh(small_run(), MeshShape(2, 2, 2), ShardingRules(embed=("tensor",)))
    with pytest.raises(ConfigError, match="would use a mesh axis twice"):
        make_setup(config)


@pytest.mark.parametrize("shape", [MeshShape(8, 1, 1), MeshShape(2, 2, 2), MeshShape(1, 1, 8)])
def test_any_mesh_starts_from_the_same_parameters(shape):
    config = small_run(model=small_model(num_heads=8, num_kv_heads=8))
    alone = make_setup(config, jax.devices()[:1])
    spread = make_setup(_on_mesh(config, shape))
    with jax.set_mesh(alone.mesh):
        a = jax.device_get(alone.init().parameters)
    with jax.set_mesh(spread.mesh):
        b = jax.device_get(spread.init().parameters)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_placement_keeps_microbatches_of_consecutive_rows(accumulation):
    mesh = make_mesh(MeshShape(4, 2, 1))
    placement = BatchPlacement(mesh, ("data", "fsdp"), (), 16, accumulation)
    assert placement.rows == list(range(16))
    batch = random_batch(3)
    placed = placement.place(batch)
    assert isinstance(placed, Batch)
    np.testing.assert_array_equal(
        placed.tokens, batch.tokens.reshape(accumulation, 16 // accumulation, -1)
    )
    assert len(placed.tokens.addressable_shards) == 8
    assert placed.tokens.addressable_shards[0].data.shape == (accumulation, 2 // accumulation, 12)


def test_placement_splits_rows_over_slices_and_positions_over_context():
    mesh = make_mesh(MeshShape(data=1, fsdp=2, context=2, slice=2))
    placement = BatchPlacement(mesh, ("slice", "data", "fsdp"), ("context",), 16, 1)
    batch = random_batch(3)
    placed = placement.place(batch)
    np.testing.assert_array_equal(placed.tokens[0], batch.tokens)
    shard = placed.tokens.addressable_shards[-1]
    assert shard.index == (slice(None), slice(12, 16), slice(6, 12))
    np.testing.assert_array_equal(shard.data[0], batch.tokens[12:, 6:])


def test_slices_hold_neighbouring_devices():
    """Where devices know no slices, as here, whole processes in their order make one."""
    mesh = make_mesh(MeshShape(data=1, fsdp=-1, slice=2))
    numbers = np.vectorize(lambda device: device.id)(mesh.devices)
    np.testing.assert_array_equal(numbers.reshape(2, 4), [[0, 1, 2, 3], [4, 5, 6, 7]])


def test_a_sequence_that_the_devices_cannot_share_is_refused():
    setup = make_setup(_on_mesh(small_run(), MeshShape(1, -1, 2, context=4)))
    setup.check_sequence(24)
    with pytest.raises(ConfigError, match="windows of 12 tokens are not divisible by the 8 dev"):
        setup.check_sequence(12)
    with pytest.raises(
        ConfigError, match="batch_size=16 windows of 134217728 tokens are more than"
    ):
        setup.check_sequence(2**27)
    partly = EarlyExitConfig("rotational", rotation_interval=2, exit_token_fraction=0.5)
    setup = make_setup(_on_mesh(small_run(early_exit=partly), MeshShape(1, -1, 2, context=4)))
    setup.check_sequence(32)
    with pytest.raises(ConfigError, match="scores 12 of 24 positions, .* 8 devices .*choose 0.33"):
        setup.check_sequence(24)
    with pytest.raises(ConfigError, match="residual=.* must begin with sequence="):
        ShardingRules(residual=("tensor",))


def test_rows_per_device_says_what_does_not_fit():
    with pytest.raises(ConfigError, match="batch_size=12 .* 8 batch shards .* multiple of 8"):
        make_setup(
            with_training(small_run(), batch_size=12, gradient_accumulation=0, rows_per_device=1)
        )
    with pytest.raises(ConfigError, match="accumulation=2 and rows_per_device=1 do not go"):
        with_training(small_run(), gradient_accumulation=2, rows_per_device=1)


def test_moments_are_sharded_like_their_parameters():
    setup = make_setup(_on_mesh(small_run(), MeshShape(1, 4, 2)))
    moments = [
        leaf.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(setup.shardings.optimizer)
        if "gate" in jax.tree_util.keystr(path)
    ]
    assert moments == [setup.shardings.parameters["layers"]["mlp"]["gate"].spec] * 2
