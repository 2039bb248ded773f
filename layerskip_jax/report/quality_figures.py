"""Figures of how good each exit is: perplexity by exit, and losses over the training."""

import numpy as np
from matplotlib.ticker import FixedLocator

from layerskip_jax.report.drawing import (
    BLUE,
    GREY,
    LABEL,
    VERMILION,
    Drawing,
    add_depth_bar,
    depth_colors,
    layer_ticks,
    log_axis,
    new_figure,
    smooth,
    step_axis,
    styled,
    thin,
)
from layerskip_jax.report.run_record import MissingPiece, RunRecord, perplexities
from layerskip_jax.report.words import amount, join_words


@styled
def perplexity_by_exit(run: RunRecord) -> Drawing:
    """Draws validation perplexity against the number of layers run, on a log axis.

    Raises:
      MissingPiece: the run has no evaluation.
    """
    ours, plain = run.final_perplexities(), run.plain_perplexities()
    unigram = run.unigram_perplexity
    figure, axes = new_figure(3.9)
    shown = [*ours.values(), *plain.values(), *([unigram] if unigram else [])]
    log_axis(axes, np.array(shown))
    if unigram:
        axes.axhline(unigram, color=GREY, linestyle=":", label="unigram baseline")
    if plain:
        label = "plain twin" if run.plain_label == "plain twin" else f"plain: {run.plain_label}"
        axes.plot(
            list(plain),
            list(plain.values()),
            color=VERMILION,
            linestyle="--",
            marker="s",
            markerfacecolor="white",
            label=label if len(label) < 42 else label[:40] + "…",
        )
    axes.plot(list(ours), list(ours.values()), color=BLUE, marker="o", label="this run")
    _mark_middle(axes, ours, run, BLUE, above=False)
    _mark_middle(axes, plain, run, VERMILION, above=True)
    _mark_last(axes, ours, plain, run)
    axes.set_xlim(0.5, run.num_layers * 1.13 + 0.35)
    axes.xaxis.set_major_locator(FixedLocator(layer_ticks(run.num_layers, 1)))
    axes.set_xlabel("layers run before the exit, E")
    axes.set_ylabel("perplexity (log scale)")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside upper left", ncols=1)

    step = run.evaluations[-1]["step"]
    spoken = f"Perplexity by layers run at step {step:,}. This run: {_spoken(ours)}."
    if plain:
        spoken += f" {run.plain_label}: {_spoken(plain)}."
    if unigram:
        spoken += f" Unigram baseline: {amount(unigram)}."
    caption = (
        f"Perplexity is exp(mean cross-entropy in nats per token) on the validation set, at step "
        f"{step:,}, with no layer dropped; lower is better. Exit E stops after the first E of "
        f"{run.num_layers} layers and applies the shared final norm and head. "
    )
    if plain:
        caption += (
            f"“{run.plain_label}” is the same training without layer dropout and early-exit loss. "
        )
    if unigram:
        caption += (
            f"The unigram baseline, exp(unigram entropy) = {amount(unigram)}, is the perplexity "
            "of a model that ignores all context. "
        )
    title = "This run and its plain twin" if plain else "This run"
    return Drawing(figure, title, spoken, caption)


def _mark_middle(axes, values: dict[int, float], run: RunRecord, color: str, *, above: bool):
    if run.middle in values and run.middle < run.num_layers:
        axes.annotate(
            amount(values[run.middle]),
            (run.middle, values[run.middle]),
            xytext=(0, 7 if above else -7),
            textcoords="offset points",
            ha="left" if above else "right",
            va="bottom" if above else "top",
            color=color,
            **LABEL,
        )


def _mark_last(axes, ours: dict[int, float], plain: dict[int, float], run: RunRecord) -> None:
    """Writes the values of the last exit at the right, apart where they would overlap."""
    last = run.num_layers
    ends = [(v[last], color) for v, color in ((ours, BLUE), (plain, VERMILION)) if last in v]
    ends.sort(key=lambda end: end[0])
    low, high = axes.get_ylim()
    near = len(ends) == 2 and np.log(ends[1][0] / ends[0][0]) < 0.08 * np.log(high / low)
    for (value, color), shift in zip(ends, (-7, 7), strict=False):
        axes.annotate(
            amount(value),
            (last, value),
            xytext=(7, shift if near else 0),
            textcoords="offset points",
            va="center",
            color=color,
            **LABEL,
        )


def _spoken(values: dict[int, float]) -> str:
    return join_words([f"{amount(value)} at {layers}" for layers, value in values.items()])


@styled
def training_loss(run: RunRecord) -> Drawing:
    """Draws the training loss J over the steps."""
    steps, values = run.series("loss")
    if not len(steps):
        raise MissingPiece("No finite loss was logged.")
    figure, axes = new_figure()
    axes.plot(*thin(steps, values, 500), color=BLUE, alpha=0.3, linewidth=1)
    smoothed = smooth(steps, values)
    axes.plot(*smoothed, color=BLUE)
    cut = _loss_axis(axes, run, [smoothed], values)
    axes.set_ylabel("loss J (nats per token)")
    weighting = (
        "the cross-entropy of the last layer"
        if run.config.early_exit.curriculum == "last"
        else "the weighted mean of the cross-entropies of the exits that are on"
    )
    return Drawing(
        figure,
        "Training loss",
        f"Training loss from {values[0]:.2f} nats per token at step {steps[0]:,} to "
        f"{smoothed[1][-1]:.2f} at step {steps[-1]:,}.",
        f"J is {weighting}, with layer dropout on. {_drawn(run, len(values))}{cut}",
    )


