"""layerskip generate: continue prompts with a trained model.

Modes: `plain` (all layers), `early_exit` (the first E layers and the head), and, with the same
tokens as `plain`, `self_speculative` (drafted by the first E layers; E and G are those that
`layerskip sweep` found best, unless given) and `auto` (E and G chosen from cycle to cycle).
"""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from layerskip_jax.commands.arguments import make_run_parser
from layerskip_jax.language_model import LanguageModel, load
from layerskip_jax.model.config import DTYPES
from layerskip_jax.request import MODES
from layerskip_jax.runs import read_prompt, write_json
from layerskip_jax.schema import UserError
from layerskip_jax.self_speculation import ACCEPTANCES


def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    parser = make_run_parser("generate", __doc__)
    add = parser.add_argument
    add("--prompt", action="append", default=[], help="may be repeated")
    add("--prompt-file", type=Path, action="append", default=[], help="a file is one prompt")
    add("--max-new-tokens", type=int, default=128)
    add("--mode", default="plain", help=", ".join(MODES))
    add("--exit-layer", type=int, help="E, the layers that draft or decode")
    add("--draft-length", type=int, help="G, drafts a cycle")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    add("--top-k", type=int, help="draw from so many likeliest tokens")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest of this probability")
    add("--seed", type=int, default=0)
    add("--acceptance", default="same_noise", help=", ".join(ACCEPTANCES))
    add("--stop", action="append", default=[], help="text that ends a row; may be repeated")
    add("--stream", action="store_true", help="show the text, and its drafts, as they come")
    add("--dtype", choices=DTYPES, help="to compute in (default: the run's)")
    options = parser.parse_args(argv)
    prompts = options.prompt + [read_prompt(path) for path in options.prompt_file]
    if not prompts:
        raise UserError("give at least one --prompt or --prompt-file")
    if options.stream and len(prompts) > 1:
        raise UserError(f"--stream shows one prompt at a time, not {len(prompts)}")
    if options.stream and options.json:
        raise UserError("--stream and --json exclude each other; leave one out")

    model = load(options.workdir, step=options.step, dtype=options.dtype)
    request = {
        "mode": options.mode,
        "exit_layer": options.exit_layer,
        "draft_length": options.draft_length,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "seed": options.seed,
        "acceptance": options.acceptance,
        "stop": options.stop,
    }
    if options.mode == "self_speculative" and (options.exit_layer, options.draft_length) == (
        None,
        None,
    ):
        if model.best_pair is None:
            raise UserError(
                "--mode=self_speculative needs --exit-layer and --draft-length, or a "
                f"`layerskip sweep --workdir={options.workdir}` that finds the best"
            )
        request["exit_layer"], request["draft_length"] = model.best_pair
    if options.stream:
        _stream(model, prompts[0], options.max_new_tokens, request)
        return 0
    model.generate(prompts, options.max_new_tokens, **request)  # compiles; the next is timed
    completions = model.generate(prompts, options.max_new_tokens, **request)
    for prompt, text in zip(prompts, completions.texts, strict=True):
        print(f"{prompt}{text}\n")
    generation = completions.generation
    figures = {
        "new_tokens": sum(map(len, generation.tokens)),
        "seconds": generation.seconds,
        "seconds_to_first_token": generation.seconds_to_first_token,
        "tokens_per_second": generation.tokens_per_second,
    }
    line = f"{figures['new_tokens']} tokens, {generation.tokens_per_second:,.0f} tokens/s"
    if (drafting := generation.drafting) and drafting.cycles + drafting.plain_cycles:
        figures["tokens_per_cycle"] = drafting.tokens_per_cycle
        if drafting.drafted:
            figures["acceptance"] = drafting.acceptance
            figures["acceptance_by_position"] = [
                None if np.isnan(rate) else rate for rate in drafting.acceptance_by_position
            ]
            line += f", {drafting.acceptance:.0%} of the drafts accepted"
        line += f", {drafting.tokens_per_cycle:.2f} tokens a cycle"
    print(f"[{options.mode}: {line}; reading the prompt included, compilation not]")
    if options.json:
        write_json(
            options.json, {**figures, "texts": completions.texts, "tokens": generation.tokens}
        )
    return 0


def _stream(model: LanguageModel, prompt: str, max_new_tokens: int, request: dict) -> None:
    """Prints text as it comes; on a terminal drafts stand dim until they are replaced."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(prompt), end="")
    drafted = False
    for piece in model.stream(prompt, max_new_tokens, **request):
        if not console.is_terminal:
            if not piece.is_draft:
                console.print(Text(piece.text), end="")
            continue
        if piece.is_draft:
            # Save the cursor, so that what takes the drafts' place is written over them.
            console.file.write("\x1b7")
            console.print(Text(piece.text, style="dim cyan"), end="")
            drafted = True
        else:
            if drafted:
                console.file.write("\x1b8\x1b[0J")
            console.print(Text(piece.text), end="")
            drafted = False
        console.file.flush()
    console.print()
