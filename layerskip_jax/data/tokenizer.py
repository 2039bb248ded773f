"""A byte-level BPE of the corpus, or a tokenizer that already exists."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from layerskip_jax.schema import UserError

END_TOKEN = "<|endoftext|>"
# What published tokenizers call the end of a document, the most specific first.
END_TOKENS = (END_TOKEN, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
SMALLEST_VOCABULARY = 257  # every byte, and the end token


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
