import dataclasses

import jax
import numpy as np
import optax
import pytest

from layerskip_jax.config import MeshConfig, OptimizerConfig, RunConfig, TrainingConfig
from layerskip_jax.distributed.mesh import MeshShape
from layerskip_jax.hardware.topology import parse_topology
from layerskip_jax.model.definition import ModelDefinition
from layerskip_jax.planning import hlo
from layerskip_jax.planning.arithmetic import calculate_step
from layerskip_jax.training.flops import CostModel
from layerskip_jax.training.muon import Matrices, Stack, stacks
from layerskip_jax.training.optimizer import learning_rate_schedule, make_optimizer, state_share
from layerskip_jax.training.setup import make_setup
from layerskip_jax.training.step import make_train_step
from tests.helpers import SEQUENCE, products_of, small_model

MUON = OptimizerConfig("muon", learning_rate=0.01, warmup_steps=2, clip_norm=0.0)
MODEL = small_model(num_layers=3, remat="none")  # 3 layers on 8 devices: some are left over
MESHES = [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "context": 2}]


def _run(mesh: dict, **optimizer) -> RunConfig:
    return RunConfig(
        model=MODEL,
        training=TrainingConfig(steps=10, batch_size=8, loss_chunk=4),
        optimizer=dataclasses.replace(MUON, **optimizer),
        mesh=MeshConfig(MeshShape(**mesh)),
    )


def _gradients(step: int) -> dict:
    """Of very different sizes, as momentum sees them."""
    shapes, scale = ModelDefinition(MODEL).shapes, 10.0 ** (-3 * step)
    keys = iter(jax.random.split(jax.random.key(step), len(jax.tree.leaves(shapes))))
    return jax.tree.map(lambda leaf: scale * jax.random.normal(next(keys), leaf.shape), shapes)


def _updates(optimizer: optax.GradientTransformation, parameters: dict, place=lambda tree: tree):
    update, state, taken = jax.jit(optimizer.update), optimizer.init(parameters), []
    for step in range(3):
        updates, state = update(place(_gradients(step)), state, parameters)
        parameters = optax.apply_updates(parameters, updates)
        taken.append(jax.device_get(updates))
    return taken


def _assert_close(found, expected):
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        wanted = dict(jax.tree_util.tree_leaves_with_path(expected))[path]
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(leaf / scale, wanted / scale, atol=1e-5, err_msg=str(path))


@pytest.fixture(scope="module")
def parameters():
    return ModelDefinition(MODEL).init(jax.random.key(0))


@pytest.fixture(scope="module")
def alone(parameters):
    optimizer = make_optimizer(MUON, 10, Matrices(ModelDefinition(MODEL).logical_axes), MODEL)
    return _updates(optimizer, parameters)


@pytest.mark.parametrize("changes", [{}, {"muon_rms": 0.0, "muon_learning_rate": 0.03}])
def test_the_matrices_of_the_layers_move_as_by_optax(parameters, changes):
    config = dataclasses.replace(MUON, **changes)
    ours = _updates(
        make_optimizer(config, 10, Matrices(ModelDefinition(MODEL).logical_axes), MODEL), parameters
    )
    rate = learning_rate_schedule(config, 10)
    factor = config.muon_learning_rate / config.learning_rate or 1.0

    def numbers(tree):
        def of(path, leaf):
            axes = tuple(range(1, leaf.ndim))
            inputs = axes[:-1] if path[-1].key in ("o", "down") else axes[:1]
            return optax.contrib.MuonDimensionNumbers(inputs, axes[len(inputs) :])

        return jax.tree_util.tree_map_with_path(of, tree)

    layers = parameters["layers"]
    matrices = {name: layers[name] for name in ("attention", "mlp")}
    theirs = optax.contrib.muon(
        lambda step: factor * rate(step), beta=config.muon_momentum,
        weight_decay=config.weight_decay, muon_weight_dimension_numbers=numbers,
        consistent_rms=config.muon_rms or None,
    )  # fmt: skip
    state = theirs.init(matrices)
    for step in range(3):
        gradients = _gradients(step)["layers"]
        updates, state = theirs.update(
            {name: gradients[name] for name in matrices}, state, matrices
        )
        matrices = optax.apply_updates(matrices, updates)
        _assert_close({name: ours[step]["layers"][name] for name in matrices}, updates)


