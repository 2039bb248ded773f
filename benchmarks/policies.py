r"""Every way to decode with fewer layers, on one model and one set of prompts.

    layerskip calibrate --workdir=RUN --exit-when=entropy --exits=2,4,6 --risk=0.05 --data=DATA \
        --json=entropy.json
    layerskip sweep --workdir=RUN
    python benchmarks/policies.py --workdir=RUN --exits=2,4,6 --svg=policies.svg \
        --calibrated=entropy.json

Plain decoding, each exit alone, each policy at the threshold that `layerskip calibrate` found
(those of the files named, of several risks if you like; else those in the run's folder, and a
policy without one is left out, and said so), self-speculation by the sweep's pair and with drafts
that stop when unsure, `auto`, and a second model's drafts. All take turns in one process, one
prompt at a time and several in a batch; medians of ratios are reported. Perplexity is the whole
model's, of what each way wrote.
"""

import json
import statistics
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from matplotlib.figure import Figure
from rich.table import Table

from layerskip_jax.commands.sweep import validation_prompts
from layerskip_jax.decoding.cache import empty_cache, read_head, run_layers
from layerskip_jax.decoding.exit_policy import POLICIES, ExitPolicy, candidate_exits
from layerskip_jax.decoding.weights import DecoderWeights
from layerskip_jax.generation.generator import default_pairs
from layerskip_jax.generation.options import DepthRun, Generation, stop_below_text
from layerskip_jax.language_model import PLAIN, LanguageModel, load
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.report.drawing import new_figure, styled, svg_text
from layerskip_jax.run_folder.atomic import write_text
from layerskip_jax.schema import ConfigError
from layerskip_jax.training.restore import load_run

BATCHES = (1, 8)
STOP_BELOW = (0.3, "lead:0.6")
DRAFT_MODEL_LENGTHS = (2, 5)
COLUMNS = ("tokens/s over plain", "layers a token", "tokens as plain", "perplexity")


def main(argv: list[str] | None = None) -> int:
    """Measures all ways, prints the table and writes the figures."""
    parser = harness.parser(__doc__.splitlines()[0], rounds=(9, 3))
    add = parser.add_argument
    add("--workdir", type=Path, required=True, help="a trained run, calibrated and swept")
    add("--data", help="prepared data to cut prompts from (default: the run's)")
    add("--draft-model", type=Path, help="a second, smaller model, to draft with as well")
    add(
        "--calibrated", type=Path, action="append", default=[], metavar="FILE",
        help="what `layerskip calibrate --json` wrote; repeat it for more",
    )  # fmt: skip
    add("--exits", type=_numbers, help="candidate exits (default: every L/8)")
    add("--prompts", type=int, default=32, help="prompts in all (default: 32)")
    add("--prompt-tokens", type=int, default=32)
    add("--new-tokens", type=int, default=64)
    add("--svg", type=Path, help="file to draw speed and agreement into")
    options = harness.parse(parser, argv)
    model = load(options.workdir, draft_model=options.draft_model)
    data = options.data or load_run(options.workdir).config.data.path
    count = 8 if options.quick else options.prompts
    prompts = validation_prompts(data, count, options.prompt_tokens)
    exits = candidate_exits(model.generator.config.num_layers, options.exits)
    with harness.Bench(options) as bench:
        calibrated = [json.loads(path.read_text()) for path in options.calibrated]
        ways, missing = ways_of(model, exits, calibrated)
        bench.expect(len(BATCHES) * (len(ways) + options.rounds))
        for name, why in missing.items():
            bench.print(f"{name} is left out: {why}")
        bench.add(memory(model, options.prompt_tokens + options.new_tokens))
        for batch in BATCHES:
            measure(bench, model, ways, prompts, batch, options)
        bench.print(table_of(bench.figures, list(ways)))
        if options.svg:
            figure = drawn(bench.figures, list(ways), batch=BATCHES[0])
            write_text(options.svg, svg_text(figure))
    return 0


