"""Accuracy on choices against layers run, at every exit and under each policy."""

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from layerskip_jax.report.drawing import BLUE, GREY, INK, VERMILION, new_figure, styled

# Told apart by marker and dash as well as by colour.
LINES = {
    "entropy": {"color": BLUE, "linestyle": "-", "marker": "o"},
    "margin": {"color": VERMILION, "linestyle": "--", "marker": "s"},
    "saturation": {"color": "#007a5e", "linestyle": "-.", "marker": "^"},
    "patience": {"color": "#8f4a7b", "linestyle": ":", "marker": "D"},
    "learned": {"color": INK, "linestyle": "-", "marker": "x"},
}


@styled
def choice_figure(result: dict) -> Figure:
    """Returns the figure of what `score_choices` returned."""
    figure, axes = new_figure()
    exits = result["exits"]
    axes.plot(
        [entry["layers"] for entry in exits], [entry["accuracy"] for entry in exits],
        color=GREY, marker="_", linewidth=1.2, label="one exit for all",
    )  # fmt: skip
    for name, curve in result["policies"].items():
        axes.plot(
            [point["layers"] for point in curve], [point["accuracy"] for point in curve],
            markersize=3.5, label=name, **LINES[name],
        )  # fmt: skip
    axes.set_xlim(0, exits[-1]["layers"] + 0.3)
    axes.set_xlabel("mean layers run")
    axes.set_ylabel("questions answered right")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(fontsize=9)
    return figure
