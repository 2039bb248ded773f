r"""What an early exit gains and the last one pays: each dial of the recipe, one at a time.

    python benchmarks/frontier.py --workdir=runs/frontier
    python benchmarks/frontier.py --workdir=runs/frontier --model=ablation

One model, trained again for as many steps on the same data with one setting of the quickstart's
recipe changed at a time: layer dropout, the weights of the exits, which exits learn and when.
Prints the last exit's perplexity, the share of single drafts (G = 1) that exits L/8, L/4 and L/2
get accepted, and a step's FLOPs over a plain one's; writes MODEL.json as the runs end, and
MODEL.svg with acceptance over the last exit's perplexity. A run that is done is not run again, and
one that was stopped goes on. `--quick` trains for 30 steps on a megabyte of text, too little to
tell the dials apart; give it a folder of its own. The bar is that of `layerskip train`.
"""

import sys
from pathlib import Path

import harness
from rich.table import Table

from layerskip_jax.commands import sweep, train
from layerskip_jax.config import RunConfig
from layerskip_jax.report.drawing import WIDTH, Figure, styled
from layerskip_jax.report.run_record import RunRecord, read_run
from layerskip_jax.training.flops import CostModel

CONFIGS = Path(__file__).parents[1] / "configs"
# What makes another recipe the quickstart's, but for its model, its steps and its learning rate.
RECIPE = {
    "layer_dropout.p_max": 0.2,
    "layer_dropout.time_schedule": "constant",
    "layer_dropout.row_groups": 8,
    "early_exit.curriculum": "all",
    "early_exit.depth_weight": "uniform",
    "early_exit.e_scale": 1.0,
}
MODELS = {
    "quickstart": ("quickstart.py", {}),
    "ablation": ("ablation.py:both", {**RECIPE, "early_exit.layers": (2, 5)}),
}
DIALS = {
    "the recipe": {},
    "no dropout": {"layer_dropout.p_max": 0.0},
    "dropout .5": {"layer_dropout.p_max": 0.5},
    "eq. 6 weights": {"early_exit.depth_weight": "quadratic"},
    "all exits": {"early_exit.layers": ()},
    "all, in rotation of 4": {
        "early_exit.layers": (),
        "early_exit.curriculum": "rotational",
        "early_exit.rotation_interval": 4,
    },
    "early weights x 0.2": {"early_exit.e_scale": 0.2},
}
VOCABULARY, WINDOW, HELD_OUT = 2048, 128, 0.02
QUICK_STEPS = 30
MARKERS, COLORS = "*ox^vsD", ("#0072b2", "#56b4e9", "#c44e00", "#009e73", "#6b6b75", "#cc79a7", "k")


def main(argv: list[str] | None = None) -> int:
    """Runs what is not done yet, prints the table and writes the figures."""
    parser = harness.parser(__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="quickstart")
    options, overrides = harness.parse_training(
        parser, argv, lambda options: f"{options.model}.json"
    )
    recipe, base = MODELS[options.model]
    if options.quick:  # what the user gives comes later, and counts
        overrides.insert(0, f"--config.training.steps={QUICK_STEPS}")
    runs = {}
    with harness.Bench(options, bar=False) as bench:
        bench.expect(1 + len(DIALS))
        bench.begin("preparing the data")
        data, code = harness.prepare_data(options, VOCABULARY, WINDOW, HELD_OUT)
        if code:
            return code
        given = [f"--config={CONFIGS / recipe}", *settings(base), f"--config.data.path={data}"]
        for index, (dial, changes) in enumerate(DIALS.items()):
            bench.begin(dial)
            workdir = options.workdir / options.model / f"{index}"
            code = harness.run_verb(
                train, f"--workdir={workdir}", *given, *settings(changes), *overrides
            )
            code = code or count_accepted(workdir, options.quick)
            if code:
                print(f"stopped in {dial}; the same command goes on", file=sys.stderr)
                return code
            runs[dial] = read_run(workdir)
            bench.add(summarise(dial, runs[dial]))
        print_table(bench, runs)
        path = options.workdir / f"{options.model}.svg"
        draw(runs).savefig(path)
        print(path)
    return 0


