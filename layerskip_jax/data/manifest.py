"""What a prepared folder says of itself, and the checks of what lies in it."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

from layerskip_jax.data.tokenizer import SMALLEST_VOCABULARY, file_sha256
from layerskip_jax.run_folder.atomic import remedy, require_text_name
from layerskip_jax.run_folder.object_store import require_local
from layerskip_jax.schema import UserError, build, require, require_count

FORMAT = 1
STANDARD_LIBRARY = "stdlib"
MANIFEST_FILE, TOKENIZER_FILE = "manifest.json", "tokenizer.json"
_SET_NAME = re.compile(r"[a-z][a-z0-9_]*")
_AGAIN = "prepare the data again (`layerskip prepare --overwrite`)"


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    """What `layerskip prepare` takes; equal options give equal data.

    The command line is made from these entries.

    Attributes:
      sources: a text, folder, glob or data set to read; may be repeated.
      sequence_length: inputs per window.
      vocab_size: size of the tokenizer to train; 0 with an existing one.
      tokenizer_sha256: of the existing tokenizer, or "".
      end_token: the tokenizer's token that ends a document, if not a usual one.
      validation_fraction: share of the documents held out.
      max_bytes: UTF-8 bytes of text to take at most, as whole documents drawn by the seed; 0 is
        no limit.
      jsonl_field: field of a line of .jsonl or .json that holds the text.
      text_field: column of a table, or field of a TFDS example, that holds the text.
      prompt_field: field of a line or row that holds a prompt; with --completion-field, and no
        plain text then.
      completion_field: field that holds what is to be learned after the prompt.
      messages_field: field of a line or row that holds a chat, whose assistant's turns are
        learned; written by the chat template of the --tokenizer's folder.
      chat_template_sha256: of that template and its special tokens, or "".
      skip_bad_files: leave out what is damaged, not UTF-8 text, too long or lacks such a field,
        instead of failing.
      seed: of the split, and of the draw by --max-bytes.
      min_characters: leave out shorter documents.
      max_characters: leave out longer documents; 0 is no limit.
      requires: FIELD=VALUE that a line or row must have; may be repeated.
      deduplicate: leave out documents whose text came before, to the letter.
      held_outs: NAME=SOURCE of which all documents are held out, as a validation set of that name;
        may be repeated, for the same name too.
      max_document_bytes: UTF-8 bytes of a document at most; a longer one is bad.
      tokenizer_bytes: text that a new tokenizer is trained on at most, drawn over all sources.
      unit_bytes: about how many bytes of files are prepared in one go, by one worker.
      keep_documents: write the documents too, as a TFDS data set in documents/.
    """

    sources: tuple[str, ...] = (STANDARD_LIBRARY,)
    sequence_length: int = 512
    vocab_size: int = 8192
    tokenizer_sha256: str = ""
    end_token: str = ""
    validation_fraction: float = 0.05
    max_bytes: int = 0
    jsonl_field: str = "text"
    text_field: str = "text"
    prompt_field: str = ""
    completion_field: str = ""
    messages_field: str = ""
    chat_template_sha256: str = ""
    skip_bad_files: bool = False
    seed: int = 0
    min_characters: int = 0
    max_characters: int = 0
    requires: tuple[str, ...] = ()
    deduplicate: bool = False
    held_outs: tuple[str, ...] = ()
    max_document_bytes: int = 64 << 20
    tokenizer_bytes: int = 100_000_000
    unit_bytes: int = 32 << 20
    keep_documents: bool = False

    def __post_init__(self):
        if len(set(self.sources)) < len(self.sources):
            raise UserError(
                f"--source: {', '.join(self.sources)} names a source twice; name it once"
            )
        length, fraction, size = self.sequence_length, self.validation_fraction, self.vocab_size
        require(length >= 2, f"--sequence-length={length} must be at least 2")
        require(0 < fraction < 1, f"--validation-fraction={fraction} must be between 0 and 1")
        require(self.max_bytes >= 0, f"--max-bytes={self.max_bytes} must not be negative")
        require(
            size >= SMALLEST_VOCABULARY or bool(self.tokenizer_sha256),
            f"--vocab-size={size} is too small: the bytes and the end token alone take "
            f"{SMALLEST_VOCABULARY}",
        )
        self._check_fields()
        self._check_filters()

    def _check_filters(self) -> None:
        require_count("--min-characters", self.min_characters, 0)
        require_count("--max-characters", self.max_characters, 0)
        require(
            not 0 < self.max_characters < self.min_characters,
            f"--max-characters={self.max_characters} is less than "
            f"--min-characters={self.min_characters}, so no document is left; raise it",
        )
        for name, value, least in (
            ("max-document-bytes", self.max_document_bytes, 1),
            ("tokenizer-bytes", self.tokenizer_bytes, 1),
            ("unit-bytes", self.unit_bytes, 1),
        ):
            require_count(f"--{name}", value, least)
        for rule in self.requires:
            field, equals, _ = rule.partition("=")
            require(
                bool(field and equals),
                f"--require={rule} must be FIELD=VALUE, such as language=en",
            )
        for rule in self.held_outs:
            name, equals, source = rule.partition("=")
            require(
                bool(_SET_NAME.fullmatch(name) and equals and source)
                and name not in ("train", "validation"),
                f"--held-out={rule} must be NAME=SOURCE, the name of small letters, digits and _, "
                "and not train or validation",
            )
            require(
                source not in self.sources,
                f"--held-out={rule} is a --source too; hold it out or train on it",
            )

    def _check_fields(self) -> None:
        prompt, completion, messages = (
            self.prompt_field, self.completion_field, self.messages_field,
        )  # fmt: skip
        require(
            bool(prompt) == bool(completion),
            f"--prompt-field={prompt!r} and --completion-field={completion!r} belong together; "
            "give both, or none for plain text",
        )
        require(
            not (prompt and messages),
            f"--messages-field={messages!r} takes the place of --prompt-field={prompt!r} and "
            f"--completion-field={completion!r}; give one or the other",
        )
        require(
            prompt == "" or prompt != completion,
            f"--prompt-field and --completion-field are both {prompt!r}; name two fields",
        )
        require(
            not self.needs_fields or STANDARD_LIBRARY not in self.sources,
            f"--source={STANDARD_LIBRARY} is plain text and has no fields; name files "
            "that have them",
        )
        require(
            messages == "" or self.chat_template_sha256 != "",
            f"--messages-field={messages!r} needs a chat template; name a model's folder that has "
            "one with --tokenizer",
        )

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields with what is to be learned, where documents are not plain text."""
        named = (self.prompt_field, self.completion_field, self.messages_field)
        return tuple(field for field in named if field)

    @property
    def has_completions(self) -> bool:
        """Whether only completions are learned, and documents stay whole."""
        return bool(self.fields)

    @property
    def needs_fields(self) -> bool:
        """Whether plain text will not do, which has no fields."""
        return self.has_completions or bool(self.requires)


