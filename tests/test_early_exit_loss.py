import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_jax import early_exit_loss as ee
from layerskip_jax.schema import SMALLEST_FLOAT32, ConfigError


@pytest.mark.parametrize(
    "scale, expected",
    [(1.0, [0, 0.1, 0.3, 0.6]), (0.2, [0, 0.045455, 0.136364, 0.818182]), (0.0, [0, 0, 0, 1])],
)
def test_depth_weights_have_the_published_values(scale, expected):
    weights = ee.exit_weights(ee.EarlyExitConfig("all", e_scale=scale), 4, 0, 10)
    np.testing.assert_allclose(weights, expected, atol=1e-6)


@pytest.mark.parametrize(
    "step, expected",
    [(0, [0, 4, 7]), (1, [1, 5, 7]), (2, [2, 6, 7]), (3, [3, 7]), (4, [0, 4, 7]), (8, [0, 4, 7])],
)
def test_rotational_curriculum_by_hand(step, expected):
    config = ee.EarlyExitConfig("rotational", rotation_interval=4)
    assert np.flatnonzero(ee.active_exits(config, 8, step, 100)).tolist() == expected


def test_rotation_of_an_uneven_depth_has_period_l():
    config = ee.EarlyExitConfig("rotational", rotation_interval=2)
    on = [np.flatnonzero(ee.active_exits(config, 5, t, 9)).tolist() for t in range(6)]
    assert on == [[0, 2, 4], [0, 1, 3, 4], [1, 2, 4], [0, 2, 3, 4], [1, 3, 4], [0, 2, 4]]


def test_gradual_curriculum_goes_from_the_top_down():
    config = ee.EarlyExitConfig("gradual", gradual_fraction=0.5)
    # f T / L = 10 steps a layer at T = 80, L = 4
    counts = [int(ee.active_exits(config, 4, t, 80).sum()) for t in (0, 9, 10, 20, 29, 30, 79)]
    assert counts == [1, 1, 2, 3, 3, 4, 4]
    assert np.flatnonzero(ee.active_exits(config, 4, 10, 80)).tolist() == [2, 3]


def test_only_listed_exits_learn():
    every = ee.EarlyExitConfig("all", layers=(1, 3), depth_weight="uniform", e_scale=1.0)
    assert np.flatnonzero(ee.active_exits(every, 8, 0, 10)).tolist() == [1, 3, 7]
    assert ee.max_active_exits(every, 8) == 3
    chosen = ee.select_exits(every, 8, 0, 10)
    assert chosen.layers.tolist() == [1, 3, 7]
    np.testing.assert_allclose(chosen.weights, [1 / 3] * 3, rtol=1e-6)
    turning = ee.EarlyExitConfig("rotational", rotation_interval=4, layers=(1, 3))
    shown = [np.flatnonzero(ee.active_exits(turning, 8, t, 10)).tolist() for t in range(4)]
    assert shown == [[7], [1, 7], [7], [3, 7]]
    assert ee.max_active_exits(turning, 8) == 2
    with pytest.raises(ConfigError, match="names layer 8, but the model's layers are 0 to 7"):
        ee.check_exits(ee.EarlyExitConfig("all", layers=(8,)), 8)
    ee.check_exits(ee.EarlyExitConfig("last", layers=(8,)), 8)  # where none learns, none is missed


def test_last_and_all():
    assert np.flatnonzero(ee.active_exits(ee.EarlyExitConfig("last"), 4, 3, 9)).tolist() == [3]
    assert ee.active_exits(ee.EarlyExitConfig("all"), 4, 3, 9).all()


# Plain settings: built into a config inside the test, where beartype may draw at random.
curricula = st.fixed_dictionaries(
    {
        "curriculum": st.sampled_from(sorted(ee.CURRICULA)),
        "rotation_interval": st.integers(1, 9),
        "gradual_fraction": st.floats(0.1, 1),
        "e_scale": st.sampled_from([0.0, 0.1, 1.0, 2.0]),
        "depth_weight": st.sampled_from(sorted(ee.DEPTH_WEIGHTS)),
    }
)


@settings(max_examples=60, deadline=None)
@given(chosen=curricula, num_layers=st.integers(1, 9), step=st.integers(0, 49))
def test_slots_hold_exactly_the_active_exits(chosen, num_layers, step):
    config = ee.EarlyExitConfig(**chosen)
    weights = np.asarray(ee.exit_weights(config, num_layers, step, 50))
    early = np.flatnonzero(weights[:-1])
    exits = ee.select_exits(config, num_layers, step, 50)
    slots = ee.max_active_exits(config, num_layers)
    assert len(exits.layers) == slots > len(early)
    np.testing.assert_array_equal(exits.layers[: len(early)], early)
    assert exits.layers[-1] == num_layers - 1
    np.testing.assert_array_equal(exits.weights[: len(early)], weights[early])
    assert exits.weights[-1] == weights[-1] > 0
    assert (np.asarray(exits.weights[len(early) : -1]) == 0).all()
    np.testing.assert_allclose(exits.weights.sum(), 1, rtol=1e-5)
    # each early exit has its slot, every other layer none
    expected = np.full(num_layers, slots - 1)
    expected[early] = np.arange(len(early))
    np.testing.assert_array_equal(exits.slot_of_layer, expected)


