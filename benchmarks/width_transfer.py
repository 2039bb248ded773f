r"""Where the best learning rate lies at three widths, with `optimizer.width_transfer` and without.

    python benchmarks/width_transfer.py --workdir=runs/widths
    python benchmarks/width_transfer.py --workdir=runs/widths --optimizer=muon

One model of four layers is trained with LayerSkip at every width and rate, rates a factor of 2
apart, once with rates as they are and once with those of the narrowest model carried over. Heads
are 32 wide at every width. Prints the validation loss of the last exit and of the middle one, and
the best rate of each; writes OPTIMIZER.json as the runs end, and OPTIMIZER.svg. A run that is done
is not run again, and one that was stopped goes on. `--quick` trains two widths for 20 steps on a
megabyte of text, too little to tell rates apart; give it a folder of its own. The bar is that of
`layerskip train`.
"""

import sys
from pathlib import Path

import harness
from rich.table import Table

from layerskip_jax.commands import train
from layerskip_jax.report.drawing import WIDTH, Figure, styled
from layerskip_jax.report.run_record import RunRecord, read_run
from layerskip_jax.training.optimizer import OPTIMIZERS

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.py"
HEAD = 32
WIDTHS, QUICK_WIDTHS = (64, 128, 256), (64, 128)  # the first is what rates are carried over from
RATES = tuple(2e-3 * 2**power for power in range(5))
QUICK_RATES = RATES[1:3]
STEPS, QUICK_STEPS = 100, 20
# The quickstart's recipe otherwise.
SETTINGS = {
    "model.num_layers": 4,
    "early_exit.layers": (1,),
    "layer_dropout.p_max": 0.2,
    "optimizer.warmup_steps": 20,
    "training.batch_size": 8,
    "training.evaluate_every": 0,
    "training.evaluate_batches": 24,
    "training.log_every": 10,
    "checkpoint.keep": 1,
}
VOCABULARY, WINDOW, HELD_OUT = 2048, 128, 0.02
WAYS = {"as they are": False, "carried over": True}
COLORS, MARKERS = ("#56b4e9", "#0072b2", "#1b1b1f"), "o^s"

Losses = dict[float, dict[str, float]]  # by rate, then `last` and `middle`


def main(argv: list[str] | None = None) -> int:
    """Runs what is not done yet, prints the table and writes the figures."""
    parser = harness.parser(__doc__.split("\n")[0])
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    options, overrides = harness.parse_training(
        parser, argv, lambda options: f"{options.optimizer}.json"
    )
    widths, rates = (QUICK_WIDTHS, QUICK_RATES) if options.quick else (WIDTHS, RATES)
    steps = QUICK_STEPS if options.quick else STEPS
    plan = [(way, d, r) for way in WAYS for d in widths for r in rates]
    losses: dict[tuple[str, int], Losses] = {}
    with harness.Bench(options, bar=False) as bench:
        bench.expect(1 + len(plan))
        bench.begin("preparing the data")
        data, code = harness.prepare_data(options, VOCABULARY, WINDOW, HELD_OUT)
        if code:
            return code
        for way, width, rate in plan:
            bench.begin(f"{way}, D {width}, rate {rate:g}")
            carried = WAYS[way] and width != widths[0]  # of which both ways are the same
            workdir = options.workdir / options.optimizer
            workdir = workdir / f"{'carried-' * carried}{width}-{rate:g}"
            code = harness.run_verb(
                train,
                f"--config={CONFIG}",
                f"--workdir={workdir}",
                f"--config.data.path={data}",
                *settings(SETTINGS | shape(width) | {"training.steps": steps}),
                f"--config.optimizer.name={options.optimizer}",
                f"--config.optimizer.learning_rate={rate:g}",
                f"--config.optimizer.width_transfer={widths[0] if carried else 0}",
                *overrides,
            )
            if code:
                print(f"stopped in {workdir}; the same command goes on", file=sys.stderr)
                return code
            found = of_run(read_run(workdir))
            losses.setdefault((way, width), {})[rate] = found
            bench.add({f"{way}/{width}/{rate:g}/{name}_loss": v for name, v in found.items()})
        bench.add(
            {
                f"{way}/{width}/best_rate_of_{name}": best(by_rate, name)
                for (way, width), by_rate in losses.items()
                for name in ("last", "middle")
            },
            show=False,
        )
        print_table(bench, losses)
        path = options.workdir / f"{options.optimizer}.svg"
        draw(losses).savefig(path)
        print(path)
    return 0


