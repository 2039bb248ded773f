"""The report: one HTML page of a run that needs nothing beside itself."""

import html
import os
from collections.abc import Callable
from pathlib import Path, PurePath

from layerskip_jax.config import RunConfig
from layerskip_jax.report import quality_figures, schedule_figures, speed_figures
from layerskip_jax.report.drawing import svg_text
from layerskip_jax.report.html_parts import escape, figures, paragraph, table, tiles
from layerskip_jax.report.run_record import MissingPiece, RunRecord, number, perplexities, read_run
from layerskip_jax.report.stylesheet import CSS
from layerskip_jax.report.summary import headline, sentence
from layerskip_jax.report.words import amount, percent, times
from layerskip_jax.run_folder.atomic import write_bytes
from layerskip_jax.run_folder.object_store import AnyPath, is_remote, require_local
from layerskip_jax.schema import UserError, nearest

MOST_ROWS = 10  # of a table beside a figure

QUALITY = {"perplexity_by_exit": quality_figures.perplexity_by_exit}
LOSSES = {
    "training_loss": quality_figures.training_loss,
    "exit_losses": quality_figures.exit_losses,
}
MOVEMENT = {"perplexity_over_training": quality_figures.perplexity_over_training}
SCHEDULES = {
    "drop_probability": schedule_figures.drop_probability_map,
    "exit_curriculum": schedule_figures.exit_curriculum_map,
    "exit_weights": schedule_figures.exit_weight_bars,
}
VITALS = {
    "throughput": speed_figures.throughput,
    "layers_run": speed_figures.layers_run,
    "gradient_norm": speed_figures.gradient_norm,
    "learning_rate": speed_figures.learning_rate,
}
SPECULATION = {
    "speculation_speed": speed_figures.speculation_speed,
    "acceptance_by_position": speed_figures.acceptance_by_position,
}
FIGURES: dict[str, Callable] = {
    **QUALITY, **LOSSES, **MOVEMENT, **SCHEDULES, **VITALS, **SPECULATION,
}  # fmt: skip


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
        _write(Path(output), build_page(run).encode())
        return Path(output)
    _write(run.folder.report_file, build_page(run).encode())
    run.folder.upload()
    return run.folder.shown(run.folder.report_file)


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
        drawing = FIGURES[name](read_run(workdir))
    except MissingPiece as missing:
        raise UserError(str(missing)) from missing
    if path.suffix == ".svg":
        content = svg_text(drawing.figure).encode()
    else:
        temporary = path.with_name(f".{os.getpid()}.{path.name}")
        drawing.figure.savefig(temporary, dpi=200)
        content = temporary.read_bytes()
        temporary.unlink()
    _write(path, content)
    return path


def _write(path: Path, content: bytes) -> None:
    try:
        write_bytes(path, content)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})") from error


def build_page(run: RunRecord) -> str:
    """Returns the whole page as HTML."""
    home = run.folder.home
    name = (home if is_remote(home) else home.resolve()).name
    sections = [
        ("quality", "Perplexity by exit", figures(run, [*QUALITY.items()], _exit_table(run))),
        ("loss", "Training loss", figures(run, [*LOSSES.items()])),
        ("movement", "Perplexity by exit over the training", _movement(run)),
        ("schedules", "What was dropped, and which exits learned", _schedules(run)),
        ("vitals", "Throughput, gradient and learning rate", figures(run, [*VITALS.items()])),
        ("speculation", "What self-speculation gained", _speculation(run)),
        ("config", "Configuration and data", _settings(run)),
    ]
    links = "\n".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in sections)
    body = "\n".join(
        f'<section id="{key}">\n<h2>{escape(title)}</h2>\n{content}\n</section>'
        for key, title, content in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(name)} – LayerSkip run</title>