def ways_of(
    model: LanguageModel, exits: tuple[int, ...], calibrated: list[dict]
) -> tuple[dict[str, dict], dict[str, str]]:
    """Returns the ways to decode, as `Generator.generate` takes them, and why others are not."""
    layers = model.generator.config.num_layers
    ways: dict[str, dict] = {"plain": {}}
    missing = {}
    for exit_layer in exits:
        ways[f"exit {exit_layer}"] = {"mode": "early_exit", "exit_layer": exit_layer}

    def exiting(name: str, threshold: float, kv: str, exits: tuple[int, ...]) -> dict:
        policy = ExitPolicy(name, threshold)
        model.check_policy(policy, kv=kv, exits=exits)
        return {"mode": "adaptive", "exit_when": policy, "kv": kv, "exits": exits}

    for found in calibrated:
        name, kv = found["policy"], found["kv"]
        ways[f"{name}, {kv}, risk {found['risk']:g}"] = exiting(
            name, found["threshold"], kv, tuple(found["exits"])
        )
    for name in () if calibrated else POLICIES:
        for kv in ("propagate", "deferred"):
            way = f"{name}, {kv}"
            try:
                ways[way] = exiting(name, model.calibrated(name, kv, exits), kv, exits)
            except ConfigError as error:
                missing[way] = str(error)
    # Where the sweep found plain decoding the fastest, the pairs that `auto` tries.
    pairs = default_pairs(layers) if model.best_pair in (None, PLAIN) else [model.best_pair]
    thresholds = sorted({*STOP_BELOW, model.best_stop_below} - {None}, key=str)
    for exit_layer, length in pairs:
        drafts = {
            "mode": "self_speculative", "exit_layer": exit_layer, "draft_length": length,
        }  # fmt: skip
        ways[f"drafts {exit_layer},{length}"] = drafts
        if length > 1:
            for stop in thresholds:
                ways[f"drafts {exit_layer},{length} stop below {stop_below_text(stop)}"] = {
                    **drafts, "stop_below": stop,
                }  # fmt: skip
    ways["auto"] = {"mode": "auto"}
    if model.generator.draft_config is not None:
        for length in DRAFT_MODEL_LENGTHS:
            ways[f"draft model, {length}"] = {"mode": "draft_model", "draft_length": length}
    return ways, missing


def memory(model: LanguageModel, positions: int) -> dict[str, int]:
    """Returns the bytes of the weights, and of the cache of one row of so many positions."""
    config = model.generator.config
    cache = jax.eval_shape(lambda: empty_cache(config, config.num_layers, 1, positions))

    def size(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    return {"weight_bytes": size(model.generator.weights), "cache_bytes_a_row": size(cache)}


def measure(
    bench: harness.Bench,
    model: LanguageModel,
    ways: dict[str, dict],
    prompts: list[list[int]],
    batch: int,
    options,
) -> None:
    """Runs all ways in turns on batches of so many prompts, and adds their figures."""
    generator, count = model.generator, options.new_tokens
    groups = [prompts[start : start + batch] for start in range(0, len(prompts), batch)]
    written: dict[str, list[Generation]] = {}
    for name, way in ways.items():
        bench.begin(f"batch {batch}: {name}")
        generator.generate(groups[0], count, **way)  # compiles
        written[name] = [generator.generate(group, count, **way) for group in groups]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.rounds):
        bench.begin(f"batch {batch}: round {turn + 1} of {options.rounds}")
        for name, way in ways.items():
            done = [generator.generate(group, count, **way) for group in groups]
            seconds[name].append(sum(each.seconds for each in done))
    plain = np.array([row for each in written["plain"] for row in each.tokens])
    rate = plain.size / statistics.median(seconds["plain"])
    bench.add({f"batch {batch}/plain/tokens_per_second": rate}, show=False)
    for name, generations in written.items():
        tokens = np.array([row for each in generations for row in each.tokens])
        figures = {
            "speed_over_plain": statistics.median(
                map(lambda a, b: a / b, seconds["plain"], seconds[name])
            ),
            "layers": mean_layers(generations, ways[name], generator.config.num_layers),
            "equal_tokens": float((tokens == plain).mean()),
            "perplexity": perplexity(generator.weights, generator.config, prompts, tokens),
        }
        bench.add({f"batch {batch}/{name}/{key}": x for key, x in figures.items()}, show=False)