def settings(values: dict) -> list[str]:
    """Returns values of a config as they are given on the command line."""
    return [f"--config.{name}={value}" for name, value in values.items()]


def shape(width: int) -> dict[str, int]:
    """Returns a model of a width: heads and MLP grow with it."""
    return {
        "model.model_dim": width,
        "model.ffn_dim": width * 11 // 4,
        "model.num_heads": width // HEAD,
        "model.num_kv_heads": width // HEAD // 2,
        "model.head_dim": HEAD,
    }


def of_run(run: RunRecord) -> dict[str, float]:
    """Returns the validation loss of the last exit and of the middle one."""
    by_exit = {e["layers"]: e["loss"] for e in run.evaluations[-1]["exits"]}
    return {"last": by_exit[run.num_layers], "middle": by_exit[run.middle]}


def best(by_rate: Losses, exit_name: str) -> float:
    """Returns the rate with the lowest loss at an exit."""
    return min(by_rate, key=lambda rate: by_rate[rate][exit_name])


def print_table(bench: harness.Bench, losses: dict[tuple[str, int], Losses]) -> None:
    """Prints the last exit's loss by width and rate, and the best rates."""
    bench.print(
        "\nvalidation loss of the last exit, and the best rates of it and of the middle one"
    )
    table = Table()
    table.add_column("rates")
    table.add_column("D", justify="right")
    rates = list(next(iter(losses.values())))
    for title in (*(f"{rate:g}" for rate in rates), "best", "middle exit's"):
        table.add_column(title, justify="right")
    for (way, width), by_rate in losses.items():
        row = [f"{by_rate[rate]['last']:.3f}" for rate in rates]
        row += [f"{best(by_rate, name):g}" for name in ("last", "middle")]
        table.add_row(way, str(width), *row)
    bench.print(table)


@styled
def draw(losses: dict[tuple[str, int], Losses]) -> Figure:
    """Draws loss over rate, a curve for each width, the middle exit's dashed, the best ringed."""
    figure = Figure(figsize=(2 * WIDTH, 3.8), layout="constrained")
    panels = dict(zip(WAYS, figure.subplots(1, 2, sharex=True, sharey=True), strict=True))
    widths = sorted({width for _, width in losses})
    for (way, width), by_rate in losses.items():
        axes, index, rates = panels[way], widths.index(width), list(by_rate)
        for name, line in (("last", "-"), ("middle", "--")):
            values = [by_rate[rate][name] for rate in rates]
            label = f"D {width}" if name == "last" else None
            axes.plot(rates, values, line, color=COLORS[index], marker=MARKERS[index], label=label)
            found = best(by_rate, name)
            axes.plot(
                [found], [by_rate[found][name]], "o", markersize=11, fillstyle="none",
                color=COLORS[index],
            )  # fmt: skip
    for way, axes in panels.items():
        axes.set_title(f"rates {way}")
        axes.set_xscale("log", base=2)
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.set_xlabel("learning rate")
    first = panels[next(iter(WAYS))]
    first.set_ylabel("validation loss, nats; dashed: middle exit")
    lowest = min(
        v for by_rate in losses.values() for both in by_rate.values() for v in both.values()
    )
    worst = max(by_rate[best(by_rate, "middle")]["middle"] for by_rate in losses.values())
    first.set_ylim(lowest - 0.05, worst + 0.8)  # rates that are far too high leave the picture
    first.legend()
    return figure


if __name__ == "__main__":
    harness.run(main)
