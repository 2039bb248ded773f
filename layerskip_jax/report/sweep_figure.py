"""The speed-up of self-speculation over exits and draft lengths."""

from typing import Any

import numpy as np

from layerskip_jax.report.drawing import Figure, new_figure, styled


@styled
def draw_speedup(result: dict[str, Any]) -> Figure:
    """Draws contours of the speed-up over plain decoding, and the best pair.

    Args:
      result: what `layerskip_jax.generation.sweep.sweep` returns.
    """
    exits = sorted({pair["exit_layer"] for pair in result["pairs"]})
    lengths = sorted({pair["draft_length"] for pair in result["pairs"]})
    speedup = np.full((len(exits), len(lengths)), np.nan)
    for pair in result["pairs"]:
        at = exits.index(pair["exit_layer"]), lengths.index(pair["draft_length"])
        speedup[at] = pair["speedup"]
    figure = new_figure()
    axes = figure.add_subplot()
    if min(speedup.shape) > 1:  # one row or column has no contours; its numbers are below
        shades = axes.contourf(lengths, exits, speedup, levels=12, cmap="cividis")
        figure.colorbar(shades, ax=axes, label="speed-up over plain decoding")
        if speedup.min() < 1 < speedup.max():
            axes.contour(lengths, exits, speedup, levels=[1.0], colors="white", linestyles="--")
    for row, exit_layer in enumerate(exits):
        for column, length in enumerate(lengths):
            axes.annotate(
                f"{speedup[row, column]:.2f}",
                (length, exit_layer),
                ha="center",
                va="center",
                fontsize="small",
                bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "linewidth": 0},
            )
    best = result["best"]
    label = (
        f"best: E={best['exit_layer']}, G={best['draft_length']}, measured {best['speedup']:.2f}"
    )
    axes.plot(
        best["draft_length"], best["exit_layer"], "*", color="#c44e00", markersize=16, label=label
    )
    figure.legend(loc="outside upper left")
    axes.set_xticks(lengths)
    axes.set_yticks(exits)
    axes.margins(0.1)
    axes.set_xlabel("draft length, G (tokens)")
    axes.set_ylabel("layers that draft, E")
    return figure