@settings(max_examples=30, deadline=None)
@given(chosen=curricula, num_layers=st.integers(1, 9))
def test_max_active_exits_is_reached_and_never_passed(chosen, num_layers):
    config = ee.EarlyExitConfig(**chosen)
    counts = [int((ee.exit_weights(config, num_layers, t, 200) > 0).sum()) for t in range(200)]
    assert max(counts) == ee.max_active_exits(config, num_layers)


def test_zero_states_lose_ln_v_at_every_exit():
    slots, batch, length, width, vocab = 3, 2, 5, 4, 11
    loss, by_exit = ee.early_exit_loss(
        jnp.zeros((slots - 1, batch, length, width)),
        jnp.zeros((batch, length, width)),
        jax.random.normal(jax.random.key(0), (width, vocab)),
        jnp.ones((batch, length), jnp.int32),
        jnp.ones((batch, length), bool),
        jnp.array([0.2, 0.3, 0.5]),
        jnp.int32(batch * length),
        chunk=2,
    )
    np.testing.assert_allclose(by_exit, np.log(vocab), rtol=1e-6)
    assert loss == pytest.approx(np.log(vocab), rel=1e-6)


def test_no_valid_token_gives_zero_and_no_gradient():
    def loss(last):
        return ee.early_exit_loss(
            jnp.ones((0, 1, 3, 4)),
            last,
            jnp.ones((4, 7)),
            jnp.zeros((1, 3), jnp.int32),
            jnp.zeros((1, 3), bool),
            jnp.ones(1),
            jnp.int32(0),
            chunk=3,
        )[0]

    value, gradient = jax.value_and_grad(loss)(jnp.ones((1, 3, 4)))
    assert value == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize(
    "name, expected",
    [
        ("uniform", [0.5, 0.5, 0.5, 1]),
        ("linear", [0.5, 1, 1.5, 4]),
        ("sqrt", [0.5, 0.5 * 2**0.5, 0.5 * 3**0.5, 2]),
        ("inverse", [0.5, 0.25, 0.5 / 3, 0.25]),
        ("inverse_sqrt", [0.5, 0.5 / 2**0.5, 0.5 / 3**0.5, 0.5]),
        ("quadratic", [0, 0.5, 1.5, 4.5]),
    ],
)
def test_depth_weights_at_four_layers_by_hand(name, expected):
    """Each below the last layer times e_scale .5, before normalising."""
    np.testing.assert_allclose(ee.depth_weights(4, 0.5, name), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "length, share, shape", [(16, 0.25, (4, 1)), (18, 1 / 3, (6, 1)), (15, 0.4, (3, 2))]
)
def test_sampled_positions_are_drawn_evenly(length, share, shape):
    config = ee.EarlyExitConfig("all", exit_token_fraction=share)
    draw = jax.vmap(lambda key: ee.sample_positions(key, config, length))
    positions = np.asarray(draw(jax.random.split(jax.random.key(0), 20_000)))
    assert positions.shape == (20_000, *shape)
    # as many in each part of the window as in any other
    assert (positions // (length // shape[0]) == np.arange(shape[0])[:, None]).all()
    assert (np.diff(positions.reshape(20_000, -1), axis=1) > 0).all()
    counts = np.bincount(positions.ravel(), minlength=length)
    # a position is in a draw with probability `share`, at most once
    bound = 5 * np.sqrt(20_000 * share * (1 - share))
    assert (np.abs(counts - 20_000 * share) < bound).all()
    assert ee.sample_positions(jax.random.key(0), ee.EarlyExitConfig("all"), 16) is None


def test_a_share_of_the_tokens_gives_the_loss_and_gradient_on_average():
    """Averaged over all C(4, 2) pairs of positions, exactly that of all four."""
    keys = jax.random.split(jax.random.key(0), 5)
    early = jax.random.normal(keys[0], (2, 3, 4, 5))
    last = jax.random.normal(keys[1], (3, 4, 5))
    head = jax.random.normal(keys[2], (5, 7))
    targets = jax.random.randint(keys[3], (3, 4), 0, 7)
    valid = jax.random.bernoulli(keys[4], 0.7, (3, 4))
    weights = jnp.array([0.2, 0.3, 0.5])

    def loss(early, last, head, positions):
        kept = early if positions is None else early[:, :, positions]
        return ee.early_exit_loss(
            kept, last, head, targets, valid, weights, valid.sum(), positions=positions, chunk=2
        )

    function = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    whole = function(early, last, head, None)
    pairs = [jnp.array(pair) for pair in itertools.combinations(range(4), 2)]
    parts = [function(early, last, head, pair) for pair in pairs]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *parts)
    assert len({float(part[0][0]) for part in parts}) == 6
    for a, b in zip(jax.tree.leaves(mean), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ee.DEPTH_WEIGHTS)
