"""layerskip plan: memory, traffic and time of a training step on devices that are not here.

usage: layerskip plan --config=RECIPE[:VARIANT] [--topology=v5p:4x4x8] [--slices=2]
                      [--config.a.b=value ...] [--search[=TRIES]]
       layerskip plan --all [--only=v5e] [--json=FILE]

For a TPU topology the train step itself is compiled, by the TPU's compiler, without a TPU. GPUs
(h100:64, h200:8, a100:16) are calculated by arithmetic, and labelled so. Without --topology it is
the recipe's own, config.mesh.topology. --search tries other meshes, remat and accumulation for the
same batch. --all takes every target of every recipe, with LayerSkip and plain.
The exit code is 0 where the step fits, 1 where it does not.
"""

import argparse
import dataclasses
import logging
from pathlib import Path

import jax
from rich.console import Console

from layerskip_jax.commands.arguments import figures_file, split_config_arguments, write_figures
from layerskip_jax.commands.tables import make_console, make_table
from layerskip_jax.config import RunConfig, load_config, recipe_folder, recipe_targets
from layerskip_jax.distributed.mesh import AXES
from layerskip_jax.hardware.chips import GIB
from layerskip_jax.hardware.compiler_options import compiler_table
from layerskip_jax.hardware.topology import Topology, parse_topology
from layerskip_jax.planning.compile import plan_step_apart
from layerskip_jax.planning.search import nearest_that_fits, search
from layerskip_jax.planning.step_plan import Plan, fits_text
from layerskip_jax.schema import ConfigError

logger = logging.getLogger(__name__)
TRIES = 6  # layouts that a search compiles


