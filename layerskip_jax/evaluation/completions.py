"""Exact match: whether a prompt's greedy completion is the one that was wanted, to the letter.

What finetunes on parses and the like are judged by, as LayerSkip's on TOPv2. Every exit decodes by
itself, from the ids that `generate` makes of a prompt to the end token; a token too many is wrong.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from layerskip_jax.data.completions import BadRecordError, marked_texts
from layerskip_jax.data.json_lines import json_values, read_named
from layerskip_jax.data.manifest import PrepareOptions
from layerskip_jax.data.text import completion_ids, encode_prompt
from layerskip_jax.language_model import LanguageModel
from layerskip_jax.schema import UserError, require, require_count

# Rows that decode together, and to whose multiple their new tokens are rounded up, so that texts of
# about a length share a program.
ROWS, BUCKET = 32, 16


class Wanted(NamedTuple):
    """A prompt and the completion that is wanted of it.

    Attributes:
      prompt: its ids.
      text: the completion.
      tokens: that the completion has with its end token.
    """

    prompt: list[int]
    text: str
    tokens: int


def chosen_exits(num_layers: int, exits: Sequence[int] | None) -> tuple[int, ...]:
    """Returns the exits to decode with, in layers; None takes a quarter, a half and all of them.

    Raises:
      ConfigError: one is none of the model's, or there is none.
    """
    if exits is None:
        return tuple(sorted({max(num_layers // 4, 1), max(num_layers // 2, 1), num_layers}))
    require(len(exits) > 0, "--exits='' names no exit; leave it out for L/4, L/2 and L")
    for layers in exits:
        require_count("--exits", layers, 1, num_layers)
    return tuple(exits)


def read_completions(
    path: Path, tokenizer: Tokenizer, *, context: int, prompt_field: str, completion_field: str
) -> list[Wanted]:
    """Reads prompts and completions from a file of JSON lines, as `prepare` does.

    Args:
      path: the file.
      tokenizer: the model's.
      context: the most tokens that the model reads.
      prompt_field: the field with the prompt.
      completion_field: the field with the completion.

    Raises:
      UserError: the file cannot be read, holds none, or a line is wrong; by its number.
    """
    option = f"--completions={path}"
    fields = PrepareOptions(
        sources=(str(path),), prompt_field=prompt_field, completion_field=completion_field
    )
    found = []
    for where, record in json_values(read_named(path, option), option):
        try:
            [(text, [(start, _)])] = marked_texts(record, fields, None)
        except BadRecordError as error:
            raise UserError(f"{where} {error}; correct it or leave it out") from error
        found.append(_wanted(tokenizer, text[:start], text[start:], context, where))
    if not found:
        raise UserError(f"{option} holds no completion")
    return found


def _wanted(tokenizer: Tokenizer, prompt: str, completion: str, context: int, where: str) -> Wanted:
    ids, whole = (encode_prompt(tokenizer, text) for text in (prompt, prompt + completion))
    tokens = completion_ids(tokenizer, completion, ids, whole)
    if tokens is None:
        raise UserError(f"{where}: the tokenizer has no tokens that say {completion!r} there")
    if len(ids) + len(tokens) + 1 > context:
        raise UserError(
            f"{where}: prompt and completion have {len(ids) + len(tokens)} tokens, and the context "
            f"holds {context} with the end token; leave it out"
        )
    return Wanted(ids, completion, len(tokens) + 1)


def exact_match(model: LanguageModel, wanted: Sequence[Wanted], exits: Sequence[int]) -> list[dict]:
    """Returns of each exit `{"layers", "right", "exact_match"}`: how many are right, and the share.

    Args:
      model: the model.
      wanted: prompts and completions.
      exits: exits to decode with, in layers; each writes its own keys and values.
    """
    config = model.generator.config
    # Those of like length decode together.
    order = sorted(wanted, key=lambda one: (one.tokens, len(one.prompt)))
    batches = [order[start : start + ROWS] for start in range(0, len(order), ROWS)]
    result = []
    for layers in exits:
        right = 0
        for batch in batches:
            prompts = [one.prompt for one in batch]
            room = config.max_sequence_length - max(map(len, prompts))
            most = max(one.tokens for one in batch)
            said = model.complete(
                prompts,
                max(most, min(-(-most // BUCKET) * BUCKET, room)),
                exit_layer=None if layers == config.num_layers else layers,
            )
            right += sum(one.text == text for one, text in zip(batch, said.texts, strict=True))
        result.append({"layers": layers, "right": right, "exact_match": right / len(wanted)})
    return result