def test_all_else_moves_as_by_adamw(parameters, alone):
    adamw = dataclasses.replace(MUON, name="adamw")
    optimizer = make_optimizer(adamw, 10, Matrices(ModelDefinition(MODEL).logical_axes), MODEL)
    for ours, theirs in zip(alone, _updates(optimizer, parameters), strict=True):
        for name in ("embedding", "head", "final_norm"):
            _assert_close(ours[name], theirs[name])
        for name in ("attention_norm", "mlp_norm"):
            _assert_close(ours["layers"][name], theirs["layers"][name])


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_eight_devices_move_as_one_does(parameters, alone, mesh):
    setup = make_setup(_run(mesh))
    with jax.set_mesh(setup.mesh):
        placed = jax.device_put(parameters, setup.shardings.parameters)
        found = _updates(
            setup.optimizer, placed, lambda tree: jax.device_put(tree, setup.shardings.parameters)
        )
    for ours, expected in zip(found, alone, strict=True):
        _assert_close(ours, expected)


def test_a_matrix_is_exchanged_once_each_way_and_gathered_by_none():
    """By what the compiled update sends, against the bytes of the matrices."""
    setup = make_setup(_run({"fsdp": 8}))
    shapes = setup.abstract_state()
    with jax.set_mesh(setup.mesh):
        update = jax.jit(setup.optimizer.update, out_shardings=(
            setup.shardings.parameters, setup.shardings.optimizer))  # fmt: skip
        lowered = update.lower(shapes.parameters, shapes.optimizer, shapes.parameters)
        sent = hlo.Program(lowered.compile().as_text()).collectives()
    by_kind = {kind: sum(c.size for c in sent if c.kind == kind) for kind in hlo.KINDS}
    dealt = sum(stack.dealt * stack.m * stack.n * 4 for stack in stacks(MODEL, 8))
    assert by_kind["all-to-all"] == 2 * dealt / 8
    assert sum(by_kind.values()) - by_kind["all-to-all"] < 100


def test_what_is_put_together_and_what_it_computes():
    # D 32, H h = 4 x 8, K h = 2 x 8, F 64; 3 layers
    found = {(stack.m, stack.n): stack for stack in stacks(MODEL, 8)}
    assert found == {
        (16, 32): Stack(16, 32, 6, 8), (32, 32): Stack(32, 32, 6, 8),
        (32, 64): Stack(32, 64, 9, 16),
    }  # fmt: skip
    assert Stack(16, 32, 6, 8).flops == 8 * 5 * (4 * 16 * 16 * 32 + 2 * 16**3)


def test_the_step_computes_what_the_arithmetic_says():
    config = _run({})
    setup = make_setup(config, jax.devices()[:1])
    with jax.set_mesh(setup.mesh):
        step = make_train_step(setup.definition, config, setup.optimizer)
        batch = setup.abstract_batch(SEQUENCE)
        jaxpr = jax.make_jaxpr(step)(setup.abstract_state(), batch)
    cost = CostModel(config, SEQUENCE).plain()
    assert cost.optimizer == sum(stack.flops for stack in stacks(MODEL, 1)) > 0
    assert products_of(jaxpr.jaxpr, 0) == cost.computed - cost.exits
    assert cost.needed == CostModel(_run({}, name="adamw"), SEQUENCE).plain().needed


def test_its_state_is_smaller_and_its_plan_has_its_products_and_exchanges():
    matrices = sum(stack.count * stack.m * stack.n for stack in stacks(MODEL, 1))
    share = matrices / ModelDefinition(MODEL).num_parameters
    assert state_share(MUON, MODEL) == pytest.approx(2 - share, abs=1e-3)
    plans = {
        name: calculate_step(_run({"fsdp": 8}, name=name), parse_topology("h100:8"), 256)
        for name in ("adamw", "muon")
    }
    kinds = [line.kind for line in plans["muon"].traffic]
    assert kinds.count("all-to-all") == 1 and "all-to-all" not in [
        line.kind for line in plans["adamw"].traffic
    ]
    pass_over = 2 * (plans["adamw"].memory.optimizer - plans["muon"].memory.optimizer)
    chip = plans["muon"].topology.chip
    own = sum(stack.flops for stack in stacks(MODEL, 8)) / 8 / chip.flops
    saved = pass_over / chip.memory_bandwidth
    assert plans["muon"].update_seconds == pytest.approx(
        plans["adamw"].update_seconds - saved + own
    )
