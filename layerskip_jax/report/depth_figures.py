"""Figures of how many layers tokens need."""

import numpy as np

from layerskip_jax.report.drawing import (
    BLUE,
    GREY,
    VERMILION,
    Drawing,
    layer_ticks,
    new_figure,
    styled,
)
from layerskip_jax.report.run_record import RunRecord
from layerskip_jax.report.words import join_words, percent

# Of this run, and of what was measured beside it; further ones repeat the last.
LINES = (
    {"color": BLUE, "marker": "o"},
    {"color": VERMILION, "marker": "s", "linestyle": "--", "markerfacecolor": "white"},
    {"color": GREY, "marker": "^", "linestyle": ":"},
)


def depth_label(entry: dict, index: int) -> str:
    """Returns what to call a measured model: this run, or its name, shortened."""
    name = str(entry.get("model") or "another model")
    return "this run" if index == 0 else name if len(name) < 32 else name[:30] + "…"


@styled
def layers_needed(run: RunRecord) -> Drawing:
    """Draws the share of tokens that have settled by each exit.

    Raises:
      MissingPiece: nothing was measured.
    """
    depths = run.depths()
    figure, axes = new_figure()
    spoken = []
    for index, entry in enumerate(depths):
        settled = np.cumsum(entry["settled"]["histogram"]) / entry["tokens"]
        layers, label = entry["layers"], depth_label(entry, index)
        line = LINES[min(index, len(LINES) - 1)]
        axes.plot(np.arange(1, layers + 1), 100 * settled, label=label, **line)
        mean = entry["settled"]["mean"]
        axes.axvline(mean, color=line["color"], linestyle=":", linewidth=1)
        spoken.append(
            f"{label}: {percent(settled[max(layers // 2, 1) - 1])} by the middle, mean {mean:.2f} "
            f"of {layers}"
        )
    most = max(entry["layers"] for entry in depths)
    axes.set(xlabel="layers run, E", ylabel="tokens settled by exit E (%)", ylim=(0, 103))
    axes.set(xlim=(0.5, most + 0.5), xticks=layer_ticks(most, 1))
    axes.legend(loc="lower right")
    return Drawing(
        figure,
        "Tokens settled by each exit",
        f"Share of tokens settled by layers run. {join_words(spoken)}.",
        "A token has settled at the first exit from which on every exit predicts what the last "
        f"layer does, here over {run.layers_needed['tokens']:,} tokens of the validation set; "
        "dotted: the mean.",
    )
