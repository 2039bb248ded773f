import dataclasses

import jax
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr

from layerskip_jax.config import (
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)
from layerskip_jax.distributed.mesh import MeshShape
from layerskip_jax.early_exit_loss import EarlyExitConfig
from layerskip_jax.hardware.topology import parse_topology
from layerskip_jax.planning.arithmetic import calculate_step
from layerskip_jax.schema import ConfigError
from layerskip_jax.training.flops import CostModel
from layerskip_jax.training.muon import stacks
from layerskip_jax.training.optimizer import state_share
from layerskip_jax.training.setup import make_setup
from layerskip_jax.training.step import make_train_step
from layerskip_jax.training.trainable import merged, trained
from tests.helpers import SEQUENCE, products_of, run_steps, small_model

MODEL = small_model(remat="none")
MLP = r"layers\.mlp\..*|.*norm\.scale"


def _run(trainable: str, mesh: dict | None = None, **optimizer) -> RunConfig:
    return RunConfig(
        model=MODEL,
        training=TrainingConfig(steps=10, batch_size=8, loss_chunk=4, trainable=trainable),
        early_exit=EarlyExitConfig("all", depth_weight="uniform"),
        optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=0, **optimizer),
        mesh=MeshConfig(MeshShape(**(mesh or {}))),
    )


def _paths(tree) -> set[str]:
    return {
        ".".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_names_are_matched_whole_and_put_back():
    parameters = {"embedding": 1, "layers": {"mlp": {"up": 2, "down": 3}, "norm": {"scale": 4}}}
    assert trained(parameters, "all") is parameters
    part = trained(parameters, r"layers\.mlp\.up|embed")
    assert part == {"layers": {"mlp": {"up": 2}}}
    assert merged(parameters, {"layers": {"mlp": {"up": 9}}}) == {
        "embedding": 1, "layers": {"mlp": {"up": 9, "down": 3}, "norm": {"scale": 4}},
    }  # fmt: skip
    assert parameters["layers"]["mlp"]["up"] == 2


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_what_does_not_match_stays_bit_for_bit_and_has_no_state(name):
    """On a mesh, with early exits; what does match moves by the very gradient of all."""
    config = _run(MLP, {"fsdp": 4, "data": 2}, name=name)
    setup, state, _ = run_steps(config, 2, devices=8)
    with jax.set_mesh(setup.mesh):
        before = jax.device_get(setup.init().parameters)
    after = jax.device_get(state.parameters)
    moved = {
        path for path in _paths(before)
        if not np.array_equal(_at(before, path), _at(after, path))
    }  # fmt: skip
    expected = _paths(trained(before, MLP))
    assert moved == expected and "layers.attention.q" not in moved and "layers.mlp.up" in moved
    arrays = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim > 1]
    matrices = 3 if name == "muon" else 6  # one moment or two of the MLP's three matrices
    assert sum(leaf.ndim == 3 for leaf in arrays) == matrices


def _at(tree, path: str):
    for key in path.split("."):
        tree = tree[key]
    return np.asarray(tree)


def test_the_trained_part_moves_as_with_all():
    """At the first step, without clipping, which counts the gradient of what is trained alone."""
    ends = []
    for trainable in ("all", MLP):
        _, state, _ = run_steps(_run(trainable, clip_norm=0.0), 1)
        ends.append(trained(jax.device_get(state.parameters), MLP))
    for path in _paths(ends[1]):
        np.testing.assert_allclose(_at(ends[0], path), _at(ends[1], path), atol=1e-6)


@pytest.mark.parametrize(
    "trainable", ["all", MLP, r"layers\.attention\.(q|o)", r".*norm\.scale", "head"]
)
def test_the_step_computes_what_the_arithmetic_says(trainable):
    config = dataclasses.replace(_run(trainable), early_exit=EarlyExitConfig())
    setup = make_setup(config, jax.devices()[:1])
    with jax.set_mesh(setup.mesh):
        step = make_train_step(setup.definition, config, setup.optimizer)
        batch = setup.abstract_batch(SEQUENCE)
        jaxpr = jax.make_jaxpr(step)(setup.abstract_state(), batch).jaxpr
    # Without what nothing reads, which the compiler leaves out: a gradient of frozen weights.
    jaxpr, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    cost = CostModel(config, SEQUENCE).plain()
    assert products_of(jaxpr, 0) == cost.computed - cost.exits
    assert cost.needed <= CostModel(_run("all"), SEQUENCE).plain().needed


def test_a_plan_has_no_memory_for_what_is_frozen():
    topology = parse_topology("h100:8")
    plans = {
        trainable: calculate_step(_run(trainable, {"fsdp": 8}), topology, 256).memory
        for trainable in ("all", MLP)
    }
    shapes = make_setup(_run(MLP), jax.devices()[:1]).definition.shapes
    share = sum(leaf.size for leaf in jax.tree.leaves(trained(shapes, MLP)))
    share /= sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert plans[MLP].parameters == plans["all"].parameters
    assert plans[MLP].optimizer == pytest.approx(share * plans["all"].optimizer)
    config = OptimizerConfig("muon")
    assert state_share(config, MODEL, MLP) < state_share(config, MODEL) < 2
    assert [stack.count for stack in stacks(MODEL, 1, MLP)] == [12]


def test_what_matches_nothing_or_is_no_expression_is_refused():
    with pytest.raises(ConfigError, match="is the whole name of none of the parameters: embedding"):
        make_setup(_run("layer"), jax.devices()[:1])
    with pytest.raises(ConfigError, match="neither all, exits nor a regular expression"):
        TrainingConfig(trainable="layers.(mlp")
