r"""Which part of the method does what: plain, dropout only, exits only, both, Don't Drop Dropout.

    python benchmarks/ablation.py --workdir=runs/ablation            # make ablation
    python benchmarks/ablation.py --workdir=runs/ablation --size=100m --source=FOLDER

Five runs from the same seed, on the same data, for as many steps: the variants of
`configs/ablation.py`. Prints perplexity by exit, loss, FLOPs and wall-clock against plain;
writes ablation.json as the runs end, and ablation.svg with each exit's perplexity over the
training. A run that is done is not run again, and one that was stopped goes on. `--quick` trains
for 60 steps on a megabyte of text, too little to tell the variants apart; give it a folder of
its own. The bar is that of `layerskip train`.
"""

import sys
from pathlib import Path

import harness
import numpy as np
from rich.table import Table

from layerskip_jax.commands import train
from layerskip_jax.report.drawing import (
    WIDTH,
    Figure,
    add_depth_bar,
    depth_colors,
    layer_ticks,
    log_axis,
    step_axis,
    styled,
)
from layerskip_jax.report.run_record import RunRecord, perplexities, read_run

CONFIG = Path(__file__).parents[1] / "configs" / "ablation.py"
VARIANTS = {
    "plain": "plain",
    "dropout": "dropout only",
    "exits": "exits only",
    "both": "both",
    "dont_drop": "dont_drop",
}
SIZES = {
    # vocabulary, window, share of the documents kept for validation
    "small": (2048, 128, 0.02),
    "100m": (32768, 1024, 0.01),
}
QUICK_STEPS = 60
COLORS = ("#c44e00", "#56b4e9", "#009e73", "#0072b2", "#6b6b75")
MARKERS = "s^vox"


