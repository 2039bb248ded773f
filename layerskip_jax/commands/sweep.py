"""layerskip sweep: measure self-speculation over exits and draft lengths.

Prompts are cut from the validation set, or are your own (`--prompt-file`). For each exit E the
drafts that were accepted are counted in one run over them, and the time of a cycle is measured
against plain decoding; together they give the speed of every pair (E, G). The best is then
measured on all prompts, in turns with plain decoding. The result goes into the run's folder as
speculation.json, .csv and .svg, where `layerskip generate --draft=best` and `layerskip report`
find it. Where no pair is faster than plain decoding, that is what `best` then does.
"""

import argparse
import csv
import io
from pathlib import Path

import numpy as np

from layerskip_jax.commands.arguments import (
    add_on_damaged,
    make_run_parser,
    prepared_data,
    write_figures,
)
from layerskip_jax.commands.tables import make_console, make_table
from layerskip_jax.data.batches import BatchSource
from layerskip_jax.data.text import encode_prompt
from layerskip_jax.data.tokenizer import load_tokenizer
from layerskip_jax.generation.generator import Generator
from layerskip_jax.generation.sweep import sweep
from layerskip_jax.report.drawing import svg_text
from layerskip_jax.report.run_record import RunRecord
from layerskip_jax.report.speed_figures import speculation_speed
from layerskip_jax.run_folder.atomic import named_writes, write_json, write_text
from layerskip_jax.run_folder.paths import read_prompt
from layerskip_jax.schema import ConfigError, require, require_count
from layerskip_jax.training.restore import load_run

# Enough to know the most frequent tokens by.
MOST_WINDOWS = 4096
DRAFTS = (1, 2, 3, 4, 6)
COLUMNS = (
    "exit_layer", "draft_length", "acceptance", "tokens_per_cycle", "seconds_per_cycle", "timed",
    "tokens_per_second", "speedup", "identical", "verified",
)  # fmt: skip


