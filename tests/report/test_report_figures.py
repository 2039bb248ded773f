"""What the figures draw, on values worked by hand."""

import dataclasses

import numpy as np
import pytest

from layerskip_jax.early_exit_loss import CURRICULA, DEPTH_WEIGHTS, EarlyExitConfig
from layerskip_jax.layer_dropout import LayerDropoutConfig
from layerskip_jax.report import schedule_figures
from layerskip_jax.report.drawing import layer_ticks, smooth, thin
from layerskip_jax.report.page import FIGURES
from layerskip_jax.report.run_record import MissingPiece, read_run
from layerskip_jax.report.summary import sentence, training_seconds
from layerskip_jax.report.words import amount, count, duration, join_words, times
from tests.report.synthetic import make_run, small_config


def test_rotational_map_is_the_hand_worked_one():
    config = small_config(layers=8)
    on = schedule_figures.exit_map(config, np.arange(8))
    assert on.shape == (8, 8)
    sets = [set(np.flatnonzero(column)) for column in on.T]
    assert sets[:4] == [{0, 4, 7}, {1, 5, 7}, {2, 6, 7}, {3, 7}]
    assert sets[4:] == sets[:4]
    assert schedule_figures.rotation_period(config) == 4


def test_rotation_of_an_interval_that_does_not_divide_the_depth_takes_all_layers():
    assert schedule_figures.rotation_period(small_config(layers=6, rotation_interval=5)) == 6
    assert schedule_figures.rotation_period(small_config(layers=1, rotation_interval=1)) == 1


def test_exit_shares_and_weights_over_the_whole_run():
    share, weights = schedule_figures.exit_means(small_config(layers=8, steps=60))
    np.testing.assert_allclose(share, [0.25] * 7 + [1], rtol=1e-6)
    assert weights.sum() == pytest.approx(1)
    assert weights[0] == 0
    # All four exits of a small model, e_scale 0.2 (docs/method.md, section 2).
    config = small_config(layers=4, curriculum="all")
    share, weights = schedule_figures.exit_means(config)
    np.testing.assert_allclose(share, 1)
    np.testing.assert_allclose(weights, [0, 0.045455, 0.136364, 0.818182], atol=1e-6)


def test_exit_means_of_a_run_longer_than_one_piece():
    share, weights = schedule_figures.exit_means(small_config(layers=8, steps=5001))
    # 5001 = 4 * 1250 + 1: the exits of step 0 come once more than the others.
    expected = [1251 / 5001, *[1250 / 5001] * 3, 1251 / 5001, *[1250 / 5001] * 2, 1]
    np.testing.assert_allclose(share, expected, rtol=1e-6)
    assert weights.sum() == pytest.approx(1)


def test_gradual_map_turns_exits_on_from_the_top():
    config = small_config(layers=4, steps=40, curriculum="gradual", gradual_fraction=0.5)
    steps = schedule_figures.sampled_steps(40)
    on = schedule_figures.exit_map(config, steps)
    # Layer l joins at t = 0.5 * 40 * (3 - l) / 4.
    assert [int(steps[row.argmax()]) for row in on] == [15, 10, 5, 0]


def test_drop_map_is_linear_in_depth_and_falls_to_zero():
    config = small_config(layers=4, steps=11)
    p = schedule_figures.drop_map(config, np.array([0, 5, 10]))
    np.testing.assert_allclose(p[:, 0], [0, 0.2, 0.4, 0.6], atol=1e-6)
    np.testing.assert_allclose(p[:, 1], [0, 0.1, 0.2, 0.3], atol=1e-6)
    np.testing.assert_allclose(p[:, 2], 0, atol=1e-6)


@pytest.mark.parametrize("total, limit, expected", [(3, 120, [0, 1, 2]), (101, 3, [0, 50, 100])])
def test_sampled_steps(total, limit, expected):
    assert schedule_figures.sampled_steps(total, limit).tolist() == expected


@pytest.mark.parametrize("depth_weight", DEPTH_WEIGHTS)
def test_the_weights_are_described_as_they_were_set(tmp_path, depth_weight):
    run = read_run(make_run(tmp_path, small_config(depth_weight=depth_weight, e_scale=0.7)))
    caption = FIGURES["exit_weights"](run).caption
    others = {name: weight.caption for name, weight in DEPTH_WEIGHTS.items()}
    assert others.pop(depth_weight) in caption and "e_scale = 0.7" in caption
    assert not any(other in caption for other in others.values())


@pytest.mark.parametrize("curriculum", CURRICULA)
def test_the_curriculum_is_described_as_it_was_set(tmp_path, curriculum):
    config = small_config(curriculum=curriculum)
    exits = dataclasses.replace(config.early_exit, layers=(1, 2))
    run = read_run(make_run(tmp_path, dataclasses.replace(config, early_exit=exits)))
    if CURRICULA[curriculum].drawn == "words":
        with pytest.raises(MissingPiece) as missing:
            FIGURES["exit_curriculum"](run)
        caption = str(missing.value)
    else:
        caption = FIGURES["exit_curriculum"](run).caption
    assert CURRICULA[curriculum].caption in caption
    assert ("Only those behind layers 1, 2 may learn." in caption) == (curriculum != "last")


