"""layerskip generate: continue prompts with a trained model.

All layers decode, unless `--exit=E` asks for the first E alone. With `--draft` the first
layers draft and the rest verify, to the same tokens: `best` as `layerskip sweep` found fastest,
`auto` chosen from cycle to cycle by what is accepted, or `E,G` for G drafts of E layers. With
`--draft-model` a second, smaller model drafts in their place, `--draft=G` tokens at a time. With
`--exit-when` each token runs until an exit is sure, to tokens that may differ.
"""

import argparse
import functools
import math
from collections.abc import Iterable
from pathlib import Path

from rich.live import Live
from rich.text import Text

from layerskip_jax.commands.arguments import make_run_parser, numbers, write_figures
from layerskip_jax.commands.tables import make_console
from layerskip_jax.decoding.adaptive import SKIPPED_KV
from layerskip_jax.generation.options import DEFAULT_KV, Generation
from layerskip_jax.language_model import PLAIN, Draft, Piece, load
from layerskip_jax.model.config import DTYPES
from layerskip_jax.run_folder.paths import read_prompt
from layerskip_jax.schema import UserError, is_whole
from layerskip_jax.self_speculation import ACCEPTANCES


def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    parser = make_run_parser("generate", __doc__)
    add = parser.add_argument
    add("--prompt", action="append", default=[], help="may be repeated")
    add("--prompt-file", type=Path, action="append", default=[], help="a file is one prompt")
    add("--chat", action="store_true", help="each prompt is a user's turn, by the model's template")
    add("--system", help="what the system says first, for --chat")
    add("--max-new-tokens", type=int, default=128)
    add(
        "--draft",
        type=_draft,
        metavar="best|auto|E,G|G",
        help="draft and verify (default: do not); G tokens with --draft-model",
    )
    add(
        "--draft-model",
        metavar="MODEL",
        help="a second model that drafts: a run, a Hugging Face folder or a GGUF file with the "
        "same tokens",
    )
    add(
        "--stop-below",
        metavar="P|lead:P|learned:P",
        help="with --draft: a row's drafts end after one less probable than P, or with less of a "
        "lead over the second choice",
    )
    add("--exit", type=int, metavar="E", help="decode with the first E layers only")
    add(
        "--exit-when",
        metavar="POLICY[:T]",
        help="run each token until an exit is sure: entropy:0.2, margin:0.5, saturation:0.99, "
        "patience:3, learned:0.9; a name alone takes what `layerskip calibrate` found",
    )
    add("--exits", type=numbers, metavar="E,...", help="candidates (default: every L/8)")
    add("--kv", choices=SKIPPED_KV, default=DEFAULT_KV, help="of layers that a token skipped")
    add(
        "--falling",
        action="store_true",
        help="begin with a more careful threshold, which falls along the text",
    )
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    add("--top-k", type=int, help="draw from so many likeliest tokens")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest of this probability")
    add("--seed", type=int, default=0)
    add("--acceptance", default="same_noise", help=", ".join(ACCEPTANCES))
    add("--stop", action="append", default=[], help="text that ends a row; may be repeated")
    add(
        "--special-tokens",
        action="store_true",
        help="a special token spelled out in a prompt is that token (default: text)",
    )
    add("--stream", action="store_true", help="show the text, and its drafts, as they come")
    add("--dtype", choices=DTYPES, help="to compute in (default: the run's)")
    options = parser.parse_args(argv)
    prompts = options.prompt + [read_prompt(path) for path in options.prompt_file]
    if not prompts:
        raise UserError("give at least one --prompt or --prompt-file")
    if options.system is not None and not options.chat:
        raise UserError("--system begins a chat; add --chat, or leave it out")
    if options.stream and len(prompts) > 1:
        raise UserError(f"--stream shows one prompt at a time, not {len(prompts)}")
    if options.stream and options.json:
        raise UserError("--stream and --json exclude each other; leave one out")

    if options.draft_model is not None and not is_whole(options.draft):
        raise UserError(
            "--draft-model takes the place of the model's own layers; say how many tokens it "
            "drafts a cycle, such as --draft=5, or leave it out"
        )
    if options.draft_model is None and is_whole(options.draft):
        raise UserError(
            f"--draft={options.draft} drafts with a second model; name it with --draft-model, or "
            "give E,G to draft with the first E layers"
        )

    model = load(
        options.workdir, step=options.step, dtype=options.dtype, draft_model=options.draft_model
    )
    request = {
        "draft": options.draft,
        "stop_below": options.stop_below,
        "exit_layer": options.exit,
        "exit_when": options.exit_when,
        "exits": options.exits,
        "kv": options.kv,
        "falling": options.falling,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "seed": options.seed,
        "acceptance": options.acceptance,
        "stop": options.stop,
        "special_tokens": options.special_tokens,
    }
    count, after = options.max_new_tokens, ""
    texts, chats = prompts, []
    if options.chat:
        texts, after = [], "\n\n"
        first = [] if options.system is None else [{"role": "system", "content": options.system}]
        chats = [[*first, {"role": "user", "content": text}] for text in prompts]
    if options.stream:
        text, chat = next(iter(texts), ""), next(iter(chats), [])
        _stream(prompts[0] + after, model.stream(text, count, messages=chat, **request))
        return 0
    model.generate(texts, count, messages=chats, **request)  # compiles; the next is timed
    completions = model.generate(texts, count, messages=chats, **request)
    for prompt, text in zip(prompts, completions.texts, strict=True):
        print(f"{prompt}{after}{text}\n")
    figures, line = _summary(completions.generation)
    if options.draft == "best" and model.best_pair == PLAIN:
        line += ", decoded plainly, which the sweep found fastest"
    print(f"[{line}; reading the prompt included, compilation not]")
    if options.json:
        write_figures(
            options.json,
            {**figures, "texts": completions.texts, "tokens": completions.generation.tokens},
        )
    return 0


