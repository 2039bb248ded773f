r"""How fast decoding is: against the memory, the formula, `transformers`, and itself.

    python benchmarks/decode.py --json=decode.json                   # --quick for a first look
    python benchmarks/decode.py --setting=trained --workdir=runs/quickstart/model
    python benchmarks/decode.py --setting=rows      # what a pass over a few tokens costs

One process, one set of weights for all that are compared, and the ways to decode take turns, so
that a machine whose speed drifts slows all of them; medians of ratios are reported. Times are of
decoding alone: reading the prompt and the first token are left out. The weights of `random` are
drawn at random; its layers after the exit are scaled down until the exit's drafts are accepted
as often as wished.

`transformers` is compared where torch is installed, as in the test environment.
"""

import dataclasses
import statistics
import time
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import numpy as np

from layerskip_jax.commands.sweep import validation_prompts
from layerskip_jax.decoding.cache import empty_cache, read_head, run_layers
from layerskip_jax.decoding.weights import decoder_weights, pays_for_panels
from layerskip_jax.generation.generator import Generator
from layerskip_jax.hardware.bandwidth import read_bandwidth
from layerskip_jax.interop.huggingface import to_hugging_face, to_hugging_face_config
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.model.definition import ModelDefinition
from layerskip_jax.model.transformer import Transformer
from layerskip_jax.training.restore import load_run

PROMPT_TOKENS = 32
# Decoded one by one where batch 1 is measured.
BATCH_1_PROMPTS = 4
# Tokens of a pass, and passes that are timed together.
ROWS = (1, 2, 3, 4, 5, 7)
PASSES = 100


def speedup_formula(acceptance: float, exit_share: float, head_share: float, length: int) -> float:
    """Returns the speed-up where reading weights is all the cost (docs/method.md, section 4).

    Args:
      acceptance: a, of each draft.
      exit_share: e = E / L.
      head_share: h, the head's share of the weights that a token reads.
      length: G.
    """
    n, a = length + 1, acceptance
    tokens = n if a == 1 else (1 - a**n) / (1 - a)
    draft_cost = exit_share * (1 - head_share) + head_share
    return tokens / (n * draft_cost + (1 - exit_share) * (1 - head_share))


