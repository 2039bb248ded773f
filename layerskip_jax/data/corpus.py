"""Text on disk as a TFDS data set of documents, split by document.

A document is a file, a line of a `.jsonl` file, or an example of a TFDS data set; of prompts with
completions, and of chats, it also says which parts of its text are completions. Reading and writing
need no TensorFlow: TFDS writes ArrayRecord and reads it back as a data source.
"""

import collections
import glob
import hashlib
import itertools
import json
import logging
import sysconfig
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder

from layerskip_jax.data.completions import BadRecordError, ChatTurns, marked_texts
from layerskip_jax.data.manifest import STANDARD_LIBRARY, PrepareOptions
from layerskip_jax.data.shards import read_in_order
from layerskip_jax.run_folder.atomic import remedy
from layerskip_jax.schema import UserError, as_bytes, is_text

SPLITS = ("train", "validation")
TFDS_PREFIX = "tfds:"
_log = logging.getLogger(__name__)
# Tests, generated caches and installed packages are no part of the library's own source.
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Document(NamedTuple):
    """A text and what it is known by.

    Attributes:
      path: relative to its source, with the line or example number. It decides the split, so
        a corpus can be moved, or joined by another, without reshuffling.
      key: the path with the source's number, unique among all.
      text: never blank.
      completions: where each completion begins and ends in the text; none of plain text.
    """

    path: str
    key: str
    text: str
    completions: tuple[tuple[int, int], ...] = ()


