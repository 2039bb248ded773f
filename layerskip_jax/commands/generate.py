"""layerskip generate: continue prompts with a trained model.

All layers decode, unless `--exit=E` asks for the first E alone. With `--draft` the first
layers draft and the rest verify, to the same tokens: `best` as `layerskip sweep` found fastest,
`auto` chosen from cycle to cycle by what is accepted, or `E,G` for G drafts of E layers.
"""

import argparse
import functools
import math
from collections.abc import Iterable
from pathlib import Path

from rich.live import Live
from rich.text import Text

from layerskip_jax.commands.arguments import make_run_parser, write_figures
from layerskip_jax.commands.tables import make_console
from layerskip_jax.generation.options import Generation
from layerskip_jax.language_model import PLAIN, Draft, Piece, load
from layerskip_jax.model.config import DTYPES
from layerskip_jax.run_folder.paths import read_prompt
from layerskip_jax.schema import UserError
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
    add("--draft", type=_draft, metavar="best|auto|E,G", help="draft and verify (default: do not)")
    add("--exit", type=int, metavar="E", help="decode with the first E layers only")
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

    model = load(options.workdir, step=options.step, dtype=options.dtype)
    request = {
        "draft": options.draft,
        "exit_layer": options.exit,
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
    return figures, line


def _draft(text: str) -> Draft:
    if text in ("best", "auto"):
        return text
    try:
        exit_layer, draft_length = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not best, auto or E,G") from None
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