def main(argv: list[str] | None = None) -> int:
    """Runs what is not done yet, prints the table and writes the figures."""
    parser = harness.parser(__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument(
        "--steps", type=int,
        help=f"optimizer steps (default: the recipe's, with --quick {QUICK_STEPS})",
    )  # fmt: skip
    options, overrides = harness.parse_training(parser, argv, lambda _: "ablation.json")
    steps = QUICK_STEPS if options.steps is None and options.quick else options.steps
    if steps is not None:
        overrides.insert(0, f"--config.training.steps={steps}")
    if options.quick:  # what the user gives comes later, and counts
        overrides.insert(0, f"--config.training.evaluate_every={QUICK_STEPS // 2}")
    suffix = "" if options.size == "small" else f"-{options.size}"
    runs = {}
    with harness.Bench(options, bar=False) as bench:
        bench.expect(1 + len(VARIANTS))
        bench.begin("preparing the data")
        data, code = harness.prepare_data(options, *SIZES[options.size])
        if code:
            return code
        for variant in VARIANTS:
            bench.begin(VARIANTS[variant])
            code = harness.run_verb(
                train,
                f"--config={CONFIG}:{variant}{suffix}",
                f"--workdir={options.workdir / variant}",
                f"--config.data.path={data}",
                *overrides,
            )
            if code:
                print(f"stopped in {variant}; the same command goes on", file=sys.stderr)
                return code
            runs[variant] = read_run(options.workdir / variant)
            figures = summarise(runs)
            # The table at the end has the exits.
            exits = {key: value for key, value in figures.items() if "/perplexity_exit_" in key}
            bench.add(exits, show=False)
            bench.add({k: v for k, v in figures.items() if k not in bench.figures})
        print_table(bench, runs)
        path = options.workdir / "ablation.svg"
        draw(runs).savefig(path)
        print(path)
    return 0


def step_seconds(run: RunRecord) -> float:
    """Returns the median wall-clock seconds of a step, compilation and evaluation aside."""
    _, speed = run.series("tokens_per_second")
    tokens, steps = run.metrics[-1]["tokens"], run.metrics[-1]["step"]
    return float(np.median(tokens / steps / speed[1:]))  # the first record holds the warm-up


def summarise(runs: dict[str, RunRecord]) -> dict:
    """Returns the figures of all runs, flat and named."""
    plain, figures = runs["plain"], {}
    middle, last = plain.middle, plain.num_layers
    base = plain.final_perplexities()
    for name, run in runs.items():
        values = run.final_perplexities()
        loss = {e["layers"]: e["loss"] for e in run.evaluations[-1]["exits"]}
        plain_loss = {e["layers"]: e["loss"] for e in plain.evaluations[-1]["exits"]}
        figures |= {f"{name}/perplexity_exit_{e}": value for e, value in values.items()}
        flops, plain_flops = (float(np.mean(r.series("step_flops")[1])) for r in (run, plain))
        figures |= {
            f"{name}/middle_over_plain": values[middle] / base[middle],
            f"{name}/last_over_plain": values[last] / base[last],
            f"{name}/last_loss_over_plain": loss[last] / plain_loss[last],
            f"{name}/flops_over_plain": flops / plain_flops,
            f"{name}/step_seconds": step_seconds(run),
            f"{name}/seconds_over_plain": step_seconds(run) / step_seconds(plain),
        }
    figures["tokens"] = plain.metrics[-1]["tokens"]
    figures["steps"] = plain.last_step
    return figures


def print_table(bench: harness.Bench, runs: dict[str, RunRecord]) -> None:
    """Prints perplexity by exit, and what each variant costs."""
    plain, figures = runs["plain"], bench.figures
    model = plain.config.model
    bench.print(
        f"\nL {model.num_layers}, D {model.model_dim}, V {model.vocab_size}; "
        f"{figures['steps']:,} steps, {figures['tokens'] / 1e6:.2f}M tokens; validation perplexity"
    )
    table = Table()
    table.add_column("layers run", justify="right")
    for name in runs:
        table.add_column(VARIANTS[name], justify="right")
    for layers in range(1, plain.num_layers + 1):
        if (
            layers in (plain.middle, plain.num_layers)
            or layers % max(model.num_layers // 8, 1) == 0
        ):
            values = (figures[f"{name}/perplexity_exit_{layers}"] for name in runs)
            table.add_row(str(layers), *(f"{value:,.1f}" for value in values))
    table.add_section()
    for label, key in {
        f"exit {plain.middle} / plain's": "middle_over_plain",
        f"exit {plain.num_layers} / plain's": "last_over_plain",
        "last loss / plain's": "last_loss_over_plain",
        "FLOPs / plain's": "flops_over_plain",
        "seconds a step / plain's": "seconds_over_plain",
    }.items():
        table.add_row(label, *(f"{figures[f'{name}/{key}']:.3f}" for name in runs))
    bench.print(table)


@styled
def draw(runs: dict[str, RunRecord]) -> Figure:
    """Draws perplexity by exit of all variants, and over the training of plain and both."""
    figure = Figure(figsize=(2.6 * WIDTH, 4.2), layout="constrained")
    by_exit, *over_time = figure.subplots(1, 3, sharey=True)
    values = {name: run.final_perplexities() for name, run in runs.items()}
    for (name, points), color, marker in zip(values.items(), COLORS, MARKERS, strict=True):
        by_exit.plot(
            list(points), list(points.values()), color=color, marker=marker, label=VARIANTS[name]
        )
    num_layers = runs["plain"].num_layers
    by_exit.set_xticks(layer_ticks(num_layers, 1))
    by_exit.set_xlabel("layers run before the exit, E")
    by_exit.set_ylabel("validation perplexity (log scale)")
    by_exit.legend()
    color = depth_colors(num_layers)
    everything = [value for points in values.values() for value in points.values()]
    for axes, name in zip(over_time, ("plain", "both"), strict=True):
        run, curves = runs[name], {}
        for evaluation in run.evaluations:
            for layers, value in perplexities(evaluation).items():
                curves.setdefault(layers, []).append((evaluation["step"], value))
        for layers, points in curves.items():
            steps, found = np.array(points).T
            axes.plot(steps, found, color=color(layers), linewidth=1.4)
            everything += list(found)
        axes.set_title(f"{VARIANTS[name]}: each exit over the training")
        step_axis(axes, run.last_step)
    log_axis(by_exit, np.array(everything))
    add_depth_bar(figure, over_time[-1], list(range(1, num_layers + 1)), num_layers)
    return figure


if __name__ == "__main__":
    harness.run(main)
