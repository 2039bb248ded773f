"""What candidate exits are judged by: METHOD's values by hand, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from layerskip_jax.decoding.exit_policy import (
    POLICIES,
    ExitPolicy,
    candidate_exits,
    entropy_share,
    falling_threshold,
    look,
    margin,
    parse_policy,
    saturation,
    top_probability,
)
from layerskip_jax.decoding.weights import ExitClassifier
from layerskip_jax.schema import ConfigError


def _logits(*p):
    with np.errstate(divide="ignore"):
        return jnp.log(jnp.array(p, jnp.float32))


def test_the_entropy_of_a_few_distributions():
    assert entropy_share(_logits(0.5, 0.5, 0, 0)) * np.log(2) == pytest.approx(0.693147)
    assert entropy_share(_logits(0.5, 0.5, 1e-30, 1e-30)) * np.log(4) == pytest.approx(0.693147)
    assert entropy_share(jnp.zeros(7)) == pytest.approx(1)
    # Rows that pad a vocabulary are no tokens, and one token leaves no doubt.
    assert entropy_share(jnp.array([0, 0, 0, -jnp.inf])) == pytest.approx(1)
    assert entropy_share(jnp.array([3, -jnp.inf])) == 0


def test_margin_top_probability_and_saturation():
    logits = _logits(0.2, 0.5, 0.3)
    assert margin(logits) == pytest.approx(0.2)
    assert top_probability(logits) == pytest.approx(0.5)
    assert margin(_logits(0.4, 0.2, 0.4)) == pytest.approx(0, abs=1e-7)
    assert saturation(jnp.array([3.0, 4.0]), jnp.array([4.0, 3.0])) == pytest.approx(0.96)
    assert saturation(jnp.zeros(2), jnp.ones(2)) == 0


def test_a_streak_counts_candidates_that_agree():
    state, before, streaks = jnp.zeros((1, 1, 2)), None, []
    for token in (3, 3, 1, 1, 1):
        logits = jnp.zeros((1, 1, 4)).at[..., token].set(1)
        before = look(state, state, logits, before)
        streaks.append(before.streak.item())
    assert streaks == [1, 2, 1, 2, 3]
    kind = POLICIES["patience"]
    assert kind.is_sure(kind.score(None, before, None), jnp.float32(3)).item()
    assert not kind.is_sure(kind.score(None, before, None), jnp.float32(4)).item()


def test_a_first_candidate_has_no_state_to_compare_with():
    state = jnp.ones((2, 1, 2))
    shown = look(state, state, None, None)
    kind = POLICIES["saturation"]
    assert not kind.is_sure(kind.score(None, shown, None), jnp.float32(-1)).any()
    assert kind.is_sure(
        kind.score(None, look(state, state, None, shown), shown), jnp.float32(0.99)
    ).all()


def test_the_learned_score_is_a_sigmoid():
    classifier = ExitClassifier(jnp.array([1.0, -2.0]), jnp.float32(0.5))
    score = classifier(jnp.array([[[1.0, 0.25]]]))
    assert score.item() == pytest.approx(1 / (1 + np.exp(-1)))


@pytest.mark.parametrize("count, expected", [(0, 0.82), (100, 0.721832)])
def test_a_falling_threshold(count, expected):
    """CALM's own example: T = .8, N = 100."""
    found = falling_threshold(
        jnp.float32(0.8), jnp.int32(count), jnp.int32(100), POLICIES["margin"]
    )
    assert found == pytest.approx(expected, abs=1e-6)
    mirrored = falling_threshold(
        jnp.float32(0.2), jnp.int32(count), jnp.int32(100), POLICIES["entropy"]
    )
    assert mirrored == pytest.approx(1 - expected, abs=1e-6)


@pytest.mark.parametrize(
    "text, policy",
    [
        ("entropy:0.2", ExitPolicy("entropy", 0.2)),
        ("patience:3", ExitPolicy("patience", 3)),
        ("saturation:-0.5", ExitPolicy("saturation", -0.5)),
        ("margin", ExitPolicy("margin")),
    ],
)
def test_a_policy_in_words(text, policy):
    assert parse_policy(text) == policy
    assert str(policy) == text


@pytest.mark.parametrize(
    "text, message",
    [
        ("entrpy:0.2", "Did you mean 'entropy'"),
        ("entropy:low", "'low' is no number"),
        ("entropy:", "'' is no number"),
        ("entropy:nan", "the threshold of entropy=nan"),
        ("entropy:1.5", "the threshold of entropy=1.5"),
        ("patience:2.5", "the threshold of patience=2.5"),
        ("patience:0", "the threshold of patience=0 must be at least 1"),
        ("learned:2", "the threshold of learned=2"),
    ],
)
def test_what_is_no_policy_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_policy(text)


def test_candidates_lie_an_eighth_apart():
    assert candidate_exits(32) == (4, 8, 12, 16, 20, 24, 28)
    assert candidate_exits(6) == (1, 2, 3, 4, 5)
    assert candidate_exits(2) == (1,)
    assert candidate_exits(12, (8, 2, 8)) == (2, 8)
    for exits, message in (((), "empty"), ((12,), "exits=12"), ((0,), "exits=0")):
        with pytest.raises(ConfigError, match=message):
            candidate_exits(12, exits)
    with pytest.raises(ConfigError, match="one layer"):
        candidate_exits(1)