def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    parser, config_arguments, arguments = split_config_arguments("plan", __doc__, argv)
    parser.add_argument("--topology", default="", help="the devices, such as v5p:4x4x8 or h100:64")
    parser.add_argument("--slices", type=int, help="TPU slices of that shape")
    parser.add_argument("--sequence-length", type=int, default=0, help="tokens of a window")
    parser.add_argument(
        "--search", type=int, nargs="?", const=TRIES, default=0, metavar="TRIES",
        help="also try other layouts, so many of them",
    )  # fmt: skip
    parser.add_argument("--all", action="store_true", help="every target of every recipe")
    parser.add_argument("--only", default="", help="with --all: targets whose name has this in it")
    parser.add_argument("--configs", type=Path, default=recipe_folder(), help="with --all: where")
    parser.add_argument("--json", type=figures_file, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    # Nothing runs here, and on a TPU machine the TPU is left to whoever uses it.
    jax.config.update("jax_platforms", "cpu")
    if options.all:
        return _plan_all(options)
    config, topology = _read(config_arguments, options)
    length = options.sequence_length or config.model.max_sequence_length
    plan = plan_step_apart(config, topology, length)
    _print(plan)
    result = _figures(plan)
    if options.search:
        found = search(config, topology, length, options.search, logger.info)
        _print_layouts([(c.changes, p) for c, p in found])
        result["search"] = [{"changes": list(c.changes), **_figures(p)} for c, p in found]
    elif not plan.fits:
        nearest = nearest_that_fits(config, topology, length, say=logger.info)
        if nearest is None:
            print("No other mesh, remat or accumulation that was tried fits; take more devices.")
        else:
            changes, other = nearest[0].changes, nearest[1]
            print(f"Nearest that {fits_text(other)}, with\n    {' '.join(changes)}")
            result["nearest"] = {"changes": list(changes), **_figures(other)}
    if options.json:
        write_figures(options.json, result)
    return 0 if plan.fits else 1


def _read(config_arguments: list[str], options: argparse.Namespace) -> tuple[RunConfig, Topology]:
    if options.slices is not None:
        config_arguments = [*config_arguments, f"--config.mesh.shape.slice={options.slices}"]
    config = load_config(config_arguments)
    name = options.topology or config.mesh.topology
    if not name:
        raise ConfigError(
            "no devices are named: add --topology=v5p:4x4x8, or a recipe's target, as in "
            "--config=llama2_7b_scratch:v5p"
        )
    if config.model.vocab_size == 0:
        raise ConfigError(
            "config.model.vocab_size=0 is read from the data, of which a plan knows nothing; "
            "set --config.model.vocab_size"
        )
    slices = max(config.mesh.shape.slice, 1)
    return config, parse_topology(name, slices)


def _plan_all(options: argparse.Namespace) -> int:
    """Plans every target of every recipe, LayerSkip and plain, and prints one table."""
    recipes = []
    for file in sorted(options.configs.glob("*.py")):
        recipes += [(file, name) for name in recipe_targets(file) if options.only in name]
    if not recipes:
        raise ConfigError(
            f"--configs={options.configs} has no recipe with a target named "
            f"{options.only or 'anything'}"
        )
    rows, results = [], []
    for file, target in recipes:
        plans = []
        for variant in (target, f"plain-{target}"):
            config = load_config([f"--config={file}:{variant}"])
            topology = parse_topology(config.mesh.topology, config.mesh.shape.slice)
            plan = plan_step_apart(config, topology)
            plans.append(plan)
            results.append({"recipe": file.stem, "variant": variant, **_figures(plan)})
            logger.info("%s:%s on %s: %s", file.stem, variant, topology, fits_text(plan))
            if options.json:
                write_figures(options.json, results)
        rows.append((file.stem, *plans))
    _print_all(rows)
    return 0 if all(plan.fits for _, *plans in rows for plan in plans) else 1


def _figures(plan: Plan) -> dict:
    """Returns the plan's figures, flat and named."""
    memory = {
        f"{field.name}_bytes": getattr(plan.memory, field.name)
        for field in dataclasses.fields(plan.memory)
        if field.name != "message"
    }
    return {
        "topology": str(plan.topology),
        "devices": plan.topology.num_devices,
        "by": "compiler" if plan.compiled else "arithmetic",
        "fits": plan.fits,
        "message": plan.memory.message,
        **memory,
        "flops_needed": plan.flops_needed,
        "flops_computed": plan.flops_computed,
        "compute_seconds": plan.compute_seconds,
        "traffic_seconds": plan.traffic_seconds,
        "update_seconds": plan.update_seconds,
        "step_seconds_at_least": plan.step_seconds,
        "mfu_at_most": plan.mfu,
        "compile_seconds": plan.compile_seconds,
        "traffic": [dataclasses.asdict(line) for line in plan.traffic],
    }


def _print(plan: Plan) -> None:
    """Prints what a person wants to know of one plan."""
    console, config, topology = make_console(), plan.config, plan.topology
    sizes = zip(AXES, config.mesh.shape.resolve(topology.num_devices), strict=True)
    mesh = " x ".join(f"{axis} {size}" for axis, size in sizes if size > 1) or "one device"
    how = "compiled" if plan.compiled else "by arithmetic only"
    console.print(
        f"{topology.num_devices} devices, {topology}, {how}; mesh {mesh}; "
        f"{config.training.batch_size} windows in {config.training.gradient_accumulation} "
        "microbatch(es); "
        f"remat {config.model.remat}; attention {config.model.attention}"
    )
    memory = plan.memory
    rows = [("parameters, float32", memory.parameters), ("optimizer", memory.optimizer)]
    if memory.total is not None:
        rows += [
            ("activations that the layers save", memory.activations),
            ("other temporaries", memory.temporaries),
        ]
    total = "in all" + (", the program included" if plan.compiled else "")
    rows += [(total, memory.total), ("there is", memory.limit)]
    if memory.host:
        rows += [("beside it, in the host's memory", memory.host)]
    table = make_table(
        "Memory",
        ("", "GiB a device"),
        [(name, "more" if value is None else f"{value / GIB:.2f}") for name, value in rows],
    )
    console.print(table)
    if plan.traffic:
        _print_traffic(console, plan)
    if memory.total is not None:
        _print_time(console, plan)
    for option in compiler_table(topology.chip, topology.slices) if plan.compiled else ():
        logger.info("compiler: %s=%s: %s", option.name, option.value, option.reason)
    console.print(fits_text(plan), style="bold", soft_wrap=True)


def _print_traffic(console: Console, plan: Plan) -> None:
    table = make_table(
        "Collectives of a step, on one device",
        ("", "written as", "devices", "over", "times", "GB", "ms at full bandwidth"),
        [
            (
                line.kind, "" if line.written == line.kind else line.written, str(line.devices),
                line.over, f"{line.turns:,.0f}", f"{line.size / 1e9:,.2f}",
                f"{line.seconds * 1e3:,.1f}",
            )
            for line in plan.traffic if line.size >= 1e6
        ],
        left=("", "written as"),
    )  # fmt: skip
    console.print(table)
    rest = sum(line.size for line in plan.traffic if line.size < 1e6)
    if rest:
        console.print(f"and sums of {rest / 1e3:,.0f} kB in all")


def _print_time(console: Console, plan: Plan) -> None:
    chip, count = plan.topology.chip, plan.topology.num_devices
    own = " + Newton-Schulz of Muon" if plan.config.optimizer.name == "muon" else ""
    console.print(
        f"compute  {plan.compute_seconds * 1e3:,.1f} ms = {plan.flops_computed:.4g} FLOPs / "
        f"({count} x {chip.flops:.4g} FLOP/s)\n"
        f"traffic  {plan.traffic_seconds * 1e3:,.1f} ms, links {chip.links / 1e9:.0f} GB/s, "
        f"network {chip.network / 1e9:.4g} GB/s a device\n"
        f"update   {plan.update_seconds * 1e3:,.1f} ms = (3 x "
        f"{plan.memory.parameters:.4g} + 2 x {plan.memory.optimizer:.4g} bytes) / "
        f"{chip.memory_bandwidth:.4g} byte/s{own}\n"
        f"step     at least {plan.step_seconds * 1e3:,.1f} ms = max(compute, traffic) + update; "
        f"MFU at most {plan.mfu:.1%} = {plan.flops_needed:.4g} FLOPs needed / (step x peak)",
        soft_wrap=True,
    )  # fmt: skip


def _print_layouts(found: list) -> None:
    table = make_table(
        "Layouts that fit, fastest first",
        ("GiB a device", "step at least", "MFU at most", "changes"),
        [
            (
                f"{plan.memory.total / GIB:.2f}", f"{plan.step_seconds * 1e3:,.0f} ms",
                f"{plan.mfu:.1%}", "\n".join(changes) or "none",
            )
            for changes, plan in found
        ],
        left=("changes",),
    )  # fmt: skip
    make_console().print(table)


def _print_all(rows: list) -> None:
    def gib(value: float | None) -> str:
        return "no" if value is None else f"{value / GIB:.2f}"

    cells = []
    for name, ours, plain in rows:
        a, b = ours.memory.total, plain.memory.total
        topology = f"{ours.topology}" + ("" if ours.compiled else " (arithmetic)")
        ratio = "" if a is None or b is None else f"{a / b:.3f}"
        speed = f"{ours.step_seconds:.2f} s, {ours.mfu:.0%}"
        cells.append((name, topology, gib(a), gib(b), ratio, gib(ours.memory.limit), speed))
    table = make_table(
        "GiB of memory a device",
        ("recipe", "devices", "LayerSkip", "plain", "ratio", "of", "step, MFU at best"),
        cells,
        left=("recipe", "devices"),
    )
    make_console().print(table)
