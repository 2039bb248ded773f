"""What a prepared folder says of itself, and the checks of what lies in it."""

import dataclasses
import hashlib
import json
from pathlib import Path

from layerskip_jax.data.tokenizer import file_sha256
from layerskip_jax.schema import ConfigError, UserError, build

FORMAT = 1
MANIFEST_FILE, TOKENIZER_FILE = "manifest.json", "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Request:
    """What `layerskip prepare` was asked for; equal requests give equal data.

    Attributes:
      sources: as given by --source.
      sequence_length: S, inputs per window.
      vocab_size: of the tokenizer to train; 0 with an existing one.
      tokenizer_sha256: of the existing tokenizer, or "".
      end_token: as given, or "".
      validation_fraction: share of the documents held out.
      text_field: field of jsonl lines and TFDS examples.
      skip_bad_files: whether files that are not UTF-8 are left out.
      seed: of the split.
    """

    sources: tuple[str, ...]
    sequence_length: int
    vocab_size: int
    tokenizer_sha256: str
    end_token: str
    validation_fraction: float
    text_field: str
    skip_bad_files: bool
    seed: int


@dataclasses.dataclass(frozen=True)
class Shard:
    """An ArrayRecord file of windows.

    Attributes:
      name: file name within the folder.
      windows: records in it.
      sha256: of the file.
    """

    name: str
    windows: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Split:
    """Counts of one split.

    Attributes:
      documents: documents that are not empty.
      bytes: of their UTF-8 text.
      tokens: with one end token a document.
      windows: packed windows.
      shards: the files they are in.
    """

    documents: int
    bytes: int
    tokens: int
    windows: int
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Describes prepared data.

    Attributes:
      format: version of the layout.
      request: what was asked for.
      sequence_length: S.
      vocab_size: V, ids of the tokenizer.
      tokenizer_sha256: of tokenizer.json.
      end_token: the token that ends a document.
      end_token_id: its id.
      train: counts of the training split.
      validation: counts of the held-out documents.
      skipped_files: files left out because they are not UTF-8.
      unigram_entropy_nats: cross-entropy of the validation tokens under the training split's
        own unigram frequencies, nats a token: the loss of a model that ignores all context.
      fingerprint: identifies the windows and the tokenizer.
    """

    format: int
    request: Request
    sequence_length: int
    vocab_size: int
    tokenizer_sha256: str
    end_token: str
    end_token_id: int
    train: Split
    validation: Split
    skipped_files: int
    unigram_entropy_nats: float
    fingerprint: str

    def split(self, name: str) -> Split:
        """Returns the counts of `train` or `validation`."""
        return {"train": self.train, "validation": self.validation}[name]


def fingerprint(tokenizer_sha256: str, *splits: Split) -> str:
    """Returns a hash of the tokenizer and of every shard."""
    parts = [tokenizer_sha256, *(shard.sha256 for split in splits for shard in split.shards)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def read_manifest(folder: str | Path) -> Manifest:
    """Reads and checks the manifest of a prepared folder.

    Raises:
      UserError: there is none, it is of another version, the tokenizer beside it is not the
        one it was prepared with, or a shard is missing.
    """
    path = Path(folder) / MANIFEST_FILE
    if not str(folder) or not path.is_file():
        raise UserError(
            f"config.data.path={str(folder)!r} holds no prepared data ({MANIFEST_FILE} is "
            "missing); make it with `layerskip prepare --output=FOLDER`"
        )
    values = json.loads(path.read_text())
    if values.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {values.get('format')}, and this version reads {FORMAT}; "
            "prepare the data again"
        )
    try:
        manifest = build(Manifest, values, str(path))
    except (ConfigError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); prepare the data again") from error
    tokenizer = path.with_name(TOKENIZER_FILE)
    actual = file_sha256(tokenizer) if tokenizer.is_file() else "none"
    if actual != manifest.tokenizer_sha256:
        raise UserError(
            f"{tokenizer} (sha256 {actual[:12]}) is not the tokenizer that {folder} was prepared "
            f"with ({manifest.tokenizer_sha256[:12]}); put that one back, or prepare again"
        )
    for shard in (*manifest.train.shards, *manifest.validation.shards):
        if not path.with_name(shard.name).is_file():
            raise UserError(f"{path.with_name(shard.name)} is missing; prepare the data again")
    return manifest
