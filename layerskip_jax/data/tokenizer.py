"""A byte-level BPE of the corpus, or a tokenizer that already exists."""

import hashlib
import itertools
import string
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
    parts = [cut_text(tokenizer, text) for text in texts]
    encodings = iter(
        tokenizer.encode_batch_fast(
            list(itertools.chain.from_iterable(parts)), add_special_tokens=False
        )
    )
    ids = (np.fromiter(found := encoding.ids, np.int32, len(found)) for encoding in encodings)
    return [
        next(ids) if len(some) == 1 else np.concatenate([next(ids) for _ in some]) for some in parts
    ]


def cut_text(tokenizer: Tokenizer, text: str) -> list[str]:
    """Returns the parts of a long text whose ids, one after the other, are those of the whole.

    A tokenizer parts a text into words before it looks for tokens in each. A text is cut between a
    single newline and an ASCII letter, with no space before the newline, and only where the
    tokenizer has a boundary of words there and gives what is around it the same ids in two parts
    as in one. Where it has no words, as SentencePiece's, or no such place, the text stays whole.
    """
    result, start = [], 0
    while len(text) - start > PART_CHARACTERS:
        at = _place_to_cut(tokenizer, text, start + PART_CHARACTERS)
        if at is None:
            break
        result.append(text[start:at])
        start = at
    return [*result, text[start:]]


def _place_to_cut(tokenizer: Tokenizer, text: str, start: int) -> int | None:
    if tokenizer.pre_tokenizer is None:
        return None
    tries, at = 0, start
    while tries < 1000:
        at = text.find("\n", at, min(len(text) - 1, start + PART_CHARACTERS)) + 1
        if at == 0:
            return None
        if text[at] in string.ascii_letters and at > 1 and not text[at - 2].isspace():
            tries += 1
            if _is_boundary(tokenizer, text, at):
                return at
    return None


def _is_boundary(tokenizer: Tokenizer, text: str, at: int) -> bool:
    before = text[max(at - CONTEXT_CHARACTERS, 0) : at]
    after = text[at : at + CONTEXT_CHARACTERS]
    whole, first, second = tokenizer.encode_batch(
        [before + after, before, after], add_special_tokens=False
    )
    if whole.ids != first.ids + second.ids:
        return False
    words = tokenizer.pre_tokenizer.pre_tokenize_str(before + after)
    return any(begin == len(before) for _, (begin, _) in words)