def read_bytes(config: ModelConfig) -> tuple[int, int]:
    """Returns the bytes of weights that a token reads, and of them the head's."""
    layer = config.model_dim * (
        (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim + 3 * config.ffn_dim
    )
    size = jnp.dtype(config.compute_dtype).itemsize
    head = config.model_dim * config.vocab_size * size
    return config.num_layers * layer * size + head, head


def scaled(parameters: dict, exit_layer: int, scale: float) -> dict:
    """Returns the parameters with what layers from `exit_layer` on add multiplied by `scale`."""
    layers = parameters["layers"]

    def late(matrix):
        return matrix.at[exit_layer:].multiply(scale)

    return {
        **parameters,
        "layers": {
            **layers,
            "attention": {**layers["attention"], "o": late(layers["attention"]["o"])},
            "mlp": {**layers["mlp"], "down": late(layers["mlp"]["down"])},
        },
    }


def with_acceptance(
    config: ModelConfig,
    exit_layer: int,
    acceptance: float,
    prompts: list[list[int]],
    new_tokens: int,
    tries: int = 12,
) -> tuple[dict, float]:
    """Returns random parameters whose exit's drafts are accepted about as often as wished.

    The share found is returned too: that of these prompts, going on for so many tokens, after
    `tries` halvings of the range at most.
    """
    definition = ModelDefinition(config)
    parameters = definition.init(jax.random.key(0))
    generator = Generator(definition.model(parameters))
    low, high, tried = 0.0, 1.0, []
    for _ in range(tries):
        scale = (low + high) / 2
        # Other weights in the same generator need no other programs.
        model = definition.model(scaled(parameters, exit_layer, scale))
        generator.weights = Generator(model).weights
        found = generator.generate(
            prompts, new_tokens, mode="self_speculative", exit_layer=exit_layer, draft_length=1
        ).drafting.acceptance
        tried.append((abs(found - acceptance), found, scale))
        if tried[-1][0] < 0.005:
            break
        low, high = (scale, high) if found > acceptance else (low, scale)
    _, found, scale = min(tried)
    return scaled(parameters, exit_layer, scale), found


def margins(model: Transformer, prompts: list[list[int]], tokens: list[list[int]]) -> np.ndarray:
    """Returns by how much the likeliest token leads the second, `[rows, new tokens]`, in nats.

    Args:
      model: any.
      prompts: of one length.
      tokens: what follows them, of one length; each is judged after those before it.
    """
    weights, config = decoder_weights(model), model.config

    @jax.jit
    def lead(ids):
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        cache = empty_cache(config, config.num_layers, *ids.shape)
        x, _ = run_layers(weights, cache, weights.embedding[ids], positions, 0, config.num_layers)
        first, second = jnp.moveaxis(jax.lax.top_k(read_head(weights, x), 2)[0], -1, 0)
        return first - second

    joined = np.concatenate([prompts, tokens], axis=1)
    return np.asarray(lead(joined[:, :-1]))[:, len(prompts[0]) - 1 :]


def exactness(config: ModelConfig, new_tokens: int) -> dict[str, float]:
    """Compares drafted with plain greedy tokens, in the dtype of `config`.

    Verifying several tokens at once rounds otherwise than one at a time, so that near ties may
    fall differently; the lead of the likeliest token where two sequences part says how near.
    """
    model = Transformer(config, jax.random.key(0))
    generator, random = Generator(model), np.random.default_rng(1)
    prompts = random.integers(0, config.vocab_size, (64, PROMPT_TOKENS)).tolist()
    plain = generator.generate(prompts, new_tokens).tokens
    drafted = generator.generate(
        prompts, new_tokens, mode="self_speculative",
        exit_layer=config.num_layers // 4, draft_length=4,
    ).tokens  # fmt: skip
    differ = np.array(plain) != np.array(drafted)
    parted = differ.any(axis=1)
    lead = margins(model, prompts, plain)
    at_mismatch = lead[parted, differ[parted].argmax(axis=1)]
    return {
        f"{config.dtype}/equal_sequences": float(1 - parted.mean()),
        f"{config.dtype}/largest_margin_at_mismatch": float(max(at_mismatch, default=0.0)),
        f"{config.dtype}/median_margin": float(np.median(lead)),
    }


def ours(generator: Generator, batches: list[list[list[int]]], new_tokens: int, **mode):
    """Returns a function that decodes each batch, and gives the seconds of a token."""
    generator.generate(batches[0], new_tokens, **mode)  # compiles

    def run():
        done = [generator.generate(batch, new_tokens, **mode) for batch in batches]
        seconds = sum(each.seconds - each.seconds_to_first_token for each in done)
        return seconds / (new_tokens - 1) / sum(map(len, batches))

    return run


def take_turns(ways: dict, rounds: int, bench: harness.Bench, name: str) -> dict:
    """Runs every way once a round; returns the list of what each returned."""
    results = {way: [] for way in ways}
    for round_ in range(rounds):
        bench.begin(f"{name}: round {round_ + 1} of {rounds}")
        for way, run in ways.items():
            results[way].append(run())
    return results


def ratio(results: dict, name: str, base: str) -> float:
    """Returns how many times as fast `name` is as `base`: the median over the rounds."""
    return float(np.median(np.divide(results[base], results[name])))


def in_transformers(parameters: dict, config: ModelConfig):
    """Returns the same model in `transformers`, or None where torch is not installed."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    settings = to_hugging_face_config(config, eos_token_id=0, dtype=config.dtype)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    tensors = {
        name: torch.from_numpy(np.array(value, np.float32))
        for name, value in to_hugging_face(parameters, config)
    }
    model.load_state_dict(tensors, strict=not config.tie_embeddings)
    device = "cuda" if jax.devices()[0].platform != "cpu" else "cpu"
    return model.to(device, getattr(torch, config.dtype)).eval()


def theirs(model, batches: list[list[list[int]]], new_tokens: int, **options):
    """Returns a function that decodes in `transformers` and gives the seconds of a token."""
    import torch

    settings = dict(do_sample=False, eos_token_id=None, pad_token_id=0, **options)

    def timed(batch, count):
        ids = torch.tensor(batch, device=model.device)
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(ids, max_new_tokens=count, min_new_tokens=count, **settings)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    timed(batches[0], 2)

    def to_first_token(batch):
        # The quickest: subtracting one that another process held up takes too much away.
        return min(timed(batch, 1) for _ in range(3))

    def run():
        seconds = sum(timed(batch, new_tokens) - to_first_token(batch) for batch in batches)
        return seconds / (new_tokens - 1) / sum(map(len, batches))

    return run


def random_model(gpu: bool, quick: bool = False) -> ModelConfig:
    """Returns a model too large for a CPU's caches, about 1B for a GPU, or for a quick look 20M."""
    dim, ffn, heads = (2048, 5504, 16) if gpu else (512, 1408, 8) if quick else (896, 2432, 14)
    layers = 8 if quick and not gpu else 16
    return ModelConfig(
        num_layers=layers, model_dim=dim, ffn_dim=ffn, num_heads=heads, num_kv_heads=heads,
        vocab_size=4096, max_sequence_length=2048, dtype="bfloat16" if gpu else "float32",
    )  # fmt: skip


def small_model(config: ModelConfig, dtype: str) -> ModelConfig:
    """Returns half the width, in another dtype, to compare tokens with."""
    return dataclasses.replace(
        config, model_dim=config.model_dim // 2, ffn_dim=config.ffn_dim // 2,
        num_heads=config.num_heads // 2, num_kv_heads=config.num_kv_heads // 2, dtype=dtype,
    )  # fmt: skip


def random_exit(bench, config: ModelConfig, bandwidth: float, exit_layer: int, options) -> None:
    """Measures drafting by the first `exit_layer` layers of random weights."""
    share, name = exit_layer / config.num_layers, f"e=1/{config.num_layers // exit_layer}"
    total, head = read_bytes(config)
    random = np.random.default_rng(0)
    prompts = random.integers(0, config.vocab_size, (16, PROMPT_TOKENS)).tolist()
    new_tokens, figures = options.new_tokens, bench.figures
    singles = [[prompt] for prompt in prompts[:BATCH_1_PROMPTS]]
    bench.begin(f"{name}: weights whose drafts are accepted 80% of the time")
    parameters, acceptance = with_acceptance(
        config, exit_layer, 0.8, prompts[:BATCH_1_PROMPTS], new_tokens, 6 if bench.quick else 12
    )
    bench.add({f"{name}/acceptance": acceptance})
    generator = Generator(ModelDefinition(config).model(parameters))
    lengths = (2, 4, 6)
    for length in lengths:
        formula = speedup_formula(acceptance, share, head / total, length)
        bench.add({f"{name}/G={length}_formula": formula})
    bench.begin(f"{name}: compiling")
    ways = {"plain": ours(generator, singles, new_tokens)}
    for length in lengths:
        ways[f"G={length}"] = ours(
            generator, singles, new_tokens,
            mode="self_speculative", exit_layer=exit_layer, draft_length=length,
        )  # fmt: skip
    ways["auto"] = ours(generator, singles, new_tokens, mode="auto")
    model = in_transformers(parameters, config) if share == 0.25 else None
    if model is not None:
        ways["transformers"] = theirs(model, singles, new_tokens)
        ways["assistant_early_exit"] = theirs(
            model, singles, new_tokens, assistant_early_exit=exit_layer
        )
    results = take_turns(ways, options.rounds, bench, name)
    for way in list(ways)[1:]:
        bench.add({f"{name}/{way}_over_plain": ratio(results, way, "plain")})
    best = max(lengths, key=lambda length: figures[f"{name}/G={length}_over_plain"])
    speedup = figures[f"{name}/G={best}_over_plain"]
    if share != 0.25:
        bench.add({f"selfspec_over_plain_{name}": speedup})
        return
    per_token = statistics.median(results["plain"])
    bench.add(
        {
            "selfspec_over_plain": speedup,
            "selfspec_over_formula": speedup / figures[f"{name}/G={best}_formula"],
            "auto_over_best_pair": ratio(results, "auto", f"G={best}"),
            "plain_over_bandwidth": total / per_token / bandwidth,
        }
    )
    if model is not None:
        bench.add(
            {
                "plain_over_transformers": ratio(results, "plain", "transformers"),
                "selfspec_over_assistant_early_exit": ratio(
                    results, f"G={best}", "assistant_early_exit"
                ),
            }
        )
    for batch in (4, 16):
        bench.begin(f"batch {batch}: compiling")
        turns = {"plain": ours(generator, [prompts[:batch]], new_tokens)}
        turns["drafted"] = ours(
            generator, [prompts[:batch]], new_tokens,
            mode="self_speculative", exit_layer=exit_layer, draft_length=best,
        )  # fmt: skip
        if model is not None:
            turns["transformers"] = theirs(model, [prompts[:batch]], new_tokens)
        found = take_turns(turns, batched_rounds(options), bench, f"batch {batch}")
        rate = 1 / statistics.median(found["plain"])
        bench.add({f"batch {batch}/plain_tokens_per_second": rate})
        for way in list(turns)[1:]:
            bench.add({f"batch {batch}/{way}_over_plain": ratio(found, way, "plain")})


def batched_rounds(options) -> int:
    """Returns the turns of each way at batch 4 and 16: half of those at batch 1."""
    return max(options.rounds // 2, 1)


def random_setting(bench: harness.Bench, gpu: bool, options) -> None:
    """Measures on random weights of a chosen acceptance."""
    config = random_model(gpu, options.quick)
    exits = (config.num_layers // 4, config.num_layers // 8)
    dtypes = ("float32", "bfloat16")
    bench.expect(len(exits) * (2 + options.rounds) + 2 * (1 + batched_rounds(options)))
    bench.expect(1 + options.rounds + len(dtypes) + 1)
    bench.begin("the memory's bandwidth")
    total, _ = read_bytes(config)
    bandwidth = read_bandwidth(total)
    bench.add({"weights_bytes": total, "read_bytes_per_second": bandwidth})
    for exit_layer in exits:
        random_exit(bench, config, bandwidth, exit_layer, options)
    bench.begin("untrained: compiling")
    untrained = Generator(Transformer(config, jax.random.key(0)))
    prompts = np.random.default_rng(0).integers(
        0, config.vocab_size, (BATCH_1_PROMPTS, PROMPT_TOKENS)
    )
    singles = [[prompt] for prompt in prompts.tolist()]
    ways = {
        "plain": ours(untrained, singles, options.new_tokens),
        "auto": ours(untrained, singles, options.new_tokens, mode="auto"),
    }
    results = take_turns(ways, options.rounds, bench, "untrained")
    bench.add({"auto_over_plain_untrained": ratio(results, "auto", "plain")})
    shallow = dataclasses.replace(config, num_layers=4) if options.quick else config
    for dtype in dtypes:
        bench.begin(f"drafted against plain tokens in {dtype}")
        bench.add(exactness(small_model(shallow, dtype), options.new_tokens))


def trained_setting(bench: harness.Bench, options) -> None:
    """Measures on a trained run: every pair against plain decoding, `auto`, and `transformers`."""
    run = load_run(options.workdir)
    generator, layers = Generator(run.model), run.config.model.num_layers
    prompts = validation_prompts(run.config.data.path, BATCH_1_PROMPTS, PROMPT_TOKENS)
    singles = [[prompt] for prompt in prompts]
    exits = sorted({max(1, layers // n) for n in (8, 4, 2)} - {layers})
    pairs = [(exit_layer, length) for exit_layer in exits for length in (1, 2, 4, 6)]
    bench.expect(len(pairs) + options.rounds + 2)
    bench.begin("plain: compiling")
    ways = {"plain": ours(generator, singles, options.new_tokens)}
    for exit_layer, length in pairs:
        bench.begin(f"E={exit_layer}, G={length}: compiling")
        ways[f"E={exit_layer}, G={length}"] = ours(
            generator, singles, options.new_tokens,
            mode="self_speculative", exit_layer=exit_layer, draft_length=length,
        )  # fmt: skip
    ours_drafted = list(ways)[1:]
    bench.begin("auto and transformers")
    ways["auto"] = ours(generator, singles, options.new_tokens, mode="auto", pairs=pairs)
    model = in_transformers(run.parameters, run.config.model)
    if model is not None:
        ways["transformers"] = theirs(model, singles, options.new_tokens)
        for exit_layer in exits:
            ways[f"assistant_early_exit={exit_layer}"] = theirs(
                model, singles, options.new_tokens, assistant_early_exit=exit_layer
            )
    results = take_turns(ways, options.rounds, bench, "trained")
    figures = {way: ratio(results, way, "plain") for way in list(ways)[1:]}
    bench.add({f"trained/{way}_over_plain": value for way, value in figures.items()})
    best = max(ours_drafted, key=figures.get)
    bench.add({"trained/auto_over_best_pair": ratio(results, "auto", best)})
    if model is not None:
        assistants = [way for way in ways if way.startswith("assistant")]
        bench.add(
            {
                "trained/plain_over_transformers": ratio(results, "plain", "transformers"),
                "trained/selfspec_over_assistant_early_exit": ratio(
                    results, best, max(assistants, key=figures.get)
                ),
            }
        )


def rows_setting(bench: harness.Bench, gpu: bool, options) -> None:
    """What a pass of a few tokens through a layer costs over one of a single token.

    Verifying G drafts is a pass of G + 1. With a layer of the quickstart's and, in full, one that
    is as wide as the random model's; and, where small matrices lie in panels, over a pass with
    whole ones.
    """
    small = dataclasses.replace(
        random_model(False), model_dim=128, ffn_dim=352, num_heads=4, num_kv_heads=2, head_dim=0
    )
    widths = {"small": small}
    if not bench.quick:
        widths["large"] = random_model(gpu)
    ways = (False, True) if pays_for_panels(jax.devices()[0].platform) else (False,)
    bench.expect(len(widths) * (1 + options.rounds))
    for name, config in widths.items():
        bench.begin(f"{name}: compiling")
        config = dataclasses.replace(config, num_layers=8)
        model = Transformer(config, jax.random.key(0))
        weights = {panels: decoder_weights(model, panels=panels) for panels in ways}
        programs = {
            (panels, rows): compile_pass(config, weights[panels], rows)
            for panels in ways
            for rows in ROWS
        }
        seconds = {key: [] for key in programs}
        for round_ in range(options.rounds):
            bench.begin(f"{name}: round {round_ + 1} of {options.rounds}")
            for key, (program, arguments) in programs.items():
                start = time.perf_counter()
                jax.block_until_ready(program(*arguments))
                seconds[key].append(time.perf_counter() - start)

        def over(key, base, seconds=seconds):
            pairs = zip(seconds[key], seconds[base], strict=True)
            return statistics.median(one / other for one, other in pairs)

        used = ways[-1]
        layer = statistics.median(seconds[used, 1]) / PASSES / config.num_layers
        bench.add({f"rows/{name}/microseconds_a_layer": layer * 1e6})
        for rows in ROWS[1:]:
            bench.add({f"rows/{name}/{rows}_over_1": over((used, rows), (used, 1))})
        for rows in ROWS if used else ():
            bench.add({f"rows/{name}/panels_over_whole_{rows}": over((True, rows), (False, rows))})


def compile_pass(config: ModelConfig, weights, rows: int):
    """Compiles `PASSES` passes of so many tokens through all layers; returns it and its inputs."""

    def run(weights, x, cache):
        def one(index, state):
            positions = (PROMPT_TOKENS + index + jnp.arange(rows))[None]
            return run_layers(weights, state[1], state[0], positions, 0, config.num_layers)

        return jax.lax.fori_loop(0, PASSES, one, (x, cache))[0]

    x = jnp.full((1, rows, config.model_dim), 0.01, config.compute_dtype)
    cache = empty_cache(config, config.num_layers, 1, PROMPT_TOKENS + PASSES + rows)
    arguments = weights, x, cache
    return jax.jit(run).lower(*arguments).compile(), arguments


def main() -> int:
    """Runs the benchmark."""
    parser = harness.parser(__doc__.split("\n")[0], rounds=(5, 2))
    parser.add_argument("--setting", choices=("random", "trained", "rows"), default="random")
    parser.add_argument("--workdir", type=Path, help="a trained run, for --setting=trained")
    parser.add_argument("--new-tokens", type=int, help="default: 128, with --quick 32")
    options = harness.parse(parser)
    if (options.setting == "trained") != (options.workdir is not None):
        parser.error("--setting=trained and --workdir go together")
    if options.new_tokens is None:
        options.new_tokens = 32 if options.quick else 128
    with harness.Bench(options) as bench:
        if options.setting == "trained":
            trained_setting(bench, options)
        elif options.setting == "rows":
            rows_setting(bench, jax.devices()[0].platform != "cpu", options)
        else:
            random_setting(bench, jax.devices()[0].platform != "cpu", options)
    return 0


if __name__ == "__main__":
    harness.run(main)
