"""A byte-level BPE of the corpus, or a tokenizer that already exists."""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32
from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, trainers

from layerskip_jax.schema import UserError

END_TOKEN = "<|endoftext|>"
# What published tokenizers call the end of a document, the most specific first.
END_TOKENS = (END_TOKEN, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
SMALLEST_VOCABULARY = 257  # every byte, and the end token
# What a tokenizer works on is many times the text, and it is faster where that stays in a
# processor's cache: at a time it gets parts of texts, and of these so many.
PART_CHARACTERS, GROUP_CHARACTERS = 1 << 13, 1 << 18
CONTEXT_CHARACTERS = 100  # that are looked at after a place to cut, and fewer before it
_LINE_BEGINS = re.compile(r"(?<=\S)\n(?=[^\W\d_])")
_WORD_BEGINS = re.compile(r"(?<=\S) (?=[^\W\d_])")


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE, which loses no byte of any text and knows no unknown token.

    Args:
      texts: to train on.
      vocab_size: V, at least `SMALLEST_VOCABULARY`; less text may fill less of it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads a `tokenizer.json`, made to encode whole documents as nothing but text.

    It neither truncates nor pads, and a special token spelled out in a document is text
    there, not the token: a page about `<|endoftext|>` does not end in the middle.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path} is no tokenizer.json that can be read ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Returns V, one more than the largest id; published vocabularies may leave ids out."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def end_token_of(tokenizer: Tokenizer, wanted: str | None) -> tuple[str, int]:
    """Returns the token that ends a document, and its id.

    Raises:
      UserError: the vocabulary does not have it.
    """
    for token in [wanted] if wanted else END_TOKENS:
        if (token_id := tokenizer.token_to_id(token)) is not None:
            return token, token_id
    raise UserError(
        f"the tokenizer has no end token {wanted or ', '.join(END_TOKENS)}; name one of its "
        "tokens with --end-token"
    )


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Part(NamedTuple):
    """A part of a text.

    Attributes:
      number: of the text.
      begin: its first character.
      end: the one after its last.
      after: the ids of the few characters that follow it, none at the text's end.
      known: those of them that do not depend on what comes after these characters.
    """

    number: int
    begin: int
    end: int
    after: list[int]
    known: int


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Int32[np.ndarray, "tokens"]]:
    """Returns the ids of each text, without what the tokenizer puts around a text."""
    found: list[list[np.ndarray]] = [[] for _ in texts]
    for part, ids in encode_parts(tokenizer, texts):
        found[part.number].append(ids)
    return [ids[0] if len(ids) == 1 else np.concatenate(ids) for ids in found]


def encode_parts(
    tokenizer: Tokenizer, texts: Sequence[str]
) -> Iterator[tuple[Part, Int32[np.ndarray, "tokens"]]]:
    """Yields the parts of texts with their ids, which one after the other are those of the whole.

    A tokenizer parts a text into words before it looks for tokens in each, and a text is cut where
    a word begins: at a letter after a single newline, else at a single space before a letter. The
    few characters that follow a place have to have the same ids alone, with some before them, at
    the end of the part before and at the beginning of the part after, or what is left of the text
    stays whole; so it does where a tokenizer has no words, as Llama 2's.
    """
    held: tuple[Part, list[int]] | None = None  # a part of which the end is to be confirmed
    whole = -1  # the text that is no longer cut
    for group in _groups(_parts(tokenizer, texts)):
        given = [texts[p.number][p.begin : p.end + CONTEXT_CHARACTERS] for p in group]
        encodings = tokenizer.encode_batch_fast(given, add_special_tokens=False)
        for part, encoding in zip(group, encodings, strict=True):
            if part.number == whole:
                continue
            ids = encoding.ids
            if held is not None:
                before, ids_before = held
                if before.number == part.number and not _goes_on(before, ids_before, ids):
                    whole, text = part.number, texts[part.number]
                    part = Part(whole, before.begin, len(text), [], 0)
                    rest = [text[part.begin :]]
                    ids = tokenizer.encode_batch_fast(rest, add_special_tokens=False)[0].ids
                else:
                    yield before, _without_after(before, ids_before)
            held = part, ids
    if held is not None:
        yield held[0], _without_after(*held)


def _goes_on(part: Part, ids: list[int], ids_after: list[int]) -> bool:
    """Returns whether a part ends, and the next one begins, as they do in the whole."""
    known = part.known
    return (
        ids[len(ids) - len(part.after) :] == part.after and ids_after[:known] == part.after[:known]
    )


def _without_after(part: Part, ids: list[int]) -> Int32[np.ndarray, "tokens"]:
    count = len(ids) - len(part.after)
    return np.fromiter(ids, np.int32, count)


def _groups(parts: Iterable[Part]) -> Iterator[list[Part]]:
    group, characters = [], 0
    for part in parts:
        group.append(part)
        characters += part.end - part.begin
        if characters >= GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _parts(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[Part]:
    has_words = tokenizer.pre_tokenizer is not None
    for number, text in enumerate(texts):
        begin = 0
        while has_words and len(text) - begin > PART_CHARACTERS:
            # A try takes little of a part's time, so all of them take little of the text's.
            tries = (len(text) - begin) // PART_CHARACTERS
            for at in _places_to_cut(text, begin, tries):
                if found := _ids_after(tokenizer, text, at):
                    yield Part(number, begin, at, *found)
                    begin = at
                    break
            else:
                break
        yield Part(number, begin, len(text), [], 0)


def _places_to_cut(text: str, begin: int, tries: int) -> Iterator[int]:
    """Yields places that look like some to cut, `PART_CHARACTERS` after `begin` or later."""
    first = begin + PART_CHARACTERS
    # Newlines first: nothing that a tokenizer knows goes across one and on with a letter.
    lines = _LINE_BEGINS.finditer(text, first - 1, first + PART_CHARACTERS)
    words = _WORD_BEGINS.finditer(text, first)
    yield from (match.end() for match in itertools.islice(lines, tries))
    yield from (match.start() for match in itertools.islice(words, tries))


def _ids_after(tokenizer: Tokenizer, text: str, at: int) -> tuple[list[int], int] | None:
    """Returns what `Part` has of a place, None where no word begins there."""
    begin, end = max(at - CONTEXT_CHARACTERS // 8, 0), at + CONTEXT_CHARACTERS
    encoding = tokenizer.encode(text[begin:end], add_special_tokens=False)
    first = _tokens_before(encoding, at - begin, text[at] == " ")
    if first is None:
        return None
    after = encoding.ids[first:]
    if tokenizer.encode(text[at:end], add_special_tokens=False).ids != after:
        return None  # as where a space is put before a text
    if end >= len(text):
        return after, len(after)
    # The last word may go on.
    word = encoding.token_to_word(len(encoding) - 1)
    known = 0 if word is None else encoding.word_to_tokens(word)[0] - first
    return (after, known) if known > 0 else None


def _tokens_before(encoding: Encoding, at: int, is_space: bool) -> int | None:
    """Returns the tokens before a character that begins a word; None where it does not.

    Some tokenizers do not count the space before a word to it when they say where it is.
    """
    token = encoding.char_to_token(at + is_space)
    word = None if token is None else encoding.token_to_word(token)
    if word is None:
        return None
    first, _ = encoding.word_to_tokens(word)
    begin, _ = encoding.token_to_chars(first)
    is_counted = encoding.char_to_token(at) is not None
    return first if begin == (at if is_counted else at + is_space) else None