<style>{CSS}</style>
</head>
<body>
<header>
<h1>{html.escape(name)}</h1>
{paragraph(sentence(run) or "A LayerSkip training run.", "lead")}
{tiles(headline(run))}
<nav aria-label="Sections">
{links}
</nav>
</header>
<main>
{body}
</main>
<footer>{paragraph(f"Made by {run.command('report')}.")}</footer>
</body>
</html>
"""


def _exit_table(run: RunRecord) -> str:
    try:
        ours, plain = run.final_perplexities(), run.plain_perplexities()
    except MissingPiece:
        return ""
    last = ours.get(run.num_layers)
    headings = ["layers run, E", "perplexity", "to the last exit"]
    note = "“To the last exit” is the ratio of the perplexity to that of all layers."
    if plain:
        headings += ["plain twin", "to its last exit"]
    rows = []
    for layers, value in ours.items():
        row = [str(layers), amount(value), times(value / last if last else None)]
        if plain:
            twin, twin_last = plain.get(layers), plain.get(run.num_layers)
            both = twin is not None and twin_last is not None
            row += [amount(twin), times(twin / twin_last if both else None)]
        rows.append(row)
    marked = [i for i, layers in enumerate(ours) if layers == run.middle]
    if run.num_layers > 1 and marked:
        note += " The middle exit is set off."
    return table("The same in numbers", headings, rows, note=note, marked=marked)


def _movement(run: RunRecord) -> str:
    middle, last = run.middle, run.num_layers
    rows = []
    for evaluation in run.evaluations:
        values = perplexities(evaluation)
        if {middle, last} <= values.keys():
            ratio = times(values[middle] / values[last])
            step = f"{evaluation['step']:,}"
            rows.append([step, amount(values[middle]), amount(values[last]), ratio])
    if len(rows) < 2 or middle == last:
        return figures(run, [*MOVEMENT.items()])
    every = -(-len(rows) // MOST_ROWS)
    numbers = table(
        "The middle and the last exit",
        ["step", f"exit {middle}", f"exit {last}", "ratio"],
        rows[::-1][::every][::-1],
        note=f"Validation perplexity. {run.evaluation_note}"
        + (f" Every {every} evaluations, counted from the last." if every > 1 else ""),
    )
    return figures(run, [*MOVEMENT.items()], numbers)


def _schedules(run: RunRecord) -> str:
    intro = (
        "Both are functions of the step alone, drawn here from the configuration for the whole "
        "run, with no measurement in them."
    )
    return paragraph(intro) + figures(run, [*SCHEDULES.items()])


def _speculation(run: RunRecord) -> str:
    try:
        pairs, best = run.speculation_pairs(), run.best_pair()
    except MissingPiece as missing:
        return paragraph(str(missing), "note")
    plain = number(run.speculation.get("plain_tokens_per_second"))
    measured = [
        f"{run.speculation[key]:,} {words}"
        for key, words in (
            ("prompts", "prompts"),
            ("prompt_tokens", "prompt tokens each"),
            ("new_tokens", "new tokens each"),
        )
        if isinstance(run.speculation.get(key), int)
    ]
    intro = (
        "The first E layers draft G tokens, one after the other; the remaining layers verify all "
        "of them in one pass and keep the prefix they agree with."
    )
    if measured:
        intro += f" Measured on {', '.join(measured)}."
    if plain:
        intro += f" Plain decoding: {amount(plain)} tokens/s."
    rows, marked = [], []
    for index, pair in enumerate(pairs):
        if all(pair[key] == best.get(key) for key in ("exit_layer", "draft_length")):
            marked.append(index)
            pair = best
        same = pair.get("identical")
        rows.append(
            [
                str(pair["exit_layer"]),
                str(pair["draft_length"]),
                percent(number(pair.get("acceptance")), 1),
                amount(number(pair.get("tokens_per_cycle"))),
                amount(number(pair.get("tokens_per_second"))),
                times(number(pair.get("speedup"))),
                {True: "yes", False: "no"}.get(same, "–") if isinstance(same, bool) else "–",
            ]
        )
    pair_table = table(
        "All pairs, fastest first",
        ["exit, E", "draft, G", "accepted", "tokens/cycle", "tokens/s", "speedup", "same output"],
        rows,
        marked=marked,
        note="Accepted: drafted tokens that were kept, of all drafted. Tokens/cycle: mean number "
        "of new tokens for each pass of the verifying layers. Speedup: tokens/s to those of "
        "plain decoding. Same output: every token equals plain decoding's. The marked pair was "
        "run against plain decoding; the others are predicted from how often the drafts of "
        "their exit were accepted and from the measured time of a cycle.",
    )
    return paragraph(intro) + figures(run, [*SPECULATION.items()]) + pair_table


def _settings(run: RunRecord) -> str:
    values, defaults = _flat(run.config.to_dict()), _flat(RunConfig().to_dict())
    rows = [[key, value, defaults.get(key, "–")] for key, value in values.items()]
    changed = [i for i, (_, value, default) in enumerate(rows) if value != default]
    config_table = table(
        "",
        ["setting", "value", "default"],
        rows,
        marked=changed,
        text_columns=(0, 1, 2),
        kind="changed",
    )
    parts = [
        paragraph(f"{len(changed)} of {len(rows)} settings differ from their defaults (bold)."),
        f"<details>\n<summary>All settings</summary>\n{config_table}\n</details>",
    ]
    if run.data:
        data_rows = [[key, value] for key, value in _flat(run.data).items()]
        data_table = table("", ["data", "value"], data_rows, text_columns=(0, 1))
        parts.append(f"<details>\n<summary>The training data</summary>\n{data_table}\n</details>")
    else:
        parts.append(paragraph("The folder holds no manifest of its data (data.json)."))
    return "\n".join(parts)


def _flat(values: dict, prefix: str = "") -> dict[str, str]:
    """Returns dotted keys and their values as text."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        elif isinstance(value, int) and not isinstance(value, bool):
            flat[prefix + str(key)] = f"{value:,}"
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            flat[prefix + str(key)] = f"{len(value):,} of them"
        elif isinstance(value, list):
            flat[prefix + str(key)] = ", ".join(map(str, value)) or "(none)"
        else:
            flat[prefix + str(key)] = "(none)" if value in ("", None) else str(value)
    return flat
