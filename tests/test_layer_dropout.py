import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_jax import layer_dropout as ld
from layerskip_jax.schema import ConfigError


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


def _toy_block(block, x, extra):
    return x * block + extra[:, None, None].astype(x.dtype)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gather_equals_mask_and_leaves_dropped_rows_alone(groups):
    batch, width = 8, 3
    menu = ld.capacity_menu(0.9, batch // groups)
    x = jax.random.normal(jax.random.key(0), (batch, 5, width))
    extra = jnp.arange(batch)
    plan = ld.draw_keep_plan(
        jax.random.key(3), jnp.full(6, 0.45), batch_size=batch, groups=groups, menu=menu
    )

    def run(name, layer):
        execution = ld.Execution(name, groups, menu)
        one = ld.KeepPlan(plan.keep[layer], plan.capacity_index[layer])

        class Block:
            def __call__(self, x, extra, scale):
                return _toy_block(2.0, x, extra)

        block = jax.tree_util.Partial(Block().__call__)
        return execution.run(block, x, (extra,), one, "none")

    for layer in range(6):
        masked, gathered = run("mask", layer), run("gather", layer)
        np.testing.assert_array_equal(masked, gathered)
        kept = np.asarray(plan.keep[layer])
        np.testing.assert_array_equal(masked[~kept], x[~kept])
        np.testing.assert_array_equal(masked[kept], _toy_block(2.0, x, extra)[kept])


def test_the_plan_of_a_microbatch_is_its_part_of_the_plan():
    plan = ld.draw_keep_plan(
        jax.random.key(0), jnp.full(3, 0.5), batch_size=8, groups=4, menu=(0, 1, 2)
    )
    np.testing.assert_array_equal(plan.rows(4, 4).keep, plan.keep[:, 4:])


@pytest.mark.parametrize(
    "settings_, message",
    [
        ({"p_max": 1.0}, r"p_max=1.0 must be in \[0, 1\)"),
        ({"p_max": -0.1}, "p_max=-0.1"),
        ({"depth": "expo"}, "depth='expo' is not one of .* Did you mean 'exp'"),
        ({"time": "warp"}, "time='warp' is not one of"),
        ({"execution": "scatter"}, "execution='scatter'"),
        ({"groups": 0}, "groups=0"),
    ],
)
def test_bad_settings_are_refused(settings_, message):
    with pytest.raises(ConfigError, match=message):
        ld.LayerDropoutConfig(**settings_)


def test_gather_refuses_groups_that_straddle_shards():
    config = ld.LayerDropoutConfig(p_max=0.1, groups=2)
    with pytest.raises(ConfigError, match="must be a multiple of 8 .*groups=8,"):
        ld.check_groups(config, batch_size=16, batch_shards=4, accumulation=2)
    ld.check_groups(config, batch_size=16, batch_shards=2, accumulation=1)
    with pytest.raises(ConfigError, match="must divide the batch of 15 rows"):
        ld.check_groups(config, batch_size=15, batch_shards=1, accumulation=1)
