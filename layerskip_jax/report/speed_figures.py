"""Figures of how fast: throughput and its companions, and what self-speculation gained."""

import numpy as np
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from layerskip_jax.report.drawing import (
    BLUE,
    GREY,
    PLAIN_NUMBER,
    TICKS,
    VERMILION,
    Drawing,
    depth_figure,
    new_figure,
    plot_trend,
    step_axis,
    styled,
    thin,
)
from layerskip_jax.report.run_record import MissingPiece, RunRecord, number, threshold
from layerskip_jax.report.schedule_figures import drop_map, sampled_steps
from layerskip_jax.report.words import amount, percent

SMALL = 2.7  # inches: these are looked at side by side


def _curve(run: RunRecord, key: str, name: str, *, smoothed: bool = True):
    """Starts a small figure of one logged quantity; returns it with the data."""
    steps, values = run.series(key)
    if not len(steps):
        raise MissingPiece(f"No {name} was logged.")
    figure, axes = new_figure(SMALL)
    if smoothed:
        plot_trend(axes, steps, values, color=BLUE)
    else:
        axes.plot(*thin(steps, values, 300), color=BLUE)
    step_axis(axes, run.last_step)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=TICKS))
    axes.yaxis.set_major_formatter(PLAIN_NUMBER)
    axes.set_ylabel(name)
    return figure, axes, values


def _limit(axes, values: np.ndarray, *also: float) -> str:
    """Fits the y axis from 0 to the bulk of the values; returns what to say of the rest."""
    top = 1.12 * max(float(np.quantile(values, 0.98)), *also, 1e-12)
    axes.set_ylim(0, top)
    over = int((values > top).sum())
    if not over:
        return ""
    records = "one record" if over == 1 else f"{over:,} records"
    return f" Above the frame: {records}, the highest {amount(float(values.max()))}."


@styled
def throughput(run: RunRecord) -> Drawing:
    """Draws training tokens per second."""
    figure, axes, values = _curve(run, "tokens_per_second", "throughput")
    median = float(np.median(values))
    cut = _limit(axes, values, median)
    axes.set_ylabel("tokens per second")
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    return Drawing(
        figure,
        "Training throughput",
        f"Training tokens per second over the steps, median {amount(median)}.",
        f"Positions of all windows, padding included, over wall-clock time, all devices together; "
        f"median {amount(median)} tokens/s.{cut}",
    )


@styled
def gradient_norm(run: RunRecord) -> Drawing:
    """Draws the global norm of the gradient, and where clipping begins."""
    figure, axes, values = _curve(run, "gradient_norm", "gradient norm")
    clip = run.config.optimizer.clip_norm
    text = "Clipping is off."
    # A line far above every value would flatten the curve it is to explain.
    near = 0 < clip < 4 * float(np.quantile(values, 0.98))
    if near:
        axes.axhline(clip, color=VERMILION, linestyle="--", linewidth=1.2)
        text = f"Dashed: longer ones are scaled down to {clip:g}."
    elif clip > 0:
        text = f"Gradients longer than {clip:g} would be scaled down to that."
    cut = _limit(axes, values, clip if near else 0.0)
    return Drawing(
        figure,
        "Gradient norm",
        f"Gradient norm over the steps, median {amount(float(np.median(values)))}, highest "
        f"{amount(float(values.max()))}.",
        "Euclidean norm of the gradient of J over all parameters, before clipping, averaged over "
        f"the steps since the record before. {text}{cut}",
    )


@styled
def learning_rate(run: RunRecord) -> Drawing:
    """Draws the learning rate."""
    figure, axes, values = _curve(run, "learning_rate", "learning rate", smoothed=False)
    axes.set_ylim(0, 1.08 * float(values.max()) or 1)
    axes.yaxis.set_major_formatter(lambda value, _: _power(value))
    schedule = run.config.optimizer.schedule
    return Drawing(
        figure,
        "Learning rate",
        f"Learning rate over the steps, peak {_power(values.max())}, last {_power(values[-1])}.",
        f"AdamW's step size, schedule “{schedule}” after {run.config.optimizer.warmup_steps:,} "
        f"steps of warm-up; peak {_power(values.max())}.",
    )


def _power(value: float) -> str:
    """Returns 3e-4 or 2.5e-4, as learning rates are written."""
    digits, power = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(power)}" if value else "0"


