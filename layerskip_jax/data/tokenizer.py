"""A byte-level BPE of the corpus, or a tokenizer that already exists."""

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from layerskip_jax.schema import UserError

END_TOKEN = "<|endoftext|>"
# What published tokenizers call the end of a document, the most specific first.
END_TOKENS = (END_TOKEN, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
SMALLEST_VOCABULARY = 257  # every byte, and the end token
# A long text takes a tokenizer more than its share of time and memory: one of 16 MB as long as ten
# of 2 MB, and near a hundred bytes a character.
PART_CHARACTERS = 1 << 20
CONTEXT_CHARACTERS = 200  # that are looked at on either side of a place to cut
TRIED_PLACES = 1000  # before a text is given up as one that cannot be cut
_LINE_BEGINS = re.compile(r"(?<=\S)\n(?=[^\W\d_])")
_WORD_BEGINS = re.compile(r"(?<=\S) (?=[^\W\d_])")
# Encoded in one go: the tokenizer's own results take many times a text's memory until they are
# ids.
ENCODED_CHARACTERS = 4 << 20


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


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Int32[np.ndarray, "tokens"]]:
    """Returns the ids of each text, without what the tokenizer puts around a text.

    A text that is longer than `PART_CHARACTERS` is encoded in parts, cut where its ids do not
    change; see `cut_text`.
    """
    found: list[list[np.ndarray]] = [[] for _ in texts]
    waiting: list[tuple[int, str]] = []
    characters = 0

    def encode() -> None:
        parts = [part for _, part in waiting]
        encodings = tokenizer.encode_batch_fast(parts, add_special_tokens=False)
        for (number, _), encoding in zip(waiting, encodings, strict=True):
            ids = encoding.ids
            found[number].append(np.fromiter(ids, np.int32, len(ids)))
        waiting.clear()

    for number, text in enumerate(texts):
        for part in cut_text(tokenizer, text):
            waiting.append((number, part))
            characters += len(part)
            if characters >= ENCODED_CHARACTERS:
                encode()
                characters = 0
    encode()
    return [parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in found]


def cut_text(tokenizer: Tokenizer, text: str) -> Iterator[str]:
    """Yields the parts of a long text whose ids, one after the other, are those of the whole.

    A tokenizer parts a text into words before it looks for tokens in each, and a text is cut where
    a word begins: at a letter after a single newline, else at a single space before a letter.
    Both are looked at twice. The tokenizer must have a boundary of words there when it comes from
    the last cut, as it would in the whole, and what is around the place must have the same ids in
    two parts as in one. Where it has no words, as Llama 2's, or there is no such place, the rest of
    the text stays whole.
    """
    start = 0
    while len(text) - start > PART_CHARACTERS:
        at = _place_to_cut(tokenizer, text, start)
        if at is None:
            break
        yield text[start:at]
        start = at
    yield text[start:]


def _place_to_cut(tokenizer: Tokenizer, text: str, start: int) -> int | None:
    """Returns the first place to cut that is `PART_CHARACTERS` after a cut or later."""
    if tokenizer.pre_tokenizer is None:
        return None
    first = start + PART_CHARACTERS
    # Newlines first: nothing that a tokenizer knows goes across one and on with a letter.
    places = itertools.chain(
        (match.end() for match in _tried(_LINE_BEGINS, text, first - 1, first + PART_CHARACTERS)),
        (match.start() for match in _tried(_WORD_BEGINS, text, first, len(text))),
    )
    return next((at for at in places if _is_boundary(tokenizer, text, start, at)), None)


def _tried(pattern: re.Pattern, text: str, begin: int, end: int) -> Iterator[re.Match]:
    return itertools.islice(pattern.finditer(text, begin, end), TRIED_PLACES)


def _is_boundary(tokenizer: Tokenizer, text: str, start: int, at: int) -> bool:
    """Returns whether a place is one to cut, after a cut at `start`."""
    begin = max(at - CONTEXT_CHARACTERS, start)
    before, after = text[begin:at], text[at : at + CONTEXT_CHARACTERS]
    if not _begins_word(tokenizer, before + after, len(before)):
        return False
    whole, first, second = tokenizer.encode_batch(
        [before + after, before, after], add_special_tokens=False
    )
    if whole.ids != first.ids + second.ids:
        return False
    return begin == start or _begins_word(tokenizer, text[start:at] + after, at - start)


def _begins_word(tokenizer: Tokenizer, text: str, at: int) -> bool:
    words = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return any(begin == at for _, (begin, _) in words)
