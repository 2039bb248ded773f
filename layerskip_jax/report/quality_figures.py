"""Figures of how good each exit is: perplexity by exit, and losses over the training."""

import numpy as np

from layerskip_jax.report.drawing import (
    BLUE,
    GREY,
    LABEL,
    VERMILION,
    Drawing,
    depth_figure,
    layer_ticks,
    log_axis,
    new_figure,
    plot_trend,
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
    _write_values(axes, ours, plain, run)
    axes.set(xlabel="layers run before the exit, E", ylabel="perplexity (log scale)")
    axes.set(xlim=(0.5, run.num_layers * 1.13 + 0.35), xticks=layer_ticks(run.num_layers, 1))
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


def _write_values(axes, ours: dict[int, float], plain: dict[int, float], run: RunRecord) -> None:
    """Writes the values of the middle exit, and of the last one apart where they would overlap."""
    middle, last = run.middle, run.num_layers

    def write(layers: int, value: float, color: str, shift: tuple[int, int], **place) -> None:
        axes.annotate(
            amount(value), (layers, value), xytext=shift, textcoords="offset points", color=color,
            **place, **LABEL,
        )  # fmt: skip

    if middle in ours and middle < last:
        write(middle, ours[middle], BLUE, (0, -7), ha="right", va="top")
    if middle in plain and middle < last:
        write(middle, plain[middle], VERMILION, (0, 7), ha="left", va="bottom")
    ends = sorted((v[last], color) for v, color in ((ours, BLUE), (plain, VERMILION)) if last in v)
    low, high = axes.get_ylim()
    near = len(ends) == 2 and np.log(ends[1][0] / ends[0][0]) < 0.08 * np.log(high / low)
    for (value, color), shift in zip(ends, (-7, 7), strict=False):
        write(last, value, color, (7, shift if near else 0), va="center")


def _spoken(values: dict[int, float]) -> str:
    return join_words([f"{amount(value)} at {layers}" for layers, value in values.items()])


@styled
def training_loss(run: RunRecord) -> Drawing:
    """Draws the training loss J over the steps."""
    steps, values = run.series("loss")
    if not len(steps):
        raise MissingPiece("No finite loss was logged.")
    figure, axes = new_figure()
    smoothed = plot_trend(axes, steps, values, color=BLUE)
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
    figure, axes, color = depth_figure(list(series), run.num_layers)
    points = max(1200 // len(series), 50)
    smoothed = {
        layers: plot_trend(axes, *curve, points, color=color(layers), linewidth=_width(run, layers))
        for layers, curve in series.items()
    }
    values = np.concatenate([values for _, values in series.values()])
    cut = _loss_axis(axes, run, list(smoothed.values()), values)
    axes.set_ylabel("cross-entropy (nats per token)")
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


def _width(run: RunRecord, layers: int) -> float:
    return 2.4 if layers == run.num_layers else 1.5


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
    exits = sorted(by_exit)
    figure, axes, color = depth_figure(exits, run.num_layers)
    alone = bool(run.evaluation_note)
    for layers in exits:
        steps, values = np.array(by_exit[layers]).T
        if alone:
            diamond = {"marker": "D", "markerfacecolor": "white", "zorder": 3, "clip_on": False}
            axes.plot(steps[-1], values[-1], color=color(layers), **diamond)
            steps, values = steps[:-1], values[:-1]
        axes.plot(
            *thin(steps, values, 150),
            color=color(layers),
            marker="o" if len(steps) <= 25 else None,
            markersize=3,
            linewidth=_width(run, layers),
        )
    log_axis(axes, np.array([value for pairs in by_exit.values() for _, value in pairs]))
    step_axis(axes, max(run.last_step, run.evaluations[-1]["step"]))
    axes.set_ylabel("perplexity (log scale)")
    note = f" {run.evaluation_note} Diamonds: the last." if alone else ""
    moves = join_words(
        [f"exit {e} from {amount(by_exit[e][0][1])} to {amount(by_exit[e][-1][1])}" for e in exits]
    )
    return Drawing(
        figure,
        "At each evaluation",
        f"Perplexity of each exit at {len(run.evaluations)} evaluations: {moves}.",
        f"Validation perplexity of each exit, no layer dropped, at each evaluation.{note}",
    )