def _summary(generation: Generation) -> tuple[dict, str]:
    """Returns the figures of a generation, named for --json, and in one line for people."""
    figures = {
        "new_tokens": sum(map(len, generation.tokens)),
        "seconds": generation.seconds,
        "seconds_to_first_token": generation.seconds_to_first_token,
        "tokens_per_second": generation.tokens_per_second,
        "bandwidth_share": _number(generation.bandwidth_share),
    }
    line = f"{figures['new_tokens']} tokens, {generation.tokens_per_second:,.0f} tokens/s"
    if figures["bandwidth_share"] is not None:
        line += f", weights read at {generation.bandwidth_share:.0%} of the memory bandwidth"
    if (drafting := generation.drafting) and drafting.cycles + drafting.plain_cycles:
        figures["cycles"] = drafting.cycles + drafting.plain_cycles
        figures["tokens_per_cycle"] = drafting.tokens_per_cycle
        if drafting.drafted:
            figures["acceptance"] = drafting.acceptance
            figures["acceptance_by_position"] = list(map(_number, drafting.acceptance_by_position))
            line += f", {drafting.acceptance:.0%} of the drafts accepted"
        line += f", {drafting.tokens_per_cycle:.2f} tokens a cycle"
    if (depth := generation.depth) and sum(depth.tokens):
        figures["mean_layers"] = depth.mean_layers
        figures["mean_layers_of_batch"] = depth.mean_layers_of_batch
        figures["tokens_by_exit"] = dict(zip(map(str, depth.layers), depth.tokens, strict=True))
        line += f", {depth.mean_layers:.1f} of {depth.layers[-1]} layers a token"
    return figures, line


def _draft(text: str) -> Draft:
    if text in ("best", "auto"):
        return text
    if text.isdecimal():
        return int(text)
    try:
        exit_layer, draft_length = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not best, auto, E,G or G") from None
    return exit_layer, draft_length


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _stream(prompt: str, pieces: Iterable[Piece]) -> None:
    """Prints text as it comes; on a terminal drafts stand dim until they are replaced."""
    console = make_console()
    show = functools.partial(console.print, soft_wrap=True)
    if not console.is_terminal:
        show(Text(prompt), end="")
        for piece in pieces:
            if not piece.is_draft:
                show(Text(piece.text), end="")
        show()
        return
    # Whole lines are printed for good; only the last one, and the drafts after it, are drawn anew.
    *whole, line = prompt.split("\n")
    with Live(Text(line), console=console, auto_refresh=False, transient=True) as live:
        for text in whole:
            show(Text(text))
        for piece in pieces:
            drafted = piece.text if piece.is_draft else ""
            if not piece.is_draft:
                *whole, line = (line + piece.text).split("\n")
                for text in whole:
                    show(Text(text))
            live.update(Text.assemble(line, (drafted, "dim cyan")), refresh=True)
    show(Text(line))