@dataclasses.dataclass(frozen=True)
class Shard:
    """An ArrayRecord file of windows.

    Attributes:
      name: file name within the folder.
      windows: records in it.
      bytes: size of the file.
      sha256: of the file.
      unit: the number of the unit that it is of.
    """

    name: str
    windows: int
    bytes: int
    sha256: str
    unit: int = 0


@dataclasses.dataclass(frozen=True)
class Split:
    """Counts of one split.

    Of text that is cut into windows, the shards of a unit go on with one another, and the first of
    the next unit begins with a document.

    Attributes:
      documents: documents that are not blank; where they stay whole, those that fit a window.
      bytes: length of their UTF-8 text.
      tokens: with one end token a document, and those that the tokenizer begins it with.
      windows: packed windows.
      shards: the files they are in.
      over_long: documents left out since they are longer than a window.
      targets: tokens of completions, end tokens included; -1 of plain text, which is all learned.
    """

    documents: int
    bytes: int
    tokens: int
    windows: int
    shards: tuple[Shard, ...]
    over_long: int = 0
    targets: int = -1

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text a token stands for, on average."""
        return self.bytes / self.tokens

    @property
    def unit_starts(self) -> set[int]:
        """The numbers of the windows that begin with a document, as the first of a unit."""
        starts, number, last = set(), 0, None
        for shard in self.shards:
            if shard.unit != last:
                starts.add(number)
            number, last = number + shard.windows, shard.unit
        return starts

    def filled(self, sequence_length: int) -> float:
        """Returns the share of its windows' tokens that are no padding, of whole documents."""
        return self.tokens / max(self.windows * (sequence_length + 1), 1)


