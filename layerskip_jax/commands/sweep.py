"""layerskip sweep: measure self-speculation over exits and draft lengths.

Prompts are cut from the validation set. Plain decoding and every pair (E, G) decode the same
prompts in turn, one prompt at a time; the result goes into the run's folder, where
`layerskip report` finds it.
"""

import argparse

import numpy as np
from rich.console import Console
from rich.table import Table

from layerskip_jax.commands.arguments import make_run_parser
from layerskip_jax.data.batches import BatchSource
from layerskip_jax.decoding.tuning import measure
from layerskip_jax.generator import Generator
from layerskip_jax.runs import load_run, write_json
from layerskip_jax.schema import ConfigError


def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    parser = make_run_parser("sweep", __doc__)
    add = parser.add_argument
    add("--exits", type=_numbers, help="values of E (default: L/4, L/2)")
    add("--drafts", type=_numbers, default=(1, 2, 4), help="values of G (default: 1,2,4)")
    add("--prompts", type=int, default=32, help="prompts to measure on")
    add("--prompt-tokens", type=int, default=64)
    add("--new-tokens", type=int, default=64)
    options = parser.parse_args(argv)

    run = load_run(options.workdir, options.step)
    config = run.config
    layers = config.model.num_layers
    exits = options.exits or sorted({max(1, layers // n) for n in (4, 2)} - {layers})
    prompts = validation_prompts(config.data.path, options.prompts, options.prompt_tokens)
    print(
        f"compiling and measuring {1 + len(exits) * len(options.drafts)} ways to decode", flush=True
    )
    result = measure(
        Generator(run.model),
        prompts,
        options.new_tokens,
        exits=exits,
        draft_lengths=options.drafts,
    )
    result = {
        "step": run.step,
        "prompts": len(prompts),
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "batch_size": 1,
        "dtype": config.model.dtype,
        **result,
    }
    _print(result)
    write_json(run.folder.speculation_file, result)
    if options.json:
        write_json(options.json, result)
    return 0


def validation_prompts(data: str, count: int, length: int) -> list[list[int]]:
    """Cuts prompts from the validation set, spread over it.

    Args:
      data: prepared data.
      count: number of prompts.
      length: tokens in each, all of one document.

    Raises:
      ConfigError: the validation set has fewer windows that begin with so long a document.
    """
    source = BatchSource(data, "validation", batch_size=1, seed=0, shuffle=False)
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


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 1,2,4") from None


def _print(result: dict) -> None:
    table = Table(
        title=f"Greedy decoding, batch 1, {result['prompts']} prompts of "
        f"{result['prompt_tokens']} tokens, {result['new_tokens']} new ones",
        title_justify="left",
    )
    for heading in ("E", "G", "accepted", "tokens/cycle", "tokens/s", "speed-up", "same tokens"):
        table.add_column(heading, justify="right")
    plain = result["plain_tokens_per_second"]
    table.add_row("all", "", "", "", f"{plain:,.0f}", "1.00", "")
    for pair in result["pairs"]:
        table.add_row(
            str(pair["exit_layer"]),
            str(pair["draft_length"]),
            "" if pair["acceptance"] is None else f"{pair['acceptance']:.0%}",
            "" if pair["tokens_per_cycle"] is None else f"{pair['tokens_per_cycle']:.2f}",
            f"{pair['tokens_per_second']:,.0f}",
            f"{pair['speedup']:.2f}",
            "yes" if pair["identical"] else "NO",
            style="bold" if pair is result["best"] else None,
        )
    Console().print(table)
