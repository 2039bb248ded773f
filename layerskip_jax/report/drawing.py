"""How every figure of the report looks, and how it becomes SVG inside a page."""

import dataclasses
import functools
import io
import math
import re
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

INK = "#1b1b1f"
MUTED = "#55555e"
# Okabe and Ito's palette, told apart with every common colour blindness; markers and dashes
# differ as well, so that no figure depends on colour alone.
BLUE = "#0072b2"
VERMILION = "#c44e00"
GREY = "#6b6b75"

# 360 units wide with 11-unit text: on a phone a unit is about a CSS pixel, on a desk 1.5.
WIDTH, HEIGHT = 5.0, 3.6

TICKS = (1, 2, 5, 10)  # tick intervals, times a power of ten
PLAIN_NUMBER = "{x:,.6g}"  # 0.5, 20, 1,500

# For words written among the curves.
LABEL = {
    "fontweight": "bold",
    "bbox": {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1},
}

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "layerskip",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.titlesize": "medium",
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dfdfe4",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "figure.facecolor": "white",
    # Labels may hold anything the user wrote, dollar signs included.
    "text.parse_math": False,
}


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure with its words.

    Attributes:
      figure: the matplotlib figure.
      title: what it shows, in a few words.
      label: what a reader who cannot see it should know; becomes its aria-label.
      caption: definitions of what it prints, plain text.
    """

    figure: Figure
    title: str
    label: str
    caption: str


def styled(draw: Callable) -> Callable:
    """Makes `draw` run under the report's style, leaving matplotlib's own as it was."""

    @functools.wraps(draw)
    def wrapper(*args, **kwargs):
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


def new_figure(height: float = HEIGHT, **grid: Any) -> tuple[Figure, Any]:
    """Returns an empty figure of the report's width, and its axes.

    Args:
      height: in inches of 72 units.
      **grid: as `Figure.subplots` takes it, for more axes than one.
    """
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(**grid)


def inline_svg(drawing: Drawing, name: str) -> Markup:
    """Returns the figure as an `<svg>` element to stand in an HTML page.

    Args:
      drawing: the figure.
      name: prefix of all its ids, so that several figures can share a page.
    """
    view, inside = re.search(
        r'<svg[^>]*(viewBox="[^"]*")[^>]*>(.*)</svg>', svg_text(drawing.figure), re.DOTALL
    ).groups()
    inside = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", inside)
    opening = Markup(
        '<svg xmlns:xlink="http://www.w3.org/1999/xlink" xmlns="http://www.w3.org/2000/svg" '
        '%s role="img" aria-label="%s">'
    )
    return opening % (Markup(view), drawing.label) + Markup(inside + "</svg>")


def svg_text(figure: Figure) -> str:
    """Returns the figure as a standalone SVG document."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata=nothing)
    # Six decimals of a coordinate are half of the file and no part of the picture.
    text = re.sub(
        r' (d|x|y)="[^"]*"',
        lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]),
        buffer.getvalue(),
    )
    return re.sub(r"[ \t]*\n[ \t]*", "\n", text)


def depth_colors(num_layers: int) -> Callable[[int], tuple]:
    """Returns the colour of an exit from the number of layers it runs, light to dark."""
    ramp = matplotlib.colormaps["plasma"]
    return lambda layers: ramp(0.7 * (num_layers - layers) / max(num_layers - 1, 1))


def depth_figure(exits: list[int], num_layers: int) -> tuple[Figure, Axes, Callable]:
    """Returns a figure for curves of several exits with its colour bar, and `depth_colors`."""
    figure, axes = new_figure()
    add_depth_bar(figure, axes, exits, num_layers)
    return figure, axes, depth_colors(num_layers)


def add_depth_bar(figure: Figure, axes: Axes, exits: list[int], num_layers: int) -> None:
    """Puts a colour bar beside `axes` that tells which colour is which of `exits`."""
    color = depth_colors(num_layers)
    mapping = ScalarMappable(
        BoundaryNorm(np.arange(len(exits) + 1) - 0.5, max(len(exits), 1)),
        ListedColormap([color(layers) for layers in exits]),
    )
    bar = figure.colorbar(mapping, ax=axes, pad=0.02, aspect=22)
    every = max(math.ceil(len(exits) / 13), 1)
    # Counted from the deepest, so that the last layer always has its number.
    shown = range(len(exits) - 1, -1, -every)
    bar.set_ticks(list(shown), labels=[str(exits[i]) for i in shown])
    bar.ax.tick_params(length=0, which="both")
    bar.outline.set_visible(False)
    bar.set_label("layers run, E")


def step_axis(axes: Axes, last: int) -> None:
    """Labels the x axis in optimizer steps from 0 to `last`."""
    axes.set_xlim(0, max(last, 1))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=TICKS, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("optimizer step, t")


def layer_ticks(count: int, first: int, most: int = 12) -> list[int]:
    """Returns at most about `most` of the numbers first..first+count-1, ends included."""
    every = max(math.ceil(count / most), 1)
    ticks = list(range(first, first + count, every))
    last = first + count - 1
    if ticks[-1] != last:
        if last - ticks[-1] < every / 1.5:
            ticks.pop()
        ticks.append(last)
    return ticks


def log_axis(axes: Axes, values: np.ndarray) -> None:
    """Makes the y axis logarithmic around `values`, with a few plain numbers on it."""
    low, high = float(values.min()), float(values.max())
    margin = max((high / low) ** 0.08, 1.03)
    low, high = low / margin**1.5, high * margin  # values are written below the lowest curve
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    decades = math.log10(high / low)
    by_power = LogLocator(subs=(1,) if decades > 3 else (1, 2, 5))
    axes.yaxis.set_major_locator(by_power if decades > 1 else MaxNLocator(6, steps=TICKS))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PLAIN_NUMBER)


def thin(steps: np.ndarray, values: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns at most about `limit` of the points, keeping each stretch's lowest and highest."""
    if len(steps) <= limit:
        return steps, values
    kept = []
    for chunk in np.array_split(np.arange(len(steps)), limit // 2):
        kept += sorted({chunk[values[chunk].argmin()], chunk[values[chunk].argmax()]})
    return steps[kept], values[kept]


def plot_trend(
    axes: Axes, steps: np.ndarray, values: np.ndarray, points: int = 400, **line: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Draws all values faintly, at most about `points` of them, and boldly what `smooth` returns.

    Returns:
      the steps and values of the bold curve.
    """
    axes.plot(*thin(steps, values, points), alpha=0.25, **{**line, "linewidth": 0.9})
    trend = smooth(steps, values, min(points, 150))
    axes.plot(*trend, zorder=3, **line)
    return trend


def smooth(
    steps: np.ndarray, values: np.ndarray, limit: int = 150
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the centred moving average over 3% of the points, at most `limit` of them.

    Near the beginning the window shrinks so that it stays centred, since one cut on one side
    would misplace a steep fall; near the end, where curves are flat and the eye rests, it
    only loses what lies past the end.
    """
    count = len(values)
    half = round(0.015 * count)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(count)
    before = np.minimum(half, index)
    after = np.minimum(before, count - 1 - index)
    means = (sums[index + after + 1] - sums[index - before]) / (before + after + 1)
    picked = np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(int))
    return steps[picked], means[picked]
