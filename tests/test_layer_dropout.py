import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_jax import layer_dropout as ld
from layerskip_jax.schema import SMALLEST_FLOAT32, ConfigError


def test_exp_depth_schedule_has_the_published_values():
    expected = [0, 0.189207, 0.414214, 0.681793, 1]
    np.testing.assert_allclose(ld.depth_schedule("exp", 5), expected, atol=1e-6)


def test_exp_depth_at_32_layers_has_the_published_mean():
    config = ld.LayerDropoutConfig(p_max=0.2)
    assert ld.drop_probabilities(config, 32, 0, 1).mean() == pytest.approx(0.088909, abs=1e-6)


def test_exp_time_schedule_has_the_published_values():
    assert ld.time_schedule("exp", 0, 11) == 0
    assert ld.time_schedule("exp", 1, 11) == pytest.approx(0.071773, abs=1e-6)
    assert ld.time_schedule("exp", 5, 11) == pytest.approx(0.414214, abs=1e-6)
    assert ld.time_schedule("exp", 10, 11) == 1


@pytest.mark.parametrize(
    "name, expected",
    [
        ("linear", [0, 1 / 3, 2 / 3, 1]),
        ("uniform", [1, 1, 1, 1]),
        ("alternating", [0, 1, 0, 1]),
        ("log", [0, 0.5, 0.792481, 1]),
        ("sin", [0, 0.5, 0.866025, 1]),
        ("sigmoid", [0.006693, 0.158869, 0.841131, 0.993307]),
    ],
)
def test_depth_schedules_at_four_layers(name, expected):
    np.testing.assert_allclose(ld.depth_schedule(name, 4), expected, atol=1e-6)


@pytest.mark.parametrize("name, expected", [("increasing", 0.3), ("decreasing", 0.7)])
def test_linear_time_schedules(name, expected):
    assert ld.time_schedule(name, 3, 11) == pytest.approx(expected)


@pytest.mark.parametrize(
    "name, expected",
    [("trapezoid", [0, 0.5, 1, 1, 0.75, 0]), ("late_off", [1, 1, 1, 1, 0, 0])],
)
def test_time_schedules_with_a_plateau(name, expected):
    found = [ld.time_schedule(name, step, 101) for step in (0, 5, 10, 79, 85, 100)]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("name", ld.DEPTH_SCHEDULES)
def test_a_single_layer_has_depth_one(name):
    assert ld.depth_schedule(name, 1) == 1


@pytest.mark.parametrize("name", ld.TIME_SCHEDULES)
def test_a_single_step_has_time_one(name):
    assert ld.time_schedule(name, 0, 1) == 1


@pytest.mark.parametrize(
    "p_max, group_size, expected",
    [(0.6, 16, (6, 8, 11, 14, 16)), (0.9, 4, (0, 1, 2, 3, 4)), (0.1, 1, (0, 1)), (0.0, 8, (8,))],
)
def test_capacity_menu(p_max, group_size, expected):
    assert ld.capacity_menu(p_max, group_size) == expected


@settings(max_examples=50, deadline=None)
@given(
    p_max=st.floats(0.05, 0.95),
    groups=st.integers(1, 4),
    group_size=st.integers(1, 9),
    seed=st.integers(0, 2**31 - 1),
)
def test_every_group_keeps_the_planned_count(p_max, groups, group_size, seed):
    menu = ld.capacity_menu(p_max, group_size)
    probabilities = p_max * ld.depth_schedule("linear", 5)
    plan = ld.draw_keep_plan(
        jax.random.key(seed),
        probabilities,
        batch_size=groups * group_size,
        groups=groups,
        menu=menu,
    )
    counts = np.asarray(plan.keep).reshape(5, groups, group_size).sum(axis=2)
    expected = np.asarray(menu)[np.asarray(plan.capacity_index)]
    np.testing.assert_array_equal(counts, np.broadcast_to(expected[:, None], counts.shape))
    assert plan.keep[0].all(), "the first layer of a linear schedule is never dropped"


def test_each_row_is_dropped_with_probability_p():
    """Chi-square over 20k draws, every layer and row; the 1e-6 quantile keeps it stable."""
    p = jnp.array([0.0, 0.1, 0.35, 0.6])
    menu = ld.capacity_menu(0.6, 8)
    draws = 20_000

    def dropped(key):
        plan = ld.draw_keep_plan(key, p, batch_size=16, groups=2, menu=menu)
        return ~plan.keep

    counts = jax.vmap(dropped)(jax.random.split(jax.random.key(7), draws)).sum(axis=0)
    assert counts[0].sum() == 0
    expected = draws * np.asarray(p)[1:, None]
    z2 = (np.asarray(counts)[1:] - expected) ** 2 / (expected * (1 - np.asarray(p)[1:, None]))
    # z^2 of one row is chi-square with one degree of freedom: 23.9 is its 1e-6 quantile.
    assert z2.max() < 23.9
    assert z2.mean() < 2


