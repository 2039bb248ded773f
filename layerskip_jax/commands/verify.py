"""layerskip verify: compare a Hugging Face folder as we read it with transformers.

Hard texts are encoded, here and by AutoTokenizer. Every layer's output goes through the final norm
and the head in float32, over a window as long as the context where that fits, and greedy tokens
follow a prompt. The exit code is 1 where they differ, and the text and the first layer that do are
named. PyTorch and transformers must be installed.
"""

import dataclasses
from pathlib import Path

import numpy as np

from layerskip_jax.commands.arguments import figures_file, make_parser, write_figures
from layerskip_jax.commands.tables import make_console, make_table
from layerskip_jax.data.text import encode_prompt
from layerskip_jax.decoding.weights import decoder_weights
from layerskip_jax.generation.generator import Generator
from layerskip_jax.interop.pretrained import open_pretrained
from layerskip_jax.interop.verify import (
    compare_exits,
    compare_texts,
    greedy_tokens,
    load_transformers,
    longest_window,
)
from layerskip_jax.model.definition import ModelDefinition
from layerskip_jax.model.exits import ExitsConfig
from layerskip_jax.run_folder.paths import read_prompt
from layerskip_jax.schema import UserError, require_count, require_range

GREEDY_PROMPT = 32


def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    parser = make_parser("verify", __doc__)
    parser.add_argument("folder", type=Path, help="a Hugging Face folder")
    parser.add_argument(
        "--tokens", type=int, help="to read (default: the model's context, or what fits)"
    )
    parser.add_argument("--text", type=Path, help="a file to take them from (default: random ones)")
    parser.add_argument("--new-tokens", type=int, default=32, help="greedy tokens to compare")
    parser.add_argument(
        "--tolerance", type=float, default=2e-4, help="of a logit, or as a share of the largest"
    )
    parser.add_argument("--json", type=figures_file, help="also write the figures to this file")
    options = parser.parse_args(argv)
    if options.tokens is not None:
        require_count("--tokens", options.tokens, 1)
    require_count("--new-tokens", options.new_tokens, 1)
    require_range("--tolerance", options.tolerance, "[0, inf)")
    pretrained = open_pretrained(options.folder)
    # transformers reads every exit through the final norm, whatever lies beside the model.
    config = dataclasses.replace(pretrained.config, dtype="float32", exits=ExitsConfig())
    count = longest_window(config) if options.tokens is None else options.tokens
    if options.text is None:
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, count)
    else:
        tokens = np.array(encode_prompt(pretrained.tokenizer, read_prompt(options.text, "--text")))
        tokens = tokens[:count]
    if not 1 <= len(tokens) <= config.max_sequence_length:
        raise UserError(
            f"{len(tokens)} tokens to compare must be 1 to {config.max_sequence_length}, the "
            "model's context; change --tokens or --text"
        )
    if tokens.max() >= config.vocab_size:
        raise UserError(f"--text holds the token {tokens.max()}, which the model has no row for")
    texts = compare_texts(pretrained.tokenizer, options.folder)
    theirs = load_transformers(options.folder)
    model = ModelDefinition(config).model(pretrained.parameters(config=config))
    differences = compare_exits(decoder_weights(model), config, theirs, tokens.astype(np.int32))

    table = make_table(
        f"{options.folder} against transformers, {len(tokens)} tokens",
        ("layers", "largest difference", "largest logit", "same argmax"),
        [
            (str(e.layers), f"{e.largest:.2e}", f"{e.scale:,.1f}", f"{e.same_argmax:.1%}")
            for e in differences
        ],
        styles=["red" if e.exceeds(options.tolerance) else None for e in differences],
    )
    make_console().print(table)
    wrong = [entry.layers for entry in differences if entry.exceeds(options.tolerance)]

    room = config.max_sequence_length - options.new_tokens
    prompt = tokens[: max(min(GREEDY_PROMPT, room), 1)].tolist()
    ours = Generator(model).generate([prompt], options.new_tokens).tokens[0]
    there = greedy_tokens(theirs, prompt, options.new_tokens)
    same = ours == there
    if options.json:
        figures = {
            "exits": [entry._asdict() for entry in differences],
            "first_layer_that_differs": wrong[0] if wrong else None,
            "same_greedy_tokens": same,
            "tokens": len(tokens),
            "texts_that_differ": [entry._asdict() for entry in texts],
        }
        write_figures(options.json, figures)
    for entry in texts:
        print(f"{entry.text!r} is {entry.ours} here, and {entry.theirs} with AutoTokenizer")
    if wrong:
        print(f"the outputs differ from layer {wrong[0]} on")
    if not same:
        at = next(i for i, pair in enumerate(zip(ours, there, strict=True)) if len(set(pair)) > 1)
        print(f"greedy tokens differ from token {at} on: {ours[at]} here, {there[at]} there")
    if wrong or texts or not same:
        return 1
    print(f"all texts' ids, every exit and {options.new_tokens} greedy tokens agree")
    return 0