@styled
def exit_losses(run: RunRecord) -> Drawing:
    """Draws the training loss of each exit over the steps, coloured by depth."""
    series = run.exit_series()
    if not series:
        raise MissingPiece("No loss by exit was logged.")
    figure, axes = new_figure()
    color = depth_colors(run.num_layers)
    smoothed = {}
    for layers, (steps, values) in series.items():
        last = layers == run.num_layers
        raw = thin(steps, values, max(1200 // len(series), 40))
        axes.plot(*raw, color=color(layers), alpha=0.2, linewidth=0.8)
        smoothed[layers] = smooth(steps, values, max(1500 // len(series), 50))
        axes.plot(*smoothed[layers], color=color(layers), linewidth=2.4 if last else 1.5, zorder=3)
    values = np.concatenate([values for _, values in series.values()])
    cut = _loss_axis(axes, run, list(smoothed.values()), values)
    axes.set_ylabel("cross-entropy (nats per token)")
    add_depth_bar(figure, axes, list(series), run.num_layers)
    never = [str(e) for e in range(1, run.num_layers + 1) if e not in series]
    missing = ""
    if never and run.config.early_exit.curriculum != "last":
        exits = "Exit" if len(never) == 1 else "Exits"
        missing = f" {exits} {join_words(never)} carried no weight at any logged step."
    spoken = join_words([f"{s[1][-1]:.2f} at {layers}" for layers, s in smoothed.items()])
    return Drawing(
        figure,
        "Training loss of each exit",
        f"Training loss of each exit over the steps; at the end, by layers run: {spoken}.",
        "Cross-entropy on training text, with layer dropout on, before weighting; averaged over "
        f"the steps since the record before in which the exit was on.{missing} "
        f"{_drawn(run, max(len(steps) for steps, _ in series.values()))}{cut}",
    )


def _drawn(run: RunRecord, points: int) -> str:
    record = run.config.training.log_every
    every = "each logged step" if record == 1 else f"one record every {record} steps"
    if points < 34:  # the window of `smooth` is then a single point
        return f"Drawn: {every}."
    return f"Faint: {every}; bold: moving average over 3% of the records."


def _loss_axis(axes, run: RunRecord, smoothed: list, raw: np.ndarray) -> str:
    """Fits the axis to the curves after their first 10%; returns what to say of the cut."""
    step_axis(axes, run.last_step)
    settled = [v[s >= 0.1 * run.last_step] for s, v in smoothed]
    settled = np.concatenate([v for v in settled if len(v)] or [v for _, v in smoothed])
    low, high = float(settled.min()), float(settled.max())
    margin = 0.06 * (high - low) or 0.1
    axes.set_ylim(low - 2 * margin, high + margin)
    if float(raw.max()) <= high + margin:
        return ""
    return f" The first steps (up to {float(raw.max()):.1f} nats) lie above the frame."


@styled
def perplexity_over_training(run: RunRecord) -> Drawing:
    """Draws the perplexity of each exit at every evaluation.

    Raises:
      MissingPiece: fewer than two evaluations.
    """
    run.final_perplexities()
    if len(run.evaluations) < 2:
        raise MissingPiece(
            "There is only one evaluation, so no curve over the training; a run with "
            "`--config.training.evaluate_every=STEPS` makes more of them."
        )
    by_exit: dict[int, list] = {}
    for evaluation in run.evaluations:
        for layers, value in perplexities(evaluation).items():
            by_exit.setdefault(layers, []).append((evaluation["step"], value))
    figure, axes = new_figure()
    color = depth_colors(run.num_layers)
    exits = sorted(by_exit)
    alone = bool(run.evaluation_note)
    for layers in exits:
        last = layers == run.num_layers
        steps, values = np.array(by_exit[layers]).T
        if alone:
            axes.plot(
                steps[-1],
                values[-1],
                color=color(layers),
                marker="D",
                markerfacecolor="white",
                zorder=3,
                clip_on=False,
            )
            steps, values = steps[:-1], values[:-1]
        axes.plot(
            *thin(steps, values, 150),
            color=color(layers),
            marker="o" if len(steps) <= 25 else None,
            markersize=3,
            linewidth=2.4 if last else 1.5,
        )
    log_axis(axes, np.array([value for pairs in by_exit.values() for _, value in pairs]))
    step_axis(axes, max(run.last_step, run.evaluations[-1]["step"]))
    axes.set_ylabel("perplexity (log scale)")
    add_depth_bar(figure, axes, exits, run.num_layers)
    note = f" {run.evaluation_note}" if alone else ""
    if alone:
        note += " Diamonds: the last."
    moves = join_words(
        [f"exit {e} from {amount(by_exit[e][0][1])} to {amount(by_exit[e][-1][1])}" for e in exits]
    )
    return Drawing(
        figure,
        "At each evaluation",
        f"Perplexity of each exit at {len(run.evaluations)} evaluations: {moves}.",
        f"Validation perplexity of each exit, no layer dropped, at each evaluation.{note}",
    )
