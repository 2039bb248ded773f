import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layerskip_jax.config import RunConfig, TrainingConfig
from layerskip_jax.early_exit_loss import EarlyExitConfig
from layerskip_jax.hardware.chips import peak_flops
from layerskip_jax.layer_dropout import LayerDropoutConfig
from layerskip_jax.model.exits import ExitsConfig
from layerskip_jax.ops.attention import PLAIN_ATTENTION, computed_pairs
from layerskip_jax.training.flops import CostModel
from layerskip_jax.training.setup import make_setup
from layerskip_jax.training.step import make_train_step
from tests.helpers import SEQUENCE, products_of, run_steps, small_model, small_run


def _run(remat="none", **changes):
    training = TrainingConfig(steps=10, batch_size=4, loss_chunk=4)
    return RunConfig(model=small_model(remat=remat), training=training, **changes)


def test_a_plain_step_by_hand():
    # D 32, H 4, K 2, h 8, F 64, L 4, V 64; 4 rows of 12 tokens
    cost = CostModel(_run(), 12).plain()
    projections = 2 * 12 * 32 * (4 + 2 + 2 + 4) * 8
    mlp = 2 * 12 * 3 * 32 * 64
    assert cost.layers == 4 * 4 * 3 * (projections + mlp)
    causal_pairs = 12 * 13 / 2  # (query, key) pairs that are not masked, for scores and values
    assert cost.attention == 4 * 4 * 3 * 2 * (2 * causal_pairs * 4 * 8)
    assert cost.exits == 4 * 12 * 3 * 2 * 32 * 64
    # the scores, one of attention's two products, are made again in the backward pass
    assert cost.recomputed == pytest.approx((cost.attention + cost.masked) / 3 / 2)
    assert cost.masked == pytest.approx(4 * 4 * 3 * 2 * 2 * (144 - causal_pairs) * 4 * 8)


@pytest.mark.parametrize(
    "exits, early, fraction",
    [("last", 0, 1.0), ("all", 3, 1.0), ("all", 3, 1 / 3)],
)
def test_the_step_computes_what_the_model_says(exits, early, fraction):
    """Against the matrix products counted in the step's own program."""
    config = _run(early_exit=EarlyExitConfig(exits, depth_weight="uniform",
                                             exit_token_fraction=fraction))  # fmt: skip
    setup = make_setup(config, jax.devices()[:1])
    with jax.set_mesh(setup.mesh):
        step = make_train_step(setup.definition, config, setup.optimizer)
        batch = setup.abstract_batch(SEQUENCE)
        jaxpr = jax.make_jaxpr(step)(setup.abstract_state(), batch)
    # the loops over chunks of the loss: 3 chunks of 4 for every slot, the two parts apart
    cost = CostModel(config, SEQUENCE).step(1.0, early)
    head = cost.exits
    without = products_of(jaxpr.jaxpr, 0)
    assert without == cost.computed - head
    one_turn_of_each = products_of(jaxpr.jaxpr, 1) - without
    parts = 1 if early == 0 else 2
    assert one_turn_of_each == parts * 4 * 4 * 3 * 2 * 32 * 64
    turns = 3 + early * 3 * fraction
    assert head == pytest.approx(turns * 4 * 4 * 3 * 2 * 32 * 64)


@pytest.mark.parametrize(
    "exits",
    [
        ExitsConfig((1, 3), rank=4, learned=True),
        ExitsConfig((1, 3), rank=4, target="data"),
        ExitsConfig(learned=True),
    ],
)
def test_exits_alone_cost_a_forward_pass_and_themselves(exits):
    training = TrainingConfig(steps=10, batch_size=4, loss_chunk=12, trainable="exits")
    config = RunConfig(init_from="a-run", model=small_model(exits=exits), training=training)
    setup = make_setup(config, jax.devices()[:1])
    with jax.set_mesh(setup.mesh):
        step = make_train_step(setup.definition, config, setup.optimizer)
        batch = setup.abstract_batch(SEQUENCE)
        jaxpr = jax.make_jaxpr(step)(setup.abstract_state(), batch)
    cost, whole = CostModel(config, SEQUENCE).planned(0, 10), CostModel(_run(), SEQUENCE).plain()
    assert products_of(jaxpr.jaxpr, 0) == cost.computed
    assert cost.layers == whole.layers / 3
    assert cost.attention == whole.attention / 3