@dataclasses.dataclass(frozen=True)
class NamedSplit:
    """A set that is held out under a name of its own.

    Attributes:
      name: of the set.
      split: its counts.
    """

    name: str
    split: Split


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
      skipped_files: files, lines and examples left out because they hold no UTF-8 text.
      largest_token: the largest id in the windows of either split; -1 where it was not counted.
      unigram_entropy_nats: entropy of the frequencies of the validation set's own tokens, where
        only completions are learned of those, in nats a token.
        No model that ignores the context has a lower validation loss.
      fingerprint: SHA-256 that identifies the windows and the tokenizer.
      held_out: sets that are held out by name, beside the validation split.
      filtered: documents that filters left out.
      duplicates: documents that were left out as copies of others, or since the limit of bytes was
        reached.
      failed_units: what could not be read, and was left out.
    """

    format: int
    request: PrepareOptions
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
    largest_token: int = -1
    held_out: tuple[NamedSplit, ...] = ()
    filtered: int = 0
    duplicates: int = 0
    failed_units: tuple[str, ...] = ()

    def check_tokens(self, vocab_size: int, folder: str | Path) -> None:
        """Checks that a model has a row for every token of the windows in `folder`.

        Its tokenizer may have more tokens than the model, as long as no text yielded one.

        Raises:
          UserError: a window holds a token beyond the model's.
        """
        largest = self.vocab_size - 1 if self.largest_token < 0 else self.largest_token
        if largest >= vocab_size:
            raise UserError(
                f"{folder} holds the token {largest}, and the model has {vocab_size} tokens; "
                "prepare it from texts without that token, or with a tokenizer of the model's size"
            )

    def split(self, name: str) -> Split:
        """Returns the counts of `train`, `validation` or a set that is held out by name."""
        return self.splits[name]

    @property
    def splits(self) -> dict[str, Split]:
        """All splits by their names."""
        named = {one.name: one.split for one in self.held_out}
        return {"train": self.train, "validation": self.validation, **named}


def fingerprint(tokenizer_sha256: str, *splits: Split) -> str:
    """Returns a hash of the tokenizer and of every shard."""
    parts = [tokenizer_sha256, *(shard.sha256 for split in splits for shard in split.shards)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def parse_manifest(text: str, name: str) -> Manifest:
    """Returns what the text of a manifest says.

    Args:
      text: of the file.
      name: of the file, for messages.

    Raises:
      UserError: it is of another version, or damaged.
    """
    try:
        values = json.loads(text)
        if (version := values["format"]) != FORMAT:
            raise UserError(
                f"{name} has format {version}, and this version reads {FORMAT}; {_AGAIN}"
            )
        return build(Manifest, values, name)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{name} is damaged ({error}); {_AGAIN}") from error


def read_manifest(folder: str | Path) -> Manifest:
    """Reads and checks the manifest of a prepared folder.

    Raises:
      UserError: there is none, it is of another version, the tokenizer beside it is not the
        one it was prepared with, or a shard is missing or of another size.
    """
    require_local(folder, "prepared data (config.data.path, config.data.mixture or --data)")
    path = Path(folder) / MANIFEST_FILE
    require_text_name(path.absolute())
    if not str(folder):
        raise UserError(
            "config.data.path='' holds no prepared data; name some, or run `layerskip prepare "
            "--output=FOLDER` first"
        )
    if not path.is_file():
        raise UserError(
            f"{folder} holds no prepared data ({MANIFEST_FILE} is missing); if the data was moved, "
            "say where it is (--config.data.path of `train`, --data of `evaluate` and `sweep`), "
            "and if there is none yet, run `layerskip prepare --output=FOLDER`"
        )
    try:
        manifest = parse_manifest(path.read_text(), str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}){remedy(error)}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged ({error}); {_AGAIN}") from error
    tokenizer = path.with_name(TOKENIZER_FILE)
    actual = file_sha256(tokenizer) if tokenizer.is_file() else "none"
    if actual != manifest.tokenizer_sha256:
        raise UserError(
            f"{tokenizer} (sha256 {actual[:12]}) is not the tokenizer that {folder} was prepared "
            f"with ({manifest.tokenizer_sha256[:12]}); put that one back, or {_AGAIN}"
        )
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        file = path.with_name(shard.name)
        if not file.is_file():
            raise UserError(f"{file} is missing; {_AGAIN}")
        if (size := file.stat().st_size) != shard.bytes:
            raise UserError(f"{file} has {size} bytes, not the {shard.bytes} written; {_AGAIN}")
    return manifest
