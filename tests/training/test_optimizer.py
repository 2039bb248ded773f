import jax.numpy as jnp
import numpy as np
import pytest

from layerskip_jax.schema import SMALLEST_FLOAT32, ConfigError
from layerskip_jax.training.muon import Matrices
from layerskip_jax.training.optimizer import (
    OptimizerConfig,
    learning_rate_schedule,
    make_optimizer,
)
from tests.helpers import small_model

BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))
MODEL = small_model()
LARGEST = float(np.finfo(np.float32).max)


def _rates(steps, **settings):
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, **settings), 100)
    return [float(schedule(step)) for step in steps]


def test_cosine_warms_up_and_ends_at_its_share():
    rates = _rates([0, 4, 9, 10, 55, 100], warmup_steps=10, final_fraction=0.1)
    np.testing.assert_allclose(rates, [0.1, 0.5, 1.0, 1.0, 0.55, 0.1], atol=1e-6)


def test_wsd_stays_then_falls_linearly():
    rates = _rates(
        [10, 79, 80, 90, 100],
        schedule="wsd",
        warmup_steps=10,
        decay_fraction=0.2,
        final_fraction=0.0,
    )
    np.testing.assert_allclose(rates, [1, 1, 1, 0.5, 0], atol=1e-6)


def test_constant_without_warmup():
    assert _rates([0, 50, 99], schedule="constant", warmup_steps=0) == [1, 1, 1]


def test_decay_leaves_the_norms_alone():
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5)
    optimizer = make_optimizer(config, 10, Matrices({}), MODEL)
    parameters = {"final_norm": {"scale": jnp.ones(2)}, "head": jnp.ones((2, 2))}
    zeros = {"final_norm": {"scale": jnp.zeros(2)}, "head": jnp.zeros((2, 2))}
    updates, _ = optimizer.update(zeros, optimizer.init(parameters), parameters)
    assert (updates["final_norm"]["scale"] == 0).all()
    np.testing.assert_allclose(updates["head"], -0.05, rtol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"eps": 1e-18},
        {"beta1": 0.0, "beta2": 0.0},
        {"beta1": BELOW_ONE, "beta2": BELOW_ONE},
        {"clip_norm": SMALLEST_FLOAT32},
        {"clip_norm": LARGEST},
        {"learning_rate": SMALLEST_FLOAT32},
        {"final_fraction": SMALLEST_FLOAT32, "decay_fraction": SMALLEST_FLOAT32},
    ],
    ids=str,
)
def test_at_the_ends_of_their_ranges_settings_give_finite_updates(settings):
    """For gradients that are 0, small and large; Adam's update is within a few learning rates."""
    config = OptimizerConfig(**{"warmup_steps": 0, "weight_decay": 0.0, **settings})
    optimizer = make_optimizer(config, 10, Matrices({}), MODEL)
    parameters = {"head": jnp.ones(5)}
    state = optimizer.init(parameters)
    for _ in range(3):
        gradients = {"head": jnp.array([0.0, 1e-18, -1e-10, 1.0, 1e18])}
        updates, state = optimizer.update(gradients, state, parameters)
        assert np.isfinite(updates["head"]).all()
        assert np.abs(updates["head"]).max() <= 10 * config.learning_rate
        assert updates["head"][0] == 0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"beta2": 1.5}, r"beta2=1.5 must be in \[0, 1\)"),
        ({"beta1": 1.0}, r"beta1=1.0 must be in \[0, 1\)"),
        ({"beta2": 1 - 1e-9}, r"beta2=0.999999999 must be in \[0, 1\) in float32 too, .* it is 1"),
        ({"eps": 1e-20}, "eps=1e-20 must be at least 1e-18"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**settings)
