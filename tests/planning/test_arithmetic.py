"""A step by arithmetic alone."""

from layerskip_jax.config import RunConfig, TrainingConfig
from layerskip_jax.hardware.topology import parse_topology
from layerskip_jax.model.exits import ExitsConfig
from layerskip_jax.planning.arithmetic import calculate_step
from tests.helpers import small_model


def test_exits_alone_have_no_backward_pass_and_little_state():
    config = RunConfig(
        init_from="a-model",
        model=small_model(exits=ExitsConfig((1, 3), rank=4)),
        training=TrainingConfig(batch_size=8, trainable="exits"),
    )
    plan = calculate_step(config, parse_topology("h100:8"), 64)
    exits = 4 * 2 * (32 + 32 * 4 + 4 * 32)  # bytes of two norms and two low-rank maps
    assert plan.memory.optimizer == 2 * exits
    assert plan.memory.activations == 0
    assert [(line.kind, line.size) for line in plan.traffic] == [("all-reduce", exits)]
