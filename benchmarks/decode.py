r"""How fast decoding is: against the memory, the formula, `transformers`, and itself.

    python benchmarks/decode.py --json=decode.json
    python benchmarks/decode.py --setting=trained --workdir=runs/quickstart/model

One process, one set of weights for all that are compared, and the ways to decode take turns, so
that a machine whose speed drifts slows all of them; medians of ratios are reported. Times are of
decoding alone: reading the prompt and the first token are left out. The weights of `random` are
drawn at random; its layers after the exit are scaled down until the exit's drafts are accepted
as often as wished.

`transformers` is compared where torch is installed, as in the test environment.
"""

import argparse
import dataclasses
import math
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from layerskip_jax.commands.sweep import validation_prompts
from layerskip_jax.decoding.bandwidth import read_bandwidth
from layerskip_jax.decoding.cache import empty_cache, read_head, run_layers
from layerskip_jax.decoding.weights import decoder_weights
from layerskip_jax.generator import Generator
from layerskip_jax.interop.huggingface import to_hugging_face, to_hugging_face_config
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.model.transformer import Transformer
from layerskip_jax.runs import load_run, write_json
from layerskip_jax.training.state import ModelDefinition

PROMPT_TOKENS = 32
# Decoded one by one where batch 1 is measured.
BATCH_1_PROMPTS = 4


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
) -> tuple[dict, float]:
    """Returns random parameters whose exit's drafts are accepted about as often as wished.

    The share found is returned too: that of these prompts, going on for so many tokens.
    """
    definition = ModelDefinition(config)
    parameters = definition.init(jax.random.key(0))
    low, high, tried = 0.0, 1.0, []
    for _ in range(12):
        scale = (low + high) / 2
        generator = Generator(definition.model(scaled(parameters, exit_layer, scale)))
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


def take_turns(ways: dict, rounds: int) -> dict[str, list[float]]:
    """Runs every way once a round; returns what each returned."""
    results = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            results[name].append(run())
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

    def run():
        seconds = sum(timed(batch, new_tokens) - timed(batch, 1) for batch in batches)
        return seconds / (new_tokens - 1) / sum(map(len, batches))

    return run


def random_model(gpu: bool) -> ModelConfig:
    """Returns a model too large for a CPU's caches, or about 1B for a GPU."""
    return ModelConfig(
        num_layers=16, model_dim=2048 if gpu else 896, ffn_dim=5504 if gpu else 2432,
        num_heads=16 if gpu else 14, num_kv_heads=16 if gpu else 14, vocab_size=4096,
        max_sequence_length=2048, dtype="bfloat16" if gpu else "float32",
    )  # fmt: skip


def small_model(config: ModelConfig, dtype: str) -> ModelConfig:
    """Returns half the width, in another dtype, to compare tokens with."""
    return dataclasses.replace(
        config, model_dim=config.model_dim // 2, ffn_dim=config.ffn_dim // 2,
        num_heads=config.num_heads // 2, num_kv_heads=config.num_kv_heads // 2, dtype=dtype,
    )  # fmt: skip


