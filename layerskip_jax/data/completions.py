"""Prompts with completions: of a record's fields a text with marked parts, of a text's ids targets.

Only completions are learned, and the end token after each document's last one. At inference a model
sees the ids that `generate` makes of a prompt, so these are what stands before a completion here,
however the tokenizer would cut prompt and completion in one.

A chat is written by its model's template. It is one document, and each turn of the assistant a
completion in it, as long as the template writes each turn after what it wrote of those before.
Where it writes those otherwise once more follows, as templates that leave out earlier thoughts do,
the turn begins a document of its own: that is what a model is asked with.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from layerskip_jax.data.manifest import PrepareOptions
from layerskip_jax.data.packing import Completed
from layerskip_jax.schema import ConfigError, is_text

# Makes of a chat's messages what comes before each turn of the assistant, and the turn.
ChatTurns = Callable[[Sequence[Mapping[str, Any]]], list[tuple[str, str]]]
# Where each completion begins and ends in a text, in characters.
Spans = tuple[tuple[int, int], ...]


class BadRecordError(Exception):
    """Says what a record lacks, as the end of a sentence about it."""


def marked_texts(
    record: object, options: PrepareOptions, chat_turns: ChatTurns | None
) -> list[tuple[str, Spans]]:
    """Returns the texts of a record, with the completions in each.

    Args:
      record: what a line or an example holds.
      options: which fields to read.
      chat_turns: the chat template, for `messages_field`.

    Raises:
      BadRecordError: a field is missing, or holds nothing to learn.
    """
    if not isinstance(record, Mapping):
        raise BadRecordError("is no JSON object")
    if options.messages_field:
        turns = _turns(record, options.messages_field, chat_turns)
    else:
        turns = [
            (_text_of(record, options.prompt_field), _text_of(record, options.completion_field))
        ]
    texts: list[tuple[str, Spans]] = []
    for prompt, completion in turns:
        text, spans = prompt + completion, ()
        if texts and prompt.startswith(texts[-1][0]):
            _, spans = texts.pop()
        texts.append((text, (*spans, (len(prompt), len(text)))))
    return texts


def _turns(record: Mapping[str, Any], field: str, chat_turns: ChatTurns) -> list[tuple[str, str]]:
    messages = _field_of(record, field)
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        raise BadRecordError(
            f"has no list of messages in its field {field!r}, each an object with role and content"
        )
    try:
        turns = chat_turns(messages)
    except ConfigError as error:
        raise BadRecordError(f"has no chat in its field {field!r}: {error}") from error
    if not turns:
        raise BadRecordError(
            f"has no turn of the assistant after another's in its field {field!r}, so there is "
            "nothing to learn"
        )
    if not all(is_text(text) for turn in turns for text in turn):
        raise BadRecordError(f"has messages in its field {field!r} that are no text")
    return turns


def _field_of(record: Mapping[str, Any], field: str) -> Any:
    if field not in record:
        fields = ", ".join(map(repr, sorted(map(str, record)))) or "none"
        raise BadRecordError(f"has no field {field!r} (its fields: {fields})")
    return record[field]


def _text_of(record: Mapping[str, Any], field: str) -> str:
    text = _field_of(record, field)
    if not is_text(text):
        raise BadRecordError(f"has {text!r} in its field {field!r}, which is no text")
    if not text.strip():
        raise BadRecordError(f"has no text in its field {field!r}")
    return text


def add_completion(documents: list[Completed], prompt: list[int], completion: list[int]) -> None:
    """Goes on with the last document where the prompt does, and else begins one with it."""
    before = Completed(np.zeros(0, np.int32), np.zeros(0, bool))
    if documents and documents[-1].tokens.tolist() == prompt[: len(documents[-1].tokens)]:
        before = documents.pop()
    between = len(prompt) - len(before.tokens)
    is_target = np.repeat([False, True], [between, len(completion)])
    documents.append(
        Completed(
            np.array(prompt + completion, np.int32),
            np.concatenate([before.is_target, is_target]),
        )
    )


def ended(document: Completed, tokenizer: Tokenizer, end_token_id: int) -> Completed:
    """Returns it with its end token, which a template may have written already."""
    tokens, is_target = document
    ends = np.flatnonzero(is_target & (tokens == end_token_id))
    if len(ends) and not tokenizer.decode(tokens[ends[-1] + 1 :].tolist()).strip():
        stop = ends[-1] + 1
        return Completed(tokens[:stop], is_target[:stop])
    return Completed(np.append(tokens, np.int32(end_token_id)), np.append(is_target, True))