@styled
def layers_run(run: RunRecord) -> Drawing:
    """Draws the share of layers that training ran, against what the schedule expects."""
    steps = sampled_steps(run.total_steps)
    expected = 1 - drop_map(run.config, steps).mean(axis=0)
    figure, axes, values = _curve(run, "layers_run", "share of layers run")
    axes.plot(steps, expected, color=VERMILION, linestyle="--", linewidth=1.4)
    low = min(float(values.min()), float(expected.min()))
    axes.set_ylim(max(low - 0.25 * (1 - low) - 0.01, 0), 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    mean = float(values.mean())
    return Drawing(
        figure,
        "Share of layers run",
        f"Share of layers run over the steps, {percent(mean, 1)} on average, expected "
        f"{percent(float(expected.mean()), 1)} over the whole run.",
        f"Pairs of layer and training sequence that were not skipped; {percent(mean, 1)} on "
        "average. Dashed: the share that p(l, t) expects.",
    )


@styled
def speculation_speed(run: RunRecord) -> Drawing:
    """Draws decoding speed of every measured pair against plain decoding.

    Raises:
      MissingPiece: nothing was measured.
    """
    pairs = [p for p in run.speculation_pairs() if number(p.get("tokens_per_second"))]
    if not pairs:
        raise MissingPiece("The sweep holds no decoding speed.")
    curves: dict[int, list] = {}
    for pair in sorted(pairs, key=lambda pair: (pair["exit_layer"], pair["draft_length"])):
        point = pair["draft_length"], pair["tokens_per_second"]
        curves.setdefault(pair["exit_layer"], []).append(point)
    figure, axes, color = depth_figure(list(curves), run.num_layers)
    for exit_layer, points in curves.items():
        axes.plot(*zip(*points, strict=True), color=color(exit_layer), marker="o", linewidth=1.5)
    best, spoken = run.best_pair(), ""
    speed = number(best.get("tokens_per_second"))
    plain = number(run.speculation.get("plain_tokens_per_second"))
    if speed:
        pair = f"E={best['exit_layer']}, G={best['draft_length']}"
        if below := threshold(best.get("stop_below")):
            pair += f", stop below {below}"
        label = f"best: {amount(speed)} tokens/s ({pair})"
        star = {"marker": "*", "markersize": 13, "linestyle": "none", "zorder": 4}
        axes.plot(best["draft_length"], speed, color=color(best["exit_layer"]), label=label, **star)
        spoken += f"; the best, {pair}, makes {amount(speed)}"
    if plain:
        label = f"plain decoding: {amount(plain)} tokens/s"
        axes.axhline(plain, color=GREY, linestyle="--", linewidth=1.4, label=label)
        spoken += f"; plain decoding makes {amount(plain)}"
    if spoken:
        figure.legend(loc="outside upper left", ncols=1)
    top = max(*(p["tokens_per_second"] for p in pairs), plain or 0, speed or 0)
    axes.set(ylim=(0, 1.08 * top), ylabel="tokens per second")
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    lengths = [p["draft_length"] for p in [*pairs, *([best] if speed else [])]]
    axes.set_xlim(min(lengths) - 0.5, max(lengths) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=TICKS, integer=True))
    axes.set_xlabel("draft length, G (tokens)")
    return Drawing(
        figure,
        "Decoding speed",
        f"Tokens per second of {len(pairs)} pairs of exit and draft length{spoken}.",
        "New tokens per second of wall-clock time on the machine of the sweep, by draft length G "
        "and exit E that drafts. Plain decoding is the same model, one token at a time.",
    )


@styled
def acceptance_by_position(run: RunRecord) -> Drawing:
    """Draws, for the longest draft of each exit, how often each position is accepted.

    Raises:
      MissingPiece: nothing was measured.
    """
    longest = {  # of several pairs of an exit, the last one stays
        pair["exit_layer"]: pair
        for pair in sorted(run.speculation_pairs(), key=lambda pair: pair["draft_length"])
        if pair.get("acceptance_by_position")
    }
    if not longest:
        raise MissingPiece("The sweep holds no acceptance by draft position.")
    figure, axes, color = depth_figure(sorted(longest), run.num_layers)
    spoken = []
    for exit_layer in sorted(longest):
        rates = longest[exit_layer]["acceptance_by_position"]
        rates = [np.nan if number(rate) is None else rate for rate in rates]
        axes.plot(range(1, len(rates) + 1), rates, color=color(exit_layer), marker="o")
        spoken.append(f"exit {exit_layer}: " + ", ".join(percent(r) for r in rates))
    axes.set(ylim=(0, 1.03), xlabel="position in the draft", ylabel="accepted")
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=TICKS, integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    return Drawing(
        figure,
        "Acceptance by draft position",
        "Share of drafted tokens accepted by position in the draft. " + "; ".join(spoken) + ".",
        "Of the tokens drafted at this position whose predecessors in the draft were all "
        "accepted, the share that the full model accepted too, for the longest draft measured "
        "of each exit.",
    )
