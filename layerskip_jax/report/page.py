"""The report: one HTML page of a run that needs nothing beside itself."""

import html
import importlib.resources
import io
import math
import re
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import jinja2
from markupsafe import Markup

from layerskip_jax.config import RunConfig
from layerskip_jax.evaluation.inspection import saving
from layerskip_jax.report import depth_figures, quality_figures, schedule_figures, speed_figures
from layerskip_jax.report.drawing import inline_svg, svg_text
from layerskip_jax.report.run_record import (
    MissingPiece,
    RunRecord,
    number,
    perplexities,
    read_run,
    threshold,
)
from layerskip_jax.report.summary import headline, sentence
from layerskip_jax.report.words import amount, percent, times
from layerskip_jax.run_folder.atomic import named_writes, write_bytes
from layerskip_jax.run_folder.object_store import AnyPath, is_remote, require_local
from layerskip_jax.schema import UserError, nearest

MOST_ROWS = 10  # of a table beside a figure

# Sections of the template and the figures in them, each known to the user by its function's name.
SECTIONS: dict[str, tuple[Callable, ...]] = {
    "quality": (quality_figures.perplexity_by_exit,),
    "loss": (quality_figures.training_loss, quality_figures.exit_losses),
    "movement": (quality_figures.perplexity_over_training,),
    "schedules": (
        schedule_figures.drop_probability,
        schedule_figures.exit_curriculum,
        schedule_figures.exit_weights,
    ),
    "vitals": (
        speed_figures.throughput,
        speed_figures.layers_run,
        speed_figures.gradient_norm,
        speed_figures.learning_rate,
    ),
    "layers": (depth_figures.layers_needed,),
    "speculation": (speed_figures.speculation_speed, speed_figures.acceptance_by_position),
}
FIGURES = {draw.__name__: draw for draws in SECTIONS.values() for draw in draws}

# A row of a table as the template takes it: a CSS class, or "", and the cells.
Row = tuple[str, list[str]]


def write_report(workdir: str | PurePath, output: str | Path | None = None) -> AnyPath:
    """Writes the HTML page of a run and returns its path.

    Args:
      workdir: the run's folder.
      output: the page; None takes `report.html` in that folder.

    Raises:
      UserError: no run, a run without metrics, a damaged file, or an unwritable output.
    """
    run = read_run(workdir)
    if output:
        require_local(output, "--output")
    path = Path(output) if output else run.folder.report_file
    _write(path, build_page(run).encode())
    if output:
        return path
    run.folder.upload()
    return run.folder.shown(path)


def save_figure(workdir: str | PurePath, name: str, path: str | Path) -> Path:
    """Writes one figure of a run by itself, as SVG or PNG by the ending of `path`.

    Args:
      workdir: the run's folder.
      name: one of `FIGURES`, such as `perplexity_by_exit`.
      path: the file to write.

    Raises:
      UserError: unknown name or ending, or the run lacks what the figure shows.
    """
    require_local(path, "--output")
    path = Path(path)
    if name not in FIGURES:
        raise UserError(f"there is no figure {name!r}.{nearest(name, FIGURES)}")
    if path.suffix not in (".svg", ".png"):
        raise UserError(f"{path} must end in .svg or .png")
    try:
        figure = FIGURES[name](read_run(workdir)).figure
    except MissingPiece as missing:
        raise UserError(str(missing)) from missing
    if path.suffix == ".svg":
        content = svg_text(figure).encode()
    else:
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=200)
        content = picture.getvalue()
    _write(path, content)
    return path


def _write(path: Path, content: bytes) -> None:
    with named_writes(path):
        write_bytes(path, content)


def build_page(run: RunRecord) -> str:
    """Returns the whole page as HTML."""
    files = importlib.resources.files(__package__)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"amount": amount, "code": _code, "inline_svg": inline_svg}
    template = environment.from_string((files / "page.html.jinja").read_text(encoding="utf-8"))
    home = run.folder.home
    return template.render(
        run=run,
        name=(home if is_remote(home) else home.resolve()).name,
        css=(files / "page.css").read_text(encoding="utf-8"),
        sentence=sentence(run),
        headline=headline(run),
        drawn={key: _draw(run, draws) for key, draws in SECTIONS.items()},
        exit_rows=_exit_rows(run),
        **_further(run),
        **_movement(run),
        **_layers(run),
        **_speculation(run),
        config_rows=_config_rows(run.config),
        data_rows=[("", [key, value]) for key, value in _flat(run.data).items()],
    )


