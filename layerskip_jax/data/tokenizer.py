"""A byte-level BPE of the corpus, or a tokenizer that already exists."""

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32
from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, trainers

from layerskip_jax.schema import UserError

END_TOKEN = "<|endoftext|>"
# What published tokenizers call the end of a document, the most specific first.
END_TOKENS = (END_TOKEN, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
SMALLEST_VOCABULARY = 257  # every byte, and the end token
# A long text takes a tokenizer more than its share of time and memory: one of 16 MB as long as ten
# of 2 MB, and near a hundred bytes a character.
PART_CHARACTERS = 1 << 20
CONTEXT_CHARACTERS = 200  # that are looked at on either side of a place to cut
# Before a text is given up as one that cannot be cut, by a look around, and by a whole part.
TRIED_PLACES, TRIED_PARTS = 1000, 5
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


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Int32[np.ndarray, "tokens"]]:
    """Returns the ids of each text, without what the tokenizer puts around a text.

    A text that is longer than `PART_CHARACTERS` is encoded in parts, one at a time.
    """
    short = [text for text in texts if len(text) <= PART_CHARACTERS]
    encodings = iter(tokenizer.encode_batch_fast(short, add_special_tokens=False))
    return [
        np.fromiter(found := next(encodings).ids, np.int32, len(found))
        if len(text) <= PART_CHARACTERS
        else np.concatenate([ids for _, ids in encode_parts(tokenizer, text)])
        for text in texts
    ]


def encode_parts(
    tokenizer: Tokenizer, text: str
) -> Iterator[tuple[str, Int32[np.ndarray, "tokens"]]]:
    """Yields the parts of a text and their ids, which one after the other are those of the whole.

    A tokenizer parts a text into words before it looks for tokens in each, and a text is cut where
    a word begins: at a letter after a single newline, else at a single space before a letter. It
    has to begin there for a tokenizer that comes from the last cut, as it does in the whole, and
    what is around the place must have the same ids in two parts as in one. Where a tokenizer has no
    words, as Llama 2's, or there is no such place, the rest of the text stays whole.
    """
    start = 0
    while len(text) - start > PART_CHARACTERS:
        for at in itertools.islice(_places_to_cut(tokenizer, text, start), TRIED_PARTS):
            # With what follows, on which a word may depend.
            encoding = tokenizer.encode(
                text[start : at + CONTEXT_CHARACTERS], add_special_tokens=False
            )
            if (count := _tokens_before(encoding, at - start, text[at] == " ")) is not None:
                yield text[start:at], np.array(encoding.ids[:count], np.int32)
                start = at
                break
        else:
            break
    rest = tokenizer.encode_batch_fast([text[start:]], add_special_tokens=False)[0]
    yield text[start:], np.array(rest.ids, np.int32)


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


def _places_to_cut(tokenizer: Tokenizer, text: str, start: int) -> Iterator[int]:
    """Yields places that look like some to cut, `PART_CHARACTERS` after a cut or later."""
    if tokenizer.pre_tokenizer is None:
        return
    first = start + PART_CHARACTERS
    # Newlines first: nothing that a tokenizer knows goes across one and on with a letter.
    lines = _LINE_BEGINS.finditer(text, first - 1, first + PART_CHARACTERS)
    words = _WORD_BEGINS.finditer(text, first)
    for at in itertools.chain(
        (match.end() for match in itertools.islice(lines, TRIED_PLACES)),
        (match.start() for match in itertools.islice(words, TRIED_PLACES)),
    ):
        if _is_place_to_cut(tokenizer, text, at):
            yield at


def _is_place_to_cut(tokenizer: Tokenizer, text: str, at: int) -> bool:
    before = text[max(at - CONTEXT_CHARACTERS, 0) : at]
    after = text[at : at + CONTEXT_CHARACTERS]
    words = tokenizer.pre_tokenizer.pre_tokenize_str(before + after)
    if all(begin != len(before) for _, (begin, _) in words):
        return False
    whole, first, second = tokenizer.encode_batch(
        [before + after, before, after], add_special_tokens=False
    )
    return whole.ids == first.ids + second.ids