def count_accepted(workdir: Path, quick: bool) -> int:
    """Sweeps exits L/8, L/4 and L/2 of a trained run, unless that is done."""
    if (workdir / "speculation.json").exists():
        return 0
    layers = read_run(workdir).num_layers
    exits = sorted({max(layers // part, 1) for part in (8, 4, 2)})
    return harness.run_verb(
        sweep,
        f"--workdir={workdir}",
        f"--exits={','.join(map(str, exits))}",
        "--drafts=1",
        "--stop-below=none",
        *(["--prompts=4", "--new-tokens=16"] if quick else []),
    )


def settings(values: dict) -> list[str]:
    """Returns values of a config as they are given on the command line."""
    return [f"--config.{name}={value}" for name, value in values.items()]


def accepted(run: RunRecord) -> dict[int, float]:
    """Returns the share of single drafts that were accepted, by exit."""
    return dict(sorted((pair["exit_layer"], pair["acceptance"]) for pair in run.pairs))


def flops_over_plain(config: RunConfig) -> float:
    """Returns the FLOPs of a step over a plain one's, on average over the run."""
    cost = CostModel(config, WINDOW)
    return cost.planned(0, config.training.steps).needed / cost.plain().needed


def summarise(dial: str, run: RunRecord) -> dict[str, float]:
    """Returns the figures of a run, flat and named."""
    perplexities, last = run.final_perplexities(), run.num_layers
    figures = {f"{dial}/last_perplexity": perplexities[last]}
    for layers, share in accepted(run).items():
        figures[f"{dial}/perplexity_exit_{layers}"] = perplexities[layers]
        figures[f"{dial}/accepted_exit_{layers}"] = share
    return {**figures, f"{dial}/flops_over_plain": flops_over_plain(run.config)}


def print_table(bench: harness.Bench, runs: dict[str, RunRecord]) -> None:
    """Prints a line for each dial."""
    some = next(iter(runs.values()))
    model, exits = some.config.model, list(accepted(some))
    bench.print(
        f"\nL {model.num_layers}, D {model.model_dim}, V {model.vocab_size}; {some.last_step:,} "
        "steps; validation perplexity, and single drafts accepted"
    )
    table = Table()
    table.add_column("what is changed")
    for title in (*(f"exit {e}" for e in exits), f"exit {some.num_layers}"):
        table.add_column(title, justify="right")
    for title in (*(f"E={e}" for e in exits), "FLOPs"):
        table.add_column(title, justify="right")
    for dial in runs:
        row = [bench.figures[f"{dial}/perplexity_exit_{e}"] for e in exits]
        row = [f"{value:.1f}" for value in (*row, bench.figures[f"{dial}/last_perplexity"])]
        row += [f"{bench.figures[f'{dial}/accepted_exit_{e}']:.0%}" for e in exits]
        table.add_row(dial, *row, f"{bench.figures[f'{dial}/flops_over_plain']:.2f}")
    bench.print(table)


@styled
def draw(runs: dict[str, RunRecord]) -> Figure:
    """Draws acceptance over the last exit's perplexity, a panel for each exit."""
    exits = list(accepted(next(iter(runs.values()))))
    figure = Figure(figsize=(2.2 * WIDTH, 3.4), layout="constrained")
    panels = figure.subplots(1, len(exits), sharex=True, sharey=True, squeeze=False)[0]
    for layers, axes in zip(exits, panels, strict=True):
        for (dial, run), marker, color in zip(runs.items(), MARKERS, COLORS, strict=False):
            last = run.final_perplexities()[run.num_layers]
            share = 100 * accepted(run)[layers]
            axes.plot([last], [share], marker=marker, color=color, linestyle="", label=dial)
        axes.set_title(f"drafts of {layers} of {run.num_layers} layers")
        axes.set_xlabel("perplexity of the last exit")
    panels[0].set_ylabel("single drafts accepted, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    return figure


if __name__ == "__main__":
    harness.run(main)