def random_setting(gpu: bool, options) -> dict[str, float]:
    """Measures on random weights of a chosen acceptance."""
    config = random_model(gpu)
    total, head = read_bytes(config)
    bandwidth = read_bandwidth(total)
    console = Console(width=110)
    random = np.random.default_rng(0)
    prompts = random.integers(0, config.vocab_size, (16, PROMPT_TOKENS)).tolist()
    new_tokens, figures = options.new_tokens, {}
    definition = ModelDefinition(config)
    singles = [[prompt] for prompt in prompts[:BATCH_1_PROMPTS]]
    for exit_layer in (config.num_layers // 4, config.num_layers // 8):
        parameters, acceptance = with_acceptance(
            config, exit_layer, 0.8, prompts[:BATCH_1_PROMPTS], new_tokens
        )
        generator = Generator(definition.model(parameters))
        share = exit_layer / config.num_layers
        lengths = (2, 4, 6)
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
        results = take_turns(ways, options.rounds)
        name = f"e=1/{config.num_layers // exit_layer}"
        figures[f"{name}/acceptance"] = acceptance
        for way in list(ways)[1:]:
            figures[f"{name}/{way}_over_plain"] = ratio(results, way, "plain")
        for length in lengths:
            formula = speedup_formula(acceptance, share, head / total, length)
            figures[f"{name}/G={length}_formula"] = formula
        best = max(lengths, key=lambda length: figures[f"{name}/G={length}_over_plain"])
        speedup = figures[f"{name}/G={best}_over_plain"]
        short = "selfspec_over_plain" if share == 0.25 else f"selfspec_over_plain_{name}"
        figures[short] = speedup
        if share == 0.25:
            figures["selfspec_over_formula"] = speedup / figures[f"{name}/G={best}_formula"]
            figures["auto_over_best_pair"] = ratio(results, "auto", f"G={best}")
            per_token = statistics.median(results["plain"])
            figures["plain_over_bandwidth"] = total / per_token / bandwidth
            if model is not None:
                figures["plain_over_transformers"] = ratio(results, "plain", "transformers")
                figures["selfspec_over_assistant_early_exit"] = ratio(
                    results, f"G={best}", "assistant_early_exit"
                )
            for batch in (4, 16):
                turns = {"plain": ours(generator, [prompts[:batch]], new_tokens)}
                turns["drafted"] = ours(
                    generator, [prompts[:batch]], new_tokens,
                    mode="self_speculative", exit_layer=exit_layer, draft_length=best,
                )  # fmt: skip
                if model is not None:
                    turns["transformers"] = theirs(model, [prompts[:batch]], new_tokens)
                found = take_turns(turns, max(options.rounds // 2, 1))
                rate = 1 / statistics.median(found["plain"])
                figures[f"batch {batch}/plain_tokens_per_second"] = rate
                for way in list(turns)[1:]:
                    figures[f"batch {batch}/{way}_over_plain"] = ratio(found, way, "plain")
        for key, value in figures.items():
            if key.startswith(name):
                console.print(f"{key}: {value:.3f}", highlight=False)
    untrained = Generator(Transformer(config, jax.random.key(0)))
    ways = {
        "plain": ours(untrained, singles, new_tokens),
        "auto": ours(untrained, singles, new_tokens, mode="auto"),
    }
    results = take_turns(ways, options.rounds)
    figures["auto_over_plain_untrained"] = ratio(results, "auto", "plain")
    for dtype in ("float32", "bfloat16"):
        figures |= exactness(small_model(config, dtype), new_tokens)
    figures["weights_bytes"] = total
    figures["read_bytes_per_second"] = bandwidth
    return figures


def trained_setting(options) -> dict[str, float]:
    """Measures on a trained run: every pair against plain decoding, `auto`, and `transformers`."""
    run = load_run(options.workdir)
    generator, layers = Generator(run.model), run.config.model.num_layers
    prompts = validation_prompts(run.config.data.path, BATCH_1_PROMPTS, PROMPT_TOKENS)
    singles = [[prompt] for prompt in prompts]
    exits = sorted({max(1, layers // n) for n in (8, 4, 2)} - {layers})
    pairs = [(exit_layer, length) for exit_layer in exits for length in (1, 2, 4, 6)]
    ways = {"plain": ours(generator, singles, options.new_tokens)}
    for exit_layer, length in pairs:
        ways[f"E={exit_layer}, G={length}"] = ours(
            generator, singles, options.new_tokens,
            mode="self_speculative", exit_layer=exit_layer, draft_length=length,
        )  # fmt: skip
    ours_drafted = list(ways)[1:]
    ways["auto"] = ours(generator, singles, options.new_tokens, mode="auto", pairs=pairs)
    model = in_transformers(run.parameters, run.config.model)
    if model is not None:
        ways["transformers"] = theirs(model, singles, options.new_tokens)
        for exit_layer in exits:
            ways[f"assistant_early_exit={exit_layer}"] = theirs(
                model, singles, options.new_tokens, assistant_early_exit=exit_layer
            )
    results = take_turns(ways, options.rounds)
    figures = {f"trained/{way}_over_plain": ratio(results, way, "plain") for way in list(ways)[1:]}

    def fastest(names):
        return max(names, key=lambda way: figures[f"trained/{way}_over_plain"])

    best = fastest(ours_drafted)
    figures["trained/auto_over_best_pair"] = ratio(results, "auto", best)
    if model is not None:
        figures["trained/plain_over_transformers"] = ratio(results, "plain", "transformers")
        figures["trained/selfspec_over_assistant_early_exit"] = ratio(
            results, best, fastest(way for way in ways if way.startswith("assistant"))
        )
    return figures


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--setting", choices=("random", "trained"), default="random")
    parser.add_argument("--workdir", type=Path, help="a trained run, for --setting=trained")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--json", type=Path, help="file to write the figures to, flat")
    options = parser.parse_args()
    if (options.setting == "trained") != (options.workdir is not None):
        parser.error("--setting=trained and --workdir go together")
    device = jax.devices()[0]
    console = Console(width=110)
    console.print(f"jax {jax.__version__}, {device.device_kind}", highlight=False)
    if options.setting == "trained":
        figures = trained_setting(options)
    else:
        figures = random_setting(device.platform != "cpu", options)
    table = Table("figure", "value")
    for key, value in figures.items():
        table.add_row(key, "" if math.isnan(value) else f"{value:,.3f}")
    console.print(table)
    if options.json:
        write_json(options.json, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