def mean_layers(generations: list[Generation], way: dict, layers: int) -> float:
    """Returns the layers that a new token after the first cost, those of drafts included."""
    if way.get("mode") == "adaptive":
        runs: list[DepthRun] = [generation.depth for generation in generations]
        return sum(runs[1:], start=runs[0]).mean_layers
    if generations[0].drafting is None:
        return way.get("exit_layer", layers)
    total = tokens = 0
    for drafting in (generation.drafting for generation in generations):
        tokens += drafting.tokens
        if "exit_layer" not in way:  # the pairs of `auto` are not told apart
            return float("nan")
        # Of each cycle the newest token and the drafts run every layer once.
        total += layers * (drafting.cycles + drafting.drafted)
    return total / tokens


def perplexity(
    weights: DecoderWeights, config: ModelConfig, prompts: list[list[int]], tokens: np.ndarray
) -> float:
    """Returns the whole model's perplexity of the new tokens after their prompts."""
    joined = np.concatenate([prompts, tokens], axis=1)
    return float(np.exp(nats_of_rows(weights, config, joined, len(prompts[0])).mean()))


def nats_of_rows(
    weights: DecoderWeights, config: ModelConfig, tokens: np.ndarray, first: int
) -> np.ndarray:
    """Returns the mean loss, in nats, of each row's tokens from index `first`, at least 1, on."""

    @jax.jit
    def nats(ids: Int[Array, "B S"]) -> Float[Array, "B"]:
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        cache = empty_cache(config, config.num_layers, *ids.shape)
        x, _ = run_layers(weights, cache, weights.embedding[ids], positions, 0, config.num_layers)
        log_p = jax.nn.log_softmax(read_head(weights, x[:, first - 1 : -1]))
        return -jnp.take_along_axis(log_p, ids[:, first:, None], axis=-1)[..., 0].mean(axis=1)

    return np.asarray(nats(jnp.asarray(tokens)))


def table_of(figures: dict, ways: list[str]) -> Table:
    """Returns the table of all ways, for each batch size."""
    table = Table("", "batch", *COLUMNS)
    for batch in BATCHES:
        for name in ways:
            of_way = f"batch {batch}/{name}"
            table.add_row(
                name,
                str(batch),
                f"{figures[f'{of_way}/speed_over_plain']:.2f}",
                f"{figures[f'{of_way}/layers']:.2f}",
                f"{figures[f'{of_way}/equal_tokens']:.1%}",
                f"{figures[f'{of_way}/perplexity']:.2f}",
                end_section=name == ways[-1],
            )
    return table


@styled
def drawn(figures: dict, ways: list[str], batch: int) -> Figure:
    """Returns speed over plain decoding against the share of tokens that are plain decoding's."""
    figure, axes = new_figure()
    groups = {
        "one exit for all": lambda name: name.startswith("exit"),
        "exit when sure": lambda name: "," in name and name.split(",")[0] in POLICIES,
        "drafted and verified": lambda name: name.startswith("draft") or name == "auto",
    }
    for label, belongs in groups.items():
        points = [
            (
                figures[f"batch {batch}/{name}/equal_tokens"],
                figures[f"batch {batch}/{name}/speed_over_plain"],
            )
            for name in ways
            if belongs(name)
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o", label=label)
    axes.axhline(1, linewidth=1, color="0.6")
    axes.set_xlabel("share of tokens equal to plain decoding's")
    axes.set_ylabel("tokens/s over plain decoding")
    axes.legend()
    return figure


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


if __name__ == "__main__":
    harness.run(main)