class CorpusReader:
    """Reads the documents of several sources, in a fixed order.

    Attributes:
      options: what to read, and how.
      skipped: files, lines and examples left out by the last reading as they hold no text.
    """

    def __init__(self, options: PrepareOptions, chat_turns: ChatTurns | None = None):
        """Takes what `layerskip prepare` takes; nothing is read yet.

        Args:
          options: what to read, and how.
          chat_turns: the chat template, for `messages_field`.
        """
        self.options = options
        self._chat_turns = chat_turns
        # Plain files have no fields.
        self._formats = {
            ending: read
            for ending, read in FORMATS.items()
            if not options.has_completions or read is CorpusReader._json_lines
        }
        self._last_draw: int | None = None
        self.skipped: list[str] = []
        self._told: set[str] = set()

    def __iter__(self) -> Iterator[Document]:
        """Yields every document that is not blank, in the order of the sources and paths.

        Raises:
          UserError: a source that does not exist or matches nothing, a file that two sources
            match, or a file that is not UTF-8 text.
        """
        if not self.options.max_bytes:
            yield from self._documents()
            return
        if self._last_draw is None:
            self._last_draw = self._draw_documents()
        for document in self._documents():
            if self._draw(document) <= self._last_draw:
                yield document

    def _draw(self, document: Document) -> int:
        return seeded_hash(f"take {self.options.seed}", document.key)

    def _draw_documents(self) -> int:
        """Returns the draw of the last document, in order of draws, that the limit has room for.

        A pass over the corpus that keeps two numbers a document.
        """
        sizes = sorted((self._draw(doc), len(doc.text.encode())) for doc in self._documents())
        last, total = -1, 0
        for draw, size in sizes:
            total += size
            if total > self.options.max_bytes:
                break
            last = draw
        if sizes and last < 0:
            raise UserError(
                f"--max-bytes={self.options.max_bytes} has no room for the first document drawn, "
                f"of {sizes[0][1]} bytes; raise it"
            )
        return last

    def _documents(self) -> Iterator[Document]:
        self.skipped = []
        found_by: dict[Path, str] = {}
        for number, source in enumerate(self.options.sources):
            if source.startswith(TFDS_PREFIX):
                for document in self._dataset(source):
                    yield document._replace(key=f"{number}:{document.key}")
                continue
            root, files, others = _files(source, self._formats)
            self._say_left_out(source, others)
            for file in files:
                # Read twice, a text could end up on both sides of the split.
                real = file.resolve()
                other = found_by.get(real)
                if other == source:  # a link to another file of the same source
                    continue
                if other is not None:
                    raise UserError(
                        f"{file} is matched by both --source={other} and --source={source}; "
                        "leave it out of one"
                    )
                found_by[real] = source
                if not is_text(str(file)):
                    name = as_bytes(str(file))
                    self.leave_out(name, f"{name} has a name that is not UTF-8; rename it")
                    continue
                read = self._formats.get(file.suffix.lower(), CorpusReader._file)
                if self.options.has_completions and read is CorpusReader._file:
                    raise UserError(
                        f"{file} is plain text and has no fields; name .jsonl files that have "
                        f"{' and '.join(map(repr, self.options.fields))}"
                    )
                for document in read(self, str(file.relative_to(root)), file):
                    yield document._replace(key=f"{number}:{document.key}")

    def _say_left_out(self, source: str, others: list[Path]) -> None:
        """Says once that a folder has files of other kinds."""
        if not others or source in self._told:
            return
        self._told.add(source)
        kinds = collections.Counter(file.suffix or "no suffix" for file in others).most_common(5)
        _log.warning(
            "--source=%s: %d files are left out (%s); a folder is searched for %s",
            source,
            len(others),
            ", ".join(f"{kind} {count}" for kind, count in kinds),
            ", ".join(self._formats),
        )

    def leave_out(self, name: str, message: str, error: Exception | None = None) -> None:
        """Counts what cannot be read or tokenized, or fails."""
        if not self.options.skip_bad_files:
            raise UserError(f"{message}, or pass --skip-bad-files") from error
        self.skipped.append(name)

    def _file(self, path: str, file: Path) -> Iterator[Document]:
        """Yields the one document of a file; its key is the path still, as in what is below."""
        try:
            text = file.read_bytes().decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            self.leave_out(str(file), _not_utf8(file, error.start, error.reason), error)
        except OSError as error:
            raise _unread(file, error) from error
        else:
            if text.strip():
                yield Document(path, path, text)

    def _json_lines(self, path: str, file: Path) -> Iterator[Document]:
        offset = 0
        try:
            # As bytes, since only b"\n" ends a line there: JSON strings may hold the other
            # characters that Python takes for ends of lines.
            with file.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    name, place = f"{file}:{number}", f"{path}:{number}"
                    if self.options.has_completions:
                        yield from self._json_record(name, place, file, offset, line)
                    elif (text := self._json_text(name, file, offset, line)).strip():
                        yield Document(place, place, text)
                    offset += len(line)
        except OSError as error:
            raise _unread(file, error) from error

    def _json_text(self, name: str, file: Path, offset: int, line: bytes) -> str:
        """Returns the text of a line, empty where there is none."""
        if not line.strip():
            return ""
        try:
            text = json.loads(line.decode("utf-8").removeprefix("\ufeff"))[self.options.jsonl_field]
            text.encode("utf-8")  # JSON can spell half a surrogate pair, which is no text
            return text
        except UnicodeDecodeError as error:
            self.leave_out(name, _not_utf8(file, offset + error.start, error.reason), error)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            self.leave_out(
                name,
                f"{name} is no JSON object with text in its field {self.options.jsonl_field!r} "
                f"({error!r}); name the field with --jsonl-field",
                error,
            )
        return ""

    def _json_record(
        self, name: str, path: str, file: Path, offset: int, line: bytes
    ) -> Iterator[Document]:
        """Yields the documents of a line with fields, none where it is empty or left out."""
        if not line.strip():
            return
        try:
            record = json.loads(line.decode("utf-8").removeprefix("\ufeff"))
            yield from self._record(path, record)
        except UnicodeDecodeError as error:
            self.leave_out(name, _not_utf8(file, offset + error.start, error.reason), error)
        except (ValueError, RecursionError) as error:
            self.leave_out(
                name, f"{name} is no JSON object ({error}); correct it, leave it out", error
            )
        except BadRecordError as error:
            self.leave_out(name, f"{name} {error}; correct it, leave it out", error)

    def _record(self, path: str, record: object) -> Iterator[Document]:
        found = marked_texts(record, self.options, self._chat_turns)
        for number, (text, completions) in enumerate(found):
            yield Document(path, f"{path}#{number}" if number else path, text, completions)

    def _dataset(self, source: str) -> Iterator[Document]:
        folder, _, split = source.removeprefix(TFDS_PREFIX).partition(":")
        split = split or "train"
        try:
            if Path(folder).is_dir():
                builder = tfds.builder_from_directory(folder)
            else:
                # From its files and not its code, which is only needed to make it.
                builder = read_only_builder.builder_from_files(folder)
            builder.as_data_source(split=split)  # which checks the format and the split
        except Exception as error:  # TFDS raises many kinds, all about what was asked for
            raise UserError(
                f"--source={source}: {folder} is no folder or name of a TFDS data set on this "
                f"disk, in array_record format, with the split {split!r} ({error})"
            ) from error
        if self.options.messages_field:
            raise UserError(
                f"--messages-field={self.options.messages_field!r} is of .jsonl files; write the "
                f"chats of --source={source} as such"
            )
        for number, example in enumerate(read_examples(builder, split)):
            path = f"{builder.name}:{split}:{number}"
            if self.options.has_completions:
                yield from self._example(f"--source={source}: example {number}", path, example)
                continue
            if not isinstance(example.get(self.options.text_field), bytes):
                raise UserError(
                    f"--source={source} has no text in a field {self.options.text_field!r}; its "
                    f"fields are {', '.join(sorted(example))}: name one with --text-field"
                )
            try:
                text = example[self.options.text_field].decode("utf-8")
            except UnicodeDecodeError as error:
                self.leave_out(
                    path, f"--source={source}: example {number} is not UTF-8 ({error})", error
                )
                continue
            if text.strip():
                yield Document(path, path, text)

    def _example(self, name: str, path: str, example: Mapping[str, Any]) -> Iterator[Document]:
        """Yields the documents of a TFDS example with fields, none where it is left out."""
        try:
            texts = {
                field: value.decode("utf-8") if isinstance(value, bytes) else value
                for field, value in example.items()
            }
            yield from self._record(path, texts)
        except UnicodeDecodeError as error:
            self.leave_out(path, f"{name} is not UTF-8 ({error})", error)
        except BadRecordError as error:
            self.leave_out(path, f"{name} {error}; correct it, leave it out", error)


