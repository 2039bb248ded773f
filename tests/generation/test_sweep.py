import dataclasses

import jax
import numpy as np
import pytest

from layerskip_jax.generation.generator import Generator
from layerskip_jax.generation.sweep import Way, _Turns, _with_thresholds, sweep
from layerskip_jax.model.transformer import Transformer
from layerskip_jax.schema import ConfigError
from tests.helpers import small_model

PROMPTS = [[1, 2], [3], [5, 6, 7], [9, 4]]


class Clocked(Generator):
    """A generator whose time is what a draft is said to cost, and 1 for what is no draft's."""

    of_a_draft = 0.0

    def generate(self, *args, **options):
        generation = super().generate(*args, **options)
        drafting, seconds = generation.drafting, float(len(generation.tokens[0]) - 1)
        if drafting is not None:
            seconds = drafting.drafted * self.of_a_draft + drafting.cycles
        return dataclasses.replace(generation, seconds=1 + seconds, seconds_to_first_token=1.0)


@pytest.fixture(scope="module")
def generator():
    return Clocked(Transformer(small_model(max_sequence_length=64), jax.random.key(0)))


def test_turns_by_hand():
    way = Way(1, 2, 0.5)
    turns = _Turns(
        {None: [[2.0, 4.0], [6.0, 4.0]], way: [[1.0, 2.0], [1.0, 3.0]]}, {way: [7, 8]}, 9
    )
    assert turns.speed(None) == 18 / 8  # the median of 6 and 10 seconds
    assert turns.speedup(way) == (6 / 3 + 10 / 4) / 2
    assert turns.of([1]) == _Turns({None: [[4.0], [4.0]], way: [[2.0], [3.0]]}, {way: [8]}, 9)


def test_thresholds_are_tried_with_the_best_exit_and_longer_drafts():
    fastest = [Way(2, 3), Way(2, 1), Way(1, 1), Way(4, 2), Way(3, 3)]
    tried = _with_thresholds(fastest, 3, (0.2, 0.6))
    pairs = [(2, 3), (2, 6)]
    assert tried == [Way(*pair, tau) for pair in pairs for tau in (0.2, 0.6)]
    assert _with_thresholds([Way(2, 1)], 1, (0.2,)) == [Way(2, 2, 0.2)]
    assert _with_thresholds(fastest, 3, ()) == []


def _swept(generator, of_a_draft, thresholds, **more):
    generator.of_a_draft = of_a_draft
    return sweep(
        generator, PROMPTS, 12, exits=(2,), draft_lengths=(4,), thresholds=thresholds, repeats=1,
        **more,
    )  # fmt: skip


def test_drafts_end_early_where_that_is_faster(generator):
    """Where a draft costs much, the fewest drafts are the fastest: the highest threshold."""
    result = _swept(generator, 0.5, (0.001, 0.99))
    tried = [(found["draft_length"], found["stop_below"]) for found in result["thresholds"]]
    assert tried == [(4, 0.001), (4, 0.99), (8, 0.001), (8, 0.99)]
    assert sorted(found["rounds"] for found in result["thresholds"]) == [1, 1, 2, 3]
    assert all(found["identical"] for found in result["thresholds"])
    best, static = result["best"], result["static"]
    # A random model's exit is never sure of .99, and of .001 always.
    drafts = [found["drafts_per_cycle"] for found in result["thresholds"]]
    assert drafts[0] == static["drafts_per_cycle"] < drafts[2] and drafts[1] == drafts[3] == 1
    assert best["stop_below"] == 0.99 and best["identical"] and best["verified"]
    assert best["speedup"] > best["static_speedup"] == static["speedup"]
    assert best["tokens_per_second"] == pytest.approx(
        best["speedup"] * result["plain_tokens_per_second"]
    )
    # By hand: 11 tokens and the prompt plainly, and with the drafts that there were.
    spent = sum(
        generator.generate(
            [prompt], 12, mode="self_speculative", exit_layer=2, draft_length=4, stop_below=0.99
        ).seconds
        for prompt in PROMPTS
    )  # fmt: skip
    assert best["speedup"] == pytest.approx(len(PROMPTS) * 12 / spent)


def test_the_pair_stays_where_no_threshold_is_faster(generator):
    """Drafts that cost nothing are best made always."""
    best = _swept(generator, 0.0, (0.99,))["best"]
    assert best["stop_below"] is None and best["draft_length"] == 4
    assert best["speedup"] == best["static_speedup"]
    assert _swept(generator, 0.0, ())["thresholds"] == []


def test_figures_by_task_are_those_of_its_prompts(generator):
    result = _swept(generator, 0.25, (), tasks=["b", "a", "b", "b"])
    assert [(found["task"], found["prompts"]) for found in result["tasks"]] == [("b", 3), ("a", 1)]
    for found, rows in zip(result["tasks"], ([0, 2, 3], [1]), strict=True):
        way = {"mode": "self_speculative", "exit_layer": 2, "draft_length": 4}
        made = [generator.generate([PROMPTS[row]], 12, **way) for row in rows]
        total = sum((one.drafting for one in made[1:]), start=made[0].drafting)
        assert found["acceptance"] == total.acceptance and found["identical"]
        assert found["tokens_per_cycle"] == total.tokens_per_cycle
        first = {"exit_layer": 2, "first_accepted": total.acceptance_by_position[0]}
        assert found["exits"] == [first]
        seconds = sum(one.seconds for one in made)
        assert found["speedup"] == pytest.approx(12 * len(rows) / seconds)
        assert found["static_speedup"] == found["speedup"]
        assert found["tokens_per_second"] == pytest.approx(12 * len(rows) / seconds)
    assert "tasks" not in _swept(generator, 0.25, ())


def test_wrong_values_are_refused_first(generator):
    with pytest.raises(ConfigError, match="tasks has 1 names for 4 prompts"):
        _swept(generator, 0.1, (), tasks=["a"])
    for value in (0.0, 1.0, np.nan):
        with pytest.raises(ConfigError, match="stop_below"):
            _swept(generator, 0.1, (0.5, value))