def _code(text: str) -> Markup:
    """Escapes plain text; what stands between backticks becomes `<code>`."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text)))


def _draw(run: RunRecord, draws: tuple[Callable, ...]) -> dict[str, Any]:
    """Draws the figures of a section; a note stands for each that the run cannot fill."""
    drawings, notes = {}, []
    for draw in draws:
        try:
            drawings[draw.__name__] = draw(run)
        except MissingPiece as missing:
            notes.append(str(missing))
    return {"drawings": drawings, "notes": list(dict.fromkeys(notes))}


def _exit_rows(run: RunRecord) -> list[Row]:
    ours, plain = run.final_perplexities() if run.evaluations else {}, run.plain_perplexities()
    rows = []
    for layers, value in ours.items():
        cells = [str(layers), amount(value), times(run.to_last(ours, layers))]
        if plain:
            cells += [amount(plain.get(layers)), times(run.to_last(plain, layers))]
        rows.append(("best" if layers == run.middle < run.num_layers else "", cells))
    return rows


def _further(run: RunRecord) -> dict[str, Any]:
    """Returns rows of the further validation sets by exit, and of tasks, with their columns."""
    sets, scores = run.further_perplexities(), run.task_scores()
    own = run.final_perplexities() if sets else {}
    set_rows = [
        ("", [str(e), amount(own.get(e)), *(amount(values.get(e)) for values in sets.values())])
        for e in sorted(set().union(*sets.values()))
    ]
    exits = sorted(set().union(*scores.values()))
    task_rows = [
        ("", [f"{task}, {metric}", *(amount(values.get(e)) for e in exits)])
        for (task, metric), values in scores.items()
    ]
    return {
        "set_names": list(sets), "set_rows": set_rows, "task_exits": exits, "task_rows": task_rows,
        "task_step": run.tasks[-1]["step"] if run.tasks else 0,
    }  # fmt: skip


def _movement(run: RunRecord) -> dict[str, Any]:
    """Returns rows of the middle and the last exit, and how many evaluations lie between two."""
    rows = []
    for evaluation in run.evaluations:
        values = perplexities(evaluation)
        if ratio := run.to_last(values, run.middle):
            ends = [amount(values[run.middle]), amount(values[run.num_layers])]
            rows.append(("", [f"{evaluation['step']:,}", *ends, times(ratio)]))
    if len(rows) < 2 or run.middle == run.num_layers:
        rows = []
    every = math.ceil(len(rows) / MOST_ROWS)
    return {"movement_rows": rows[::-1][:: every or 1][::-1], "movement_every": every}


def _layers(run: RunRecord) -> dict[str, Any]:
    """Returns rows of the layers that tokens need, of all tokens and of each class."""
    try:
        depths = run.depths()
    except MissingPiece:
        return {"depth_rows": [], "class_rows": [], "class_labels": []}
    labels = [depth_figures.depth_label(entry, index) for index, entry in enumerate(depths)]
    rows = []
    for label, entry in zip(labels, depths, strict=True):
        means = [entry[name]["mean"] for name in ("first_agreement", "settled")]
        savings = [percent(saving(mean, entry["layers"]), 1) for mean in means]
        cells = [cell for pair in zip(means, savings, strict=True) for cell in pair]
        cells = [amount(cell) if isinstance(cell, float) else cell for cell in cells]
        changes = amount(float(entry["changes_of_mind"]["mean"]))
        rows.append(("", [label, str(entry["layers"]), *cells, changes]))
    settled = [_settled_by_class(entry) for entry in depths]
    shares = {
        str(entry["class"]): entry["tokens"] / depths[0]["tokens"]
        for entry in depths[0].get("classes") or []
        if isinstance(entry, dict) and number(entry.get("tokens")) and "class" in entry
    }
    class_rows = [
        ("", [name, percent(share, 1), *(amount(found.get(name)) for found in settled)])
        for name, share in shares.items()
    ]
    return {"depth_rows": rows, "class_rows": class_rows, "class_labels": labels}


def _settled_by_class(entry: dict) -> dict[str, float | None]:
    return {
        str(found.get("class")): number(found.get("settled"))
        for found in entry.get("classes") or []
        if isinstance(found, dict)
    }


def _speculation(run: RunRecord) -> dict[str, Any]:
    """Returns rows of all measured pairs, and what they were measured on and against."""
    best, rows = run.best_pair(), []
    pairs = run.pairs
    if pairs and threshold(best.get("stop_below")):
        pairs = [best, *pairs]  # it is none of those that draft G tokens always
    for pair in pairs:
        marked = pair is best if pairs is not run.pairs else _same_pair(pair, best)
        pair = best if marked else pair
        same = pair.get("identical")
        length, below = str(pair["draft_length"]), threshold(pair.get("stop_below"))
        cells = [
            str(pair["exit_layer"]),
            f"up to {length}, until below {below}" if below else length,
            percent(number(pair.get("acceptance")), 1),
            *(amount(number(pair.get(key))) for key in ("tokens_per_cycle", "tokens_per_second")),
            times(number(pair.get("speedup"))),
            ("yes" if same else "no") if isinstance(same, bool) else "–",
        ]
        rows.append(("best" if marked else "", cells))
    measured = {"prompts": "", "prompt_tokens": " each", "new_tokens": " each"}
    return {
        "pair_rows": rows,
        "measured_on": [
            f"{run.speculation[key]:,} {key.replace('_', ' ')}{each}"
            for key, each in measured.items()
            if isinstance(run.speculation.get(key), int)
        ],
        "plain_speed": number(run.speculation.get("plain_tokens_per_second")),
    }


def _same_pair(one: dict, other: dict) -> bool:
    return all(one[key] == other[key] for key in ("exit_layer", "draft_length"))


def _config_rows(config: RunConfig) -> list[Row]:
    defaults, rows = _flat(RunConfig().to_dict()), []
    for key, value in _flat(config.to_dict()).items():
        default = defaults.get(key, "–")
        rows.append(("changed" if value != default else "", [key, value, default]))
    return rows


def _flat(values: dict, prefix: str = "") -> dict[str, str]:
    """Returns dotted keys and their values as text."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
            continue
        if isinstance(value, int) and not isinstance(value, bool):
            text = f"{value:,}"
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            text = f"{len(value):,} of them"
        elif isinstance(value, list):
            text = ", ".join(map(str, value))
        else:
            text = "" if value is None else str(value)
        flat[f"{prefix}{key}"] = text or "(none)"
    return flat