@pytest.mark.parametrize("target", ["last", "data"])
def test_a_classifier_beside_the_model_reads_the_head_for_a_few_positions(target):
    products, costs = [], []
    for exits in (ExitsConfig(), ExitsConfig(learned=True, target=target)):
        early = EarlyExitConfig("all", depth_weight="uniform")
        training = TrainingConfig(steps=10, batch_size=4, loss_chunk=4)
        config = RunConfig(
            model=small_model(remat="none", exits=exits), training=training, early_exit=early
        )
        setup = make_setup(config, jax.devices()[:1])
        with jax.set_mesh(setup.mesh):
            step = make_train_step(setup.definition, config, setup.optimizer)
            batch = setup.abstract_batch(SEQUENCE)
            products.append(
                products_of(jax.make_jaxpr(step)(setup.abstract_state(), batch).jaxpr, 0)
            )
        costs.append(CostModel(config, SEQUENCE).step(1.0, 3).exits)
        assert CostModel(config, SEQUENCE).plain().exits == 4 * 12 * 3 * 2 * 32 * 64
    # 2 of 12 positions of 4 rows: the head of 3 exits and of the last, and the classifier's
    # product and its gradient.
    heads = 3 + (target == "last")
    assert costs[1] - costs[0] == 4 * 2 * 2 * 32 * (heads * 64 + 2 * 3)
    assert products[1] - products[0] == costs[1] - costs[0]


def test_long_windows_attend_in_two_halves():
    """Against the products counted in the gradient of one layer's attention."""
    q, segments = jnp.zeros((1, 256, 2, 8)), jnp.zeros((1, 256), jnp.int32)

    def total(q, k, v):
        return PLAIN_ATTENTION(q, k, v, segments).sum()

    pairs = computed_pairs(256, whole=True)
    assert pairs == 256 * 256 * 3 // 4
    jaxpr = jax.make_jaxpr(jax.grad(total, (0, 1, 2)))(q, q, q)
    assert products_of(jaxpr.jaxpr, 0) == 7 * 2 * pairs * 2 * 8  # products, heads, width
    assert computed_pairs(256, whole=False) == 256 * 256
    assert computed_pairs(12, whole=True) == 12 * 12


def test_full_remat_adds_a_forward_pass_without_the_last_product():
    none, full, dots = (CostModel(_run(remat), 12).plain() for remat in ("none", "full", "dots"))
    down = 4 * 4 * 2 * 12 * 32 * 64
    forward = (none.layers + none.attention + none.masked) / 3
    assert full.recomputed - none.recomputed == pytest.approx(forward - down)
    again = dots.recomputed - none.recomputed
    assert again == pytest.approx((none.attention + none.masked) / 3)
    assert none.needed == full.needed == dots.needed


@pytest.mark.parametrize("execution", ["gather", "cond"])
def test_dropped_rows_cost_nothing_unless_masked(execution):
    skipping = CostModel(_run(layer_dropout=LayerDropoutConfig(0.5, execution=execution)), 12)
    half, whole = skipping.step(0.5, 0), skipping.plain()
    assert half.computed - half.exits == pytest.approx((whole.computed - whole.exits) / 2)
    masked = CostModel(_run(layer_dropout=LayerDropoutConfig(0.5, execution="mask")), 12)
    assert masked.step(0.5, 0).needed == half.needed
    assert masked.step(0.5, 0).computed == pytest.approx(whole.computed)


def test_the_plan_is_the_mean_of_the_schedules():
    config = small_run(
        layer_dropout=LayerDropoutConfig(0.6, "linear", "decreasing", row_groups=8),
        early_exit=EarlyExitConfig("rotational", rotation_interval=2),
    )
    cost = CostModel(config, SEQUENCE)
    layers_run, early = cost.schedule
    # linear over 4 layers has mean 1/2; decreasing over 20 steps falls from 1 to 0
    np.testing.assert_allclose(layers_run, 1 - 0.6 * 0.5 * (1 - np.arange(20) / 19), rtol=1e-6)
    assert early.tolist() == [1] * 20  # {0, 2, 3} and {1, 3} in turn, layer 0 without weight
    assert cost.planned(0, 20).needed == pytest.approx(cost.step(1 - 0.15, 1).needed)


def test_what_is_done_follows_the_draws():
    config = small_run(layer_dropout=LayerDropoutConfig(0.5, "linear", row_groups=8))
    _, _, history = run_steps(config, 2)
    cost = CostModel(config, SEQUENCE)
    for metrics in history:
        assert cost.done(metrics) == cost.step(float(metrics.layers_run), 1)
    assert cost.done(history[0]).needed != cost.done(history[1]).needed


def test_the_peak_is_published_or_given():
    device = jax.devices()[0]
    assert peak_flops([device]) is None
    assert peak_flops([device] * 4, 2.5) == 1e13
    known = type("Device", (), {"device_kind": "TPU v5 lite"})()
    assert peak_flops([known, known]) == 2 * 197e12
