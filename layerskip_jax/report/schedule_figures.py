"""Heat maps of what the config asked for: which layers were skipped, which exits learned."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.ticker import PercentFormatter

from layerskip_jax.config import RunConfig
from layerskip_jax.early_exit_loss import CURRICULA, DEPTH_WEIGHTS, active_exits
from layerskip_jax.early_exit_loss import exit_weights as weights_at
from layerskip_jax.layer_dropout import drop_probabilities
from layerskip_jax.report.drawing import (
    BLUE,
    INK,
    Drawing,
    layer_ticks,
    new_figure,
    step_axis,
    styled,
)
from layerskip_jax.report.run_record import MissingPiece, RunRecord
from layerskip_jax.report.words import percent

MOST_COLUMNS = 120  # most steps drawn side by side; finer than that no screen shows
WINDOW = 48  # most steps of a curriculum that turns at every step
MOST_TICKS = 14


def sampled_steps(total_steps: int, limit: int = MOST_COLUMNS) -> np.ndarray:
    """Returns at most `limit` steps t, evenly spread from 0 to T-1, ends included."""
    return np.unique(np.linspace(0, total_steps - 1, min(limit, total_steps)).round().astype(int))


def drop_map(config: RunConfig, steps: np.ndarray) -> np.ndarray:
    """Returns p(l, t) as an array [L, len(steps)].

    Raises:
      MissingPiece: layer dropout is off.
    """
    if config.layer_dropout.p_max == 0:
        raise MissingPiece("Layer dropout is off (p_max = 0): every layer runs at every step.")

    def one(step):
        return drop_probabilities(
            config.layer_dropout, config.model.num_layers, step, config.training.steps
        )

    return np.asarray(jax.vmap(one)(jnp.asarray(steps, jnp.int32))).T


def exit_map(config: RunConfig, steps: np.ndarray) -> np.ndarray:
    """Returns C(t, l), whether layer l's exit is on at step t, as a bool array [L, len(steps)]."""
    layers, total = config.model.num_layers, config.training.steps
    one = jax.vmap(lambda step: active_exits(config.early_exit, layers, step, total))
    return np.asarray(one(jnp.asarray(steps, jnp.int32))).T


@functools.lru_cache(maxsize=4)  # two figures ask for the same
def exit_means(config: RunConfig) -> tuple[np.ndarray, np.ndarray]:
    """Averages over all T steps: the share in which each exit is on, and its weight w(t, l)."""
    layers, total = config.model.num_layers, config.training.steps

    @jax.jit
    def sums(steps):
        def one(step):
            on = active_exits(config.early_exit, layers, step, total)
            weights = weights_at(config.early_exit, layers, step, total)
            return jnp.where(step < total, jnp.stack([on, weights]), 0.0)

        return jax.vmap(one)(steps).sum(0)

    size = min(total, 4096)
    mean = np.zeros((2, layers))
    for start in range(0, total, size):
        mean += np.asarray(sums(jnp.arange(start, start + size))) / total
    return mean[0], mean[1]


def rotation_period(config: RunConfig) -> int:
    """Returns after how many steps a curriculum that turns repeats itself."""
    layers = config.model.num_layers
    turns = exit_map(config, np.arange(layers))
    for period in range(1, layers):
        if layers % period == 0 and (np.roll(turns, period, axis=1) == turns).all():
            return period
    return layers


@styled
def drop_probability(run: RunRecord) -> Drawing:
    """Draws p(l, t) over steps and layers.

    Raises:
      MissingPiece: layer dropout is off.
    """
    config = run.config.layer_dropout
    p = drop_map(run.config, sampled_steps(run.total_steps))
    figure, axes = new_figure(_height(run.num_layers))
    image = _heat(axes, p, run, run.total_steps, cmap="Blues", vmin=0, vmax=config.p_max)
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=22, format=PercentFormatter(1))
    bar.outline.set_visible(False)
    bar.set_label("skip probability")
    note = _mark_now(axes, run)
    kept = 1 - float(p.mean())
    return Drawing(
        figure,
        "How often each layer is skipped",
        f"Heat map of the skip probability of {run.num_layers} layers over {run.total_steps:,} "
        f"steps, schedule {config.depth_schedule} over the layers and {config.time_schedule} over "
        f"the steps; it peaks at {percent(float(p.max()), 1)}, and {percent(kept, 1)} of the "
        "layers run on average.",
        f"p(l, t) = p_max D(l) S(t): the probability that a training sequence skips layer l at "
        f"step t. Here p_max = {config.p_max:g}, D is “{config.depth_schedule}” and S is "
        f"“{config.time_schedule}”; on average {percent(kept, 1)} of the layers run. Layers count "
        f"from 0 (exit E reads the output of layer E-1).{note}",
    )