class _ToyBlock(NamedTuple):
    """A block with a parameter that reads another array of each row."""

    weight: jax.Array

    def __call__(self, x, extra, scale):
        added = jnp.tanh(x @ self.weight) + extra[:, None, None].astype(x.dtype)
        return x + (added if scale is None else scale * added)


def _toy_case(groups, execution="gather", scale=None, batch=8, layers=6):
    config = ld.LayerDropoutConfig(p_max=0.9, execution=execution, row_groups=groups)
    menu = config.menu(batch // groups)
    plan = ld.draw_keep_plan(
        jax.random.key(3), jnp.full(layers, 0.45), batch_size=batch, groups=groups, menu=menu
    )
    if scale is not None:
        plan = plan._replace(residual_scale=jnp.full(layers, scale))
    x = jax.random.normal(jax.random.key(0), (batch, 5, 3))
    block = _ToyBlock(jax.random.normal(jax.random.key(1), (3, 3)))
    return block, x, jnp.arange(batch), plan, menu


def _run(name, groups, menu, block, x, extra, plan, layer, remat="none"):
    one = jax.tree.map(lambda array: array[layer], plan)
    return ld.Execution(name, groups, menu).run(block, x, (extra,), one, remat)


@pytest.mark.parametrize("scale", [None, 1.5])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gather_equals_mask_and_leaves_dropped_rows_alone(groups, scale):
    block, x, extra, plan, menu = _toy_case(groups, scale=scale)
    for layer in range(6):
        masked, gathered = (
            _run(name, groups, menu, block, x, extra, plan, layer) for name in ("mask", "gather")
        )
        np.testing.assert_allclose(masked, gathered, rtol=1e-6, atol=1e-6)
        kept = np.asarray(plan.keep[layer])
        np.testing.assert_array_equal(gathered[~kept], x[~kept])
        expected = x + (scale or 1.0) * (block(x, extra, None) - x)
        np.testing.assert_allclose(gathered[kept], expected[kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("execution", ["gather", "cond"])
def test_gradients_equal_those_of_mask(execution, remat):
    """For the block and for x, through all branches, against plain differentiation of mask."""
    groups = 2
    block, x, extra, plan, menu = _toy_case(groups, execution, scale=1.25)
    seen = {int(i) for i in plan.capacity_index}
    assert len(seen) > 1, "the draw should take more than one branch"

    def loss(block, x, name, remat):
        for layer in range(6):
            x = _run(name, groups, menu, block, x, extra, plan, layer, remat)
        return jnp.sum(x**2)

    gradient = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=(2, 3))
    (a, da), (b, db) = gradient(block, x, "mask", "none"), gradient(block, x, execution, remat)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    for expected, found in zip(jax.tree.leaves(da), jax.tree.leaves(db), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def test_cond_keeps_all_rows_or_none_with_probability_p():
    config = ld.LayerDropoutConfig(
        p_max=0.6, depth_schedule="uniform", execution="cond", row_groups=2
    )
    menu = config.menu(4)
    assert menu == (0, 4)
    p = jnp.array([0.0, 0.3, 0.6])

    def kept(key):
        return ld.draw_keep_plan(key, p, batch_size=8, groups=2, menu=menu).keep

    keep = np.asarray(jax.vmap(kept)(jax.random.split(jax.random.key(1), 20_000)))
    np.testing.assert_array_equal(keep.all(axis=2), keep.any(axis=2))
    share = keep.all(axis=2).mean(axis=0)
    deviation = np.sqrt(np.asarray(p * (1 - p)) / 20_000)
    assert (np.abs(share - (1 - p)) <= 5 * deviation).all()


def test_inverse_keep_scales_by_one_over_the_keep_probability():
    config = ld.LayerDropoutConfig(
        p_max=0.6, depth_schedule="linear", residual_scale="inverse_keep"
    )
    p = ld.drop_probabilities(config, 4, 0, 1)
    np.testing.assert_allclose(ld.residual_scales(config, p), [1, 1.25, 1 / 0.6, 2.5], rtol=1e-6)
    plain = dataclasses.replace(config, residual_scale="none")
    assert ld.residual_scales(plain, p) is None


def test_inverse_keep_leaves_the_mean_output_unchanged():
    """E[r M f(x)] = f(x): averaged over draws, the residual branch is that of evaluation."""
    p, draws = 0.4, 4000
    block, x, extra, _, _ = _toy_case(1)
    menu = ld.capacity_menu(p, 8)

    def once(key):
        plan = ld.draw_keep_plan(key, jnp.array([p]), batch_size=8, groups=1, menu=menu)
        plan = plan._replace(residual_scale=jnp.array([1 / (1 - p)]))
        return _run("mask", 1, menu, block, x, extra, plan, 0)

    mean = jax.vmap(once)(jax.random.split(jax.random.key(5), draws)).mean(axis=0)
    added = block(x, extra, None) - x
    # the standard deviation of r M is sqrt(p / (1 - p))
    bound = 6 * np.sqrt(p / (1 - p) / draws) * np.abs(added)
    assert (np.abs(mean - x - added) <= bound + 1e-5).all()


def test_only_listed_layers_are_dropped():
    config = ld.LayerDropoutConfig(p_max=0.5, depth_schedule="uniform", layers=(1, 3))
    np.testing.assert_allclose(ld.drop_probabilities(config, 5, 0, 1), [0, 0.5, 0, 0.5, 0])


def test_a_listed_layer_beyond_the_model_is_refused():
    config = ld.LayerDropoutConfig(p_max=0.5, layers=(1, 8))
    with pytest.raises(ConfigError, match=r"layers=\(1, 8\) names layer 8, but .* are 0 to 7"):
        ld.check_layers(config, 8)


def test_the_plan_of_a_microbatch_is_its_part_of_the_plan():
    plan = ld.draw_keep_plan(
        jax.random.key(0), jnp.full(3, 0.5), batch_size=8, groups=4, menu=(0, 1, 2)
    )
    np.testing.assert_array_equal(plan.rows(4, 4).keep, plan.keep[:, 4:])


@pytest.mark.parametrize("p_max", [SMALLEST_FLOAT32, 1e-9, 1 - 2**-24])
def test_a_plan_can_be_drawn_at_the_ends_of_p_max(p_max):
    """No schedule takes p above it, and 1 / (1 - p) is finite."""
    for depth in ld.DEPTH_SCHEDULES:
        config = ld.LayerDropoutConfig(p_max, depth, residual_scale="inverse_keep")
        p = ld.drop_probabilities(config, 7, 3, 4)
        assert 0 <= p.min() and p.max() <= np.float32(p_max)
        assert np.isfinite(ld.residual_scales(config, p)).all()
    menu = config.menu(8)
    assert menu[0] <= 8 * (1 - p_max) <= menu[-1] == 8
    plan = ld.draw_keep_plan(jax.random.key(0), p, batch_size=16, groups=2, menu=menu)
    counts = np.asarray(plan.keep.reshape(7, 2, 8).sum(axis=-1))
    assert (counts == np.asarray(menu)[plan.capacity_index][:, None]).all()


@pytest.mark.parametrize(
    "settings_, message",
    [
        ({"p_max": 1.0}, r"p_max=1.0 must be in \[0, 1\)"),
        ({"p_max": 0.999999999}, r"p_max=0.999999999 must be in \[0, 1\) in float32 too"),
        ({"p_max": -0.1}, "p_max=-0.1"),
        ({"depth_schedule": "expo"}, "depth_schedule='expo' is not one of .* Did you mean 'exp'"),
        ({"time_schedule": "warp"}, "time_schedule='warp' is not one of"),
        ({"execution": "scatter"}, "execution='scatter'"),
        ({"row_groups": 0}, "row_groups=0"),
        ({"residual_scale": "keep"}, "residual_scale='keep' is not one of none, inverse_keep"),
        ({"layers": (0, -1)}, r"layers=\(0, -1\)"),
    ],
)
def test_bad_settings_are_refused(settings_, message):
    with pytest.raises(ConfigError, match=message):
        ld.LayerDropoutConfig(**settings_)


def test_gather_refuses_groups_that_straddle_shards():
    config = ld.LayerDropoutConfig(p_max=0.1, row_groups=2)
    with pytest.raises(ConfigError, match="must be a multiple of 8 .*groups=8,"):
        ld.check_groups(config, batch_size=16, batch_shards=4, accumulation=2)
    ld.check_groups(config, batch_size=16, batch_shards=2, accumulation=1)
    with pytest.raises(ConfigError, match="must divide the batch of 15 rows"):
        ld.check_groups(config, batch_size=15, batch_shards=1, accumulation=1)
