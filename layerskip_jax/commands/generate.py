"""layerskip generate: continue prompts with a trained model, greedily.

Modes: `plain` (all layers), `early_exit` (the first E layers and the head) and
`self_speculative` (the tokens of `plain`, drafted by the first E layers).
"""

import dataclasses
import json
from pathlib import Path

from layerskip_jax.commands.arguments import make_run_parser
from layerskip_jax.data.tokenizer import load_tokenizer
from layerskip_jax.generator import MODES, Generator
from layerskip_jax.model.config import DTYPES
from layerskip_jax.runs import load_run, write_json
from layerskip_jax.schema import UserError
from layerskip_jax.training.state import ModelDefinition


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
    add("--dtype", choices=DTYPES, help="to compute in (default: the run's)")
    options = parser.parse_args(argv)
    prompts = options.prompt + [_read(path) for path in options.prompt_file]
    if not prompts:
        raise UserError("give at least one --prompt or --prompt-file")

    run = load_run(options.workdir, options.step)
    dtype = options.dtype or run.config.model.dtype
    definition = ModelDefinition(dataclasses.replace(run.config.model, dtype=dtype))
    generator = Generator(definition.model(run.parameters))
    tokenizer = load_tokenizer(run.folder.tokenizer_file)
    end_token = json.loads(run.folder.data_file.read_text())["end_token_id"]
    ids = [tokenizer.encode(prompt).ids for prompt in prompts]

    def generate():
        return generator.generate(
            ids,
            options.max_new_tokens,
            mode=options.mode,
            exit_layer=options.exit_layer,
            draft_length=options.draft_length,
            end_token=end_token,
        )

    generate()  # compiles; the second run is the one that is timed
    generation = generate()
    texts = [tokenizer.decode(tokens) for tokens in generation.tokens]
    for prompt, text in zip(prompts, texts, strict=True):
        print(f"{prompt}{text}\n")
    figures = {
        "new_tokens": sum(map(len, generation.tokens)),
        "seconds": generation.seconds,
        "tokens_per_second": generation.tokens_per_second,
    }
    line = f"{figures['new_tokens']} tokens, {generation.tokens_per_second:,.0f} tokens/s"
    if (drafting := generation.drafting) and drafting.cycles:
        figures["acceptance"] = drafting.acceptance
        figures["tokens_per_cycle"] = drafting.tokens_per_cycle
        line += (
            f", {drafting.acceptance:.0%} of the drafts accepted, "
            f"{drafting.tokens_per_cycle:.2f} tokens a cycle"
        )
    print(f"[{options.mode}: {line}; reading the prompt included, compilation not]")
    if options.json:
        write_json(options.json, {**figures, "texts": texts, "tokens": generation.tokens})
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file={path} cannot be read as UTF-8 text ({error})") from error