@styled
def exit_curriculum(run: RunRecord) -> Drawing:
    """Draws which exits are on at which steps, beside the share of all steps.

    A rotational curriculum is drawn step by step from its beginning; a gradual one, which
    changes slowly, over all steps.

    Raises:
      MissingPiece: the curriculum is the same at every step; the message says what it is.
    """
    config, total = run.config.early_exit, run.total_steps
    curriculum = CURRICULA[config.curriculum]
    caption = curriculum.caption
    if config.layers and config.curriculum != "last":
        caption += f" Only those behind layers {', '.join(map(str, config.layers))} may learn."
    if curriculum.drawn == "words":
        raise MissingPiece(caption)
    if curriculum.drawn == "period":
        period = rotation_period(run.config)
        window = min(total, WINDOW, max(2 * period, 16))
        steps, end = np.arange(window), window
        caption += (
            f" They repeat every {period} steps. Left: the first {window} of {total:,} steps, one "
            "column each. "
        )
    else:
        steps, end = sampled_steps(total), total
        caption += " Left: all steps. "
    on, (share, _) = exit_map(run.config, steps), exit_means(run.config)
    figure, (axes, side) = new_figure(
        _height(run.num_layers), ncols=2, sharey=True, width_ratios=(2.6, 1)
    )
    colors = ListedColormap(["#eeeef2", BLUE])
    _heat(axes, on.astype(float), run, end, cmap=colors, vmin=0, vmax=1)
    if len(steps) == end:
        # White seams turn the blocks back into single steps and layers.
        seams = {"color": "white", "linewidth": 0.6}
        axes.vlines(np.arange(1, end) - 0.5, -0.5, run.num_layers - 0.5, **seams)
        axes.hlines(np.arange(run.num_layers) - 0.5, -0.5, end - 0.5, **seams)
    note = _mark_now(axes, run) if end == total else ""
    side.barh(np.arange(run.num_layers), share, color=BLUE, height=0.75)
    side.set(xlim=(0, 1), xticks=(0, 0.5, 1), xlabel="on, of all steps")
    side.xaxis.set_major_formatter(PercentFormatter(1))
    side.tick_params(axis="y", length=0)
    side.grid(False, axis="y")
    shares = ", ".join(f"layer {layer} {percent(float(s))}" for layer, s in enumerate(share))
    return Drawing(
        figure,
        "Which exits learn when",
        f"Map of the exits that are on, {config.curriculum} curriculum, and the share of all "
        f"{total:,} steps in which each is: {shares}.",
        f"Blue: the exit behind layer l is in the loss at step t. {caption}Right: the share of all "
        f"{total:,} steps in which it is. The last layer always learns.{note}",
    )


@styled
def exit_weights(run: RunRecord) -> Drawing:
    """Draws the mean weight of each exit in the loss.

    Raises:
      MissingPiece: the curriculum has only the last exit.
    """
    config = run.config.early_exit
    if config.curriculum == "last":
        raise MissingPiece(CURRICULA["last"].caption)
    _, weights = exit_means(run.config)
    figure, axes = new_figure(_height(run.num_layers))
    layers = np.arange(run.num_layers)
    axes.barh(layers, weights, color=BLUE, height=0.75)
    labelled = layers if run.num_layers <= 24 else layer_ticks(run.num_layers, 0, MOST_TICKS)
    for layer in labelled:
        text = percent(float(weights[layer]), 1)
        axes.annotate(
            text, (weights[layer], layer), xytext=(4, 0), textcoords="offset points", va="center",
            color=INK,
        )  # fmt: skip
    axes.set(xlim=(0, 1.22 * float(weights.max())), xlabel="mean weight in the loss")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(False, axis="y")
    _layer_axis(axes, run.num_layers)
    listed = ", ".join(f"layer {layer} {percent(float(weights[layer]), 1)}" for layer in layers)
    return Drawing(
        figure,
        "How much each exit counts",
        f"Mean weight of each exit in the loss: {listed}.",
        f"w(t, l) averaged over all {run.total_steps:,} steps; a step's weights sum to 100%. "
        f"{DEPTH_WEIGHTS[config.depth_weight].caption} Early exits are scaled by e_scale = "
        f"{config.e_scale:g}.",
    )


def _height(num_layers: int) -> float:
    return min(max(3.2, 0.8 + 0.13 * num_layers), 7.5)


def _layer_axis(axes, num_layers: int) -> None:
    ticks = layer_ticks(num_layers, 0, MOST_TICKS)
    axes.set(ylim=(-0.5, num_layers - 0.5), yticks=ticks, ylabel="layer, l")


def _heat(axes, values: np.ndarray, run: RunRecord, end: int, **style):
    extent = (-0.5, end - 0.5, -0.5, run.num_layers - 0.5)
    image = axes.imshow(
        values, origin="lower", aspect="auto", interpolation="none", extent=extent, **style
    )
    axes.grid(False)
    step_axis(axes, end)
    axes.set_xlim(-0.5, end - 0.5)
    _layer_axis(axes, run.num_layers)
    axes.spines[:].set_visible(False)
    return image


def _mark_now(axes, run: RunRecord) -> str:
    """Marks how far an unfinished run has come; returns what to say of the mark."""
    if run.last_step >= run.total_steps:
        return ""
    axes.axvline(run.last_step, color=INK, linestyle="--", linewidth=1.2)
    return f" Dashed: step {run.last_step:,}, where the run stands."