def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    parser = make_run_parser("sweep", __doc__)
    add = parser.add_argument
    add("--exits", type=_numbers, help="values of E (default: L/8, L/4, L/2)")
    add("--drafts", type=_numbers, default=DRAFTS, help="values of G (default: 1,2,3,4,6)")
    add("--data", help="prepared data (default: what the run trained on)")
    add("--prompt-file", type=Path, action="append", default=[], help="a file is one prompt")
    add("--prompts", type=int, default=32, help="prompts cut from the validation set")
    add("--prompt-tokens", type=int, default=64)
    add("--new-tokens", type=int, default=64)
    add(
        "--draft-vocabulary", type=int, metavar="N",
        help="draft only the N most frequent tokens of the training data",
    )  # fmt: skip
    add_on_damaged(parser)
    options = parser.parse_args(argv)
    for name, least in (("prompts", 1), ("prompt_tokens", 1), ("new_tokens", 2)):
        require_count(f"--{name.replace('_', '-')}", getattr(options, name), least)
    for length in options.drafts:
        require_count("--drafts", length, 1)

    run = load_run(options.workdir, options.step)
    config = run.config
    layers = config.model.num_layers
    for exit_layer in options.exits or ():
        require(1 <= exit_layer < layers, f"--exits={exit_layer} must be in 1..{layers - 1}")
    on_damaged, data = options.on_damaged or config.data.on_damaged, ""
    if options.draft_vocabulary is not None or not options.prompt_file:
        data = prepared_data(options.workdir, config.data.path, options.data)
    exits = options.exits or sorted({max(1, layers // n) for n in (8, 4, 2)} - {layers})
    if options.prompt_file:
        tokenizer = load_tokenizer(run.folder.tokenizer_file)
        prompts = [encode_prompt(tokenizer, read_prompt(path)) for path in options.prompt_file]
    else:
        prompts = validation_prompts(
            data, options.prompts, options.prompt_tokens, on_damaged=on_damaged
        )
    draft_tokens = None
    if options.draft_vocabulary is not None:
        draft_tokens = frequent_tokens(
            data, options.draft_vocabulary, config.model.vocab_size, on_damaged=on_damaged
        )
    result = sweep(
        Generator(run.model, draft_tokens=draft_tokens),
        prompts,
        options.new_tokens,
        exits=exits,
        draft_lengths=options.drafts,
        progress=lambda text: print(f"measuring {text}", flush=True),
    )
    result = {
        "step": run.step,
        "prompts": len(prompts),
        "prompt_tokens": max(map(len, prompts)),
        "new_tokens": options.new_tokens,
        "batch_size": 1,
        "dtype": config.model.dtype,
        "draft_tokens": draft_tokens,
        **result,
    }
    _print(result)
    figure = speculation_speed(RunRecord(run.folder, config, speculation=result)).figure
    file = run.folder.speculation_file
    with named_writes(file):
        write_json(file, result)
        write_text(file.with_suffix(".csv"), _csv(result))
        write_text(file.with_suffix(".svg"), svg_text(figure))
    run.folder.upload()
    if options.json:
        write_figures(options.json, result)
    return 0


def validation_prompts(
    data: str, count: int, length: int, *, on_damaged: str = "stop"
) -> list[list[int]]:
    """Cuts prompts from the validation set, spread over it.

    Args:
      data: prepared data.
      count: number of prompts.
      length: tokens in each, all of one document.
      on_damaged: as `config.data.on_damaged`.

    Raises:
      ConfigError: the validation set has fewer windows that begin with so long a document.
    """
    source = _windows(data, "validation", on_damaged)
    prompts = []
    # A fixed shuffle spreads the prompts over the documents.
    for window in np.random.default_rng(0).permutation(source.num_windows).tolist():
        batch = source.batch(window)
        segments = batch.segment_ids[0, :length]
        if len(segments) == length and (segments == 1).all():
            prompts.append(batch.tokens[0, :length].tolist())
        if len(prompts) == count:
            return prompts
    raise ConfigError(
        f"{data} has {len(prompts)} validation windows that begin with {length} tokens of one "
        f"document, not {count}; ask for fewer --prompts or --prompt-tokens"
    )


def frequent_tokens(
    data: str, count: int, vocab_size: int, *, on_damaged: str = "stop"
) -> list[int]:
    """Returns the most frequent tokens of the training data, from a sample of its windows.

    Args:
      data: prepared data.
      count: how many.
      vocab_size: V.
      on_damaged: as `config.data.on_damaged`.

    Raises:
      ConfigError: the vocabulary has fewer.
    """
    require(
        1 <= count <= vocab_size,
        f"--draft-vocabulary={count} must be in 1..{vocab_size}, the model's vocabulary",
    )
    source = _windows(data, "train", on_damaged)
    windows = np.random.default_rng(0).permutation(source.num_windows)[:MOST_WINDOWS]
    histogram = np.zeros(vocab_size, np.int64)
    for window in windows.tolist():
        batch = source.batch(window)
        histogram += np.bincount(batch.tokens[batch.segment_ids > 0], minlength=vocab_size)
    return sorted(np.argsort(-histogram, kind="stable")[:count].tolist())


def _windows(data: str, split: str, on_damaged: str) -> BatchSource:
    skip = on_damaged == "skip"
    return BatchSource(data, split, batch_size=1, seed=0, shuffle=False, skip_damaged=skip)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 1,2,4") from None


def _csv(result: dict) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows([*result["pairs"], result["best"]])
    return file.getvalue()


def _print(result: dict) -> None:
    plain = ("all", "", "", "", f"{result['plain_tokens_per_second']:,.0f}", "1.00", "")
    pairs = [
        (
            str(pair["exit_layer"]),
            str(pair["draft_length"]),
            "" if pair["acceptance"] is None else f"{pair['acceptance']:.0%}",
            "" if pair["tokens_per_cycle"] is None else f"{pair['tokens_per_cycle']:.2f}",
            f"{pair['tokens_per_second']:,.0f}",
            f"{pair['speedup']:.2f}",
            "yes" if pair["identical"] else "NO",
        )
        for pair in [*result["pairs"], result["best"]]
    ]
    table = make_table(
        f"Greedy decoding, batch 1, {result['prompts']} prompts of up to "
        f"{result['prompt_tokens']} tokens, {result['new_tokens']} new ones",
        ("E", "G", "accepted", "tokens/cycle", "tokens/s", "speed-up", "same tokens"),
        [plain, *pairs],
        styles=[*[None] * len(pairs), "bold"],
        sections=(0, len(pairs) - 1),
        caption="E: layers that draft; G: drafts a cycle. Predicted from the acceptance of each "
        "exit and the cost of a cycle; the last line is measured.",
    )
    make_console().print(table)
    if result["best"]["speedup"] < 1:
        print("Plain decoding is the fastest here, and --draft=best decodes plainly.")