@pytest.mark.parametrize("scale", [0.0, SMALLEST_FLOAT32, 1e-20, 1.0, 1e20, 3.4e38])
def test_exits_share_the_loss_at_every_scale(name, scale):
    """Against eq. 5 in float64, also at steps that have the last layer on alone."""
    config = ee.EarlyExitConfig("rotational", 5, e_scale=scale, depth_weight=name, layers=(0, 2))
    e = ee.depth_weights(5, scale, name)
    for step in range(5):
        on = np.asarray(ee.active_exits(config, 5, step, 10))
        exact = np.where(on, e, 0) / e[on].sum()
        weights = np.asarray(ee.exit_weights(config, 5, step, 10), np.float64)
        np.testing.assert_allclose(weights, exact, rtol=1e-6, atol=1e-30)
        slots = ee.select_exits(config, 5, step, 10)
        np.testing.assert_allclose(np.sum(slots.weights), 1, rtol=1e-6)


@pytest.mark.parametrize(
    "settings_, message",
    [
        ({"curriculum": "rotate"}, "curriculum='rotate' is not one of .*'rotational'"),
        ({"rotation_interval": 0}, "rotation_interval=0"),
        ({"gradual_fraction": 0.0}, "gradual_fraction=0.0"),
        ({"e_scale": -1.0}, "e_scale=-1.0"),
        ({"depth_weight": "cubic"}, "depth_weight='cubic' is not one of quadratic"),
        ({"exit_token_fraction": 0.0}, r"exit_token_fraction=0.0 must be in \(0, 1\]"),
        ({"z_loss": -1e-4}, "z_loss=-0.0001"),
    ],
)
def test_bad_settings_are_refused(settings_, message):
    with pytest.raises(ConfigError, match=message):
        ee.EarlyExitConfig(**settings_)


def test_alternating_curriculum_turns_all_exits_on_at_odd_steps():
    config = ee.EarlyExitConfig("alternating")
    on = [ee.active_exits(config, 3, step, 10).tolist() for step in range(3)]
    assert on == [[False, False, True], [True, True, True], [False, False, True]]
    # e(l) = 1 of equal weights: a third each where all are on, and the last alone where not.
    even = ee.EarlyExitConfig("alternating", e_scale=1.0, depth_weight="uniform")
    np.testing.assert_allclose(ee.exit_weights(even, 3, 0, 10), [0, 0, 1])
    np.testing.assert_allclose(ee.exit_weights(even, 3, 1, 10), [1 / 3] * 3, rtol=1e-6)
    assert ee.max_active_exits(even, 3) == 3


def test_sampled_positions_are_right_on_average_where_most_targets_are_masked():
    """Of every window 2 of 4 positions, 1 in each half: all draws there are, each as likely."""
    random = np.random.default_rng(0)
    early, last = (jnp.asarray(random.normal(size=shape)) for shape in ((2, 3, 4, 5), (3, 4, 5)))
    head = jnp.asarray(random.normal(size=(5, 7)), jnp.float32)
    targets = jnp.asarray(random.integers(0, 7, (3, 4)))
    # One completion at the end of a row, one of two tokens, and a row of prompts.
    valid = jnp.array([[0, 0, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0]], bool)
    config = ee.EarlyExitConfig(exit_token_fraction=0.5)
    draws = {
        tuple(ee.sample_positions(jax.random.key(seed), config, 4).ravel().tolist())
        for seed in range(64)
    }
    assert draws == {(0, 2), (0, 3), (1, 2), (1, 3)}

    def loss(early, positions):
        if positions is not None:
            early = early[:, :, positions]
        value, _ = ee.early_exit_loss(
            early, last, head, targets, valid, jnp.array([0.5, 0.3, 0.2]), valid.sum(),
            positions=positions, chunk=2,
        )  # fmt: skip
        return value

    function = jax.jit(jax.value_and_grad(loss))
    sampled = [function(early, jnp.array(positions)) for positions in sorted(draws)]
    assert all(np.isfinite(gradient).all() for _, gradient in sampled)
    value, gradient = jax.tree.map(lambda *parts: sum(parts) / len(parts), *sampled)
    expected, by_all = function(early, None)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, by_all, atol=1e-7)
    assert not gradient[:, 2].any()