# How the files of each ending are read: from the reader, the path of the documents and the file.
FORMATS = {
    **dict.fromkeys((".txt", ".md", ".rst", ".py"), CorpusReader._file),
    ".jsonl": CorpusReader._json_lines,
}


def _unread(file: Path, error: OSError) -> UserError:
    """Returns what the system says of a file, which may hold the best of text."""
    return UserError(f"{file} cannot be read ({error.strerror}){remedy(error) or '; leave it out'}")


def _not_utf8(file: Path, offset: int, reason: str) -> str:
    return f"{file} is not UTF-8 text: {reason} at byte {offset}; convert it, leave it out"


def _files(
    source: str, endings: Collection[str] = tuple(FORMATS)
) -> tuple[Path, list[Path], list[Path]]:
    """Returns the folder that paths are relative to, its files, sorted, and those left out.

    Args:
      source: `stdlib`, or a folder, file or glob.
      endings: of the files that a folder is searched for.
    """
    others: list[Path] = []
    if source == STANDARD_LIBRARY:
        root = Path(sysconfig.get_path("stdlib"))
        files = [
            file
            for file in root.rglob("*.py")
            if not NOT_LIBRARY.intersection(file.relative_to(root).parts[:-1])
        ]
        return root, sorted(files), others
    path = Path(source)
    if path.is_dir():
        # Like a glob, this passes by what is hidden, such as .git or .venv.
        root, found = path, (path / f for f in glob.glob("**", root_dir=path, recursive=True))
        files = [file for file in found if file.is_file()]
        others = [file for file in files if file.suffix.lower() not in endings]
        files = [file for file in files if file.suffix.lower() in endings]
    elif path.is_file():
        root, files = path.parent, [path]
    elif glob.has_magic(source):
        plain = itertools.takewhile(lambda part: not glob.has_magic(part), path.parts)
        root = Path(*plain)
        files = [Path(f) for f in glob.glob(source, recursive=True) if Path(f).is_file()]
    else:
        raise UserError(f"--source={source}: there is no such file or folder")
    if not files:
        raise UserError(
            f"--source={source} matches no file; a folder is searched for {', '.join(endings)}"
        )
    return root, sorted(files), others


def seeded_hash(seed: int | str, name: str) -> int:
    """Returns 64 bits that depend on the seed and the name only."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def is_validation(path: str, seed: int, fraction: float) -> bool:
    """Returns whether the document at `path` goes to the validation split.

    A hash of its path decides, so a document stays where it is when others come or go.
    """
    return seeded_hash(seed, path) < fraction * 2**64


def read_examples(builder: tfds.core.DatasetBuilder, split: str) -> Iterator[dict]:
    """Yields the examples of a split in their order, with one file open at a time.

    TFDS's own data source keeps every file open that it has read from.
    """
    decode = builder.info.features.deserialize_example_np
    yield from map(decode, read_in_order(builder.info.splits[split].file_instructions))


class TextCorpus(tfds.core.GeneratorBasedBuilder):
    """The documents of a `CorpusReader` as a TFDS data set with `train` and `validation`."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, reader: CorpusReader, **kwargs):
        """Takes what to read and how to split it, and what TFDS builders take."""
        self._reader = reader
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"path": tfds.features.Text(), "text": tfds.features.Text()}
        if self._reader.options.has_completions:
            # Where each begins and ends, in characters of the text.
            features["completions"] = tfds.features.Tensor(shape=(None, 2), dtype=np.int64)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Text documents.",
            features=tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(validation=name == "validation") for name in SPLITS}

    def _generate_examples(self, validation: bool):
        options, total, taken = self._reader.options, 0, 0
        for document in self._reader:
            total += 1
            held_out = is_validation(document.path, options.seed, options.validation_fraction)
            if held_out == validation:
                taken += 1
                # By the key TFDS orders what it writes, in the same order each time.
                example = {"path": document.path, "text": document.text}
                if options.has_completions:
                    example["completions"] = np.array(document.completions, np.int64)
                yield document.key, example
        if total == 0:
            raise UserError(f"--source={', '.join(options.sources)}: every document is blank")
        if taken == 0:
            raise UserError(
                f"none of {total} document(s) fell into the {SPLITS[validation]} split; give "
                "more documents (a .jsonl file holds one a line), or change "
                f"--validation-fraction={options.validation_fraction} or --seed={options.seed}"
            )