def test_what_is_off_is_said_and_not_drawn(tmp_path):
    config = dataclasses.replace(
        small_config(), layer_dropout=LayerDropoutConfig(), early_exit=EarlyExitConfig()
    )
    run = read_run(make_run(tmp_path / "run", config))
    for name in ("drop_probability", "layers_run", "exit_curriculum", "exit_weights"):
        with pytest.raises(MissingPiece):
            FIGURES[name](run)


def test_every_figure_says_what_it_shows(tmp_path):
    run = read_run(make_run(tmp_path / "run", small_config()))
    for name, draw in FIGURES.items():
        drawing = draw(run)
        axes = drawing.figure.axes[0]
        assert axes.get_xlabel() and axes.get_ylabel(), name
        assert len(drawing.label) > 30 and len(drawing.caption) > 30, name
    label = FIGURES["exit_curriculum"](run).label
    assert "layer 0 25%" in label and "layer 7 100%" in label


def test_perplexity_figure_holds_the_evaluated_values(tmp_path):
    run = read_run(make_run(tmp_path / "run", small_config()))
    lines = {
        line.get_label(): line.get_ydata()
        for line in FIGURES["perplexity_by_exit"](run).figure.axes[0].lines
    }
    np.testing.assert_allclose(lines["this run"], list(run.final_perplexities().values()))
    np.testing.assert_allclose(lines["unigram baseline"], np.exp(6.31))
    assert len(lines["plain: dropout and exits off"]) == 8


def test_last_evaluation_on_other_text_stands_apart(tmp_path):
    config = small_config()
    drawn = FIGURES["perplexity_over_training"](read_run(make_run(tmp_path / "a", config)))
    assert {len(line.get_xdata()) for line in drawn.figure.axes[0].lines} == {3}
    training = dataclasses.replace(config.training, evaluate_batches=2)
    config = dataclasses.replace(config, training=training)
    drawn = FIGURES["perplexity_over_training"](read_run(make_run(tmp_path / "b", config)))
    assert [len(line.get_xdata()) for line in drawn.figure.axes[0].lines] == [1, 2] * 8
    assert "the same 2 batches of it, drawn by a fixed seed" in drawn.caption


def test_training_time_adds_up_over_resumptions(tmp_path):
    run = read_run(make_run(tmp_path / "run", small_config()))
    metrics = [{"step": i + 1, "seconds": s} for i, s in enumerate([5.0, 9.0, 2.0, 4.0])]
    assert training_seconds(dataclasses.replace(run, metrics=metrics)) == 13.0


def test_sentence_names_the_middle_and_the_last_exit(tmp_path):
    run = read_run(make_run(tmp_path / "run", small_config(), upto=40))
    values = run.final_perplexities()
    text = sentence(run)
    assert "Stopped after 4 of its 8 layers" in text
    assert amount(values[4]) in text and times(values[4] / values[8]) in text
    assert "40 of 60 steps" in text


def test_smooth_keeps_constants_and_straight_beginnings():
    steps = np.arange(1000)
    _, flat = smooth(steps, np.full(1000, 3.0))
    np.testing.assert_allclose(flat, 3.0)
    picked, line = smooth(steps, steps.astype(float), limit=1000)
    np.testing.assert_allclose(line[:900], picked[:900])


def test_thin_keeps_extremes():
    values = np.zeros(10_000)
    values[[1234, 8000]] = 5, -7
    steps, kept = thin(np.arange(10_000), values, 100)
    assert len(kept) <= 100 and kept.max() == 5 and kept.min() == -7
    assert (np.diff(steps) > 0).all()


@pytest.mark.parametrize(
    "number, first, expected",
    [(8, 1, [1, 2, 3, 4, 5, 6, 7, 8]), (1, 0, [0]), (32, 0, [*range(0, 30, 3), 31])],
)
def test_layer_ticks_include_both_ends(number, first, expected):
    assert layer_ticks(number, first) == expected


def test_numbers_as_people_write_them():
    assert [amount(x) for x in (24.849, 1934, 0.01234, 0, None)] == [
        "24.8", "1,930", "0.0123", "0", "–",
    ]  # fmt: skip
    assert [count(x) for x in (812, 24_600, 7_901_440, 1.5e9)] == [
        "812", "24.6 thousand", "7.90 million", "1.50 billion",
    ]  # fmt: skip
    assert [times(x) for x in (0.973, 1.2, 107.4)] == ["0.97×", "1.20×", "107×"]
    assert [duration(s) for s in (48, 725, 12_000, 187_200)] == [
        "48 s", "12 min 5 s", "3 h 20 min", "2 d 4 h",
    ]  # fmt: skip
    assert join_words(["a", "b", "c"]) == "a, b and c" and join_words(["a"]) == "a"
