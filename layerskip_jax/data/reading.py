"""From the pieces of sources to documents: fields, filters, and what is no text.

A document is a file, a line of a file of lines, or a row of a table; of prompts with completions,
and of chats, it also says which parts of its text are completions.
"""

import hashlib
import json
import numbers
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from layerskip_jax.data import sources
from layerskip_jax.data.completions import BadRecordError, ChatTurns, Spans, marked_texts
from layerskip_jax.data.manifest import PrepareOptions
from layerskip_jax.data.shards import DamagedError
from layerskip_jax.data.sources import DAMAGE, FORMATS, Piece, Row
from layerskip_jax.run_folder.atomic import remedy
from layerskip_jax.schema import UserError, as_bytes, is_text

NAMED_SKIPS = 20  # of what is left out, the rest is counted


class Document(NamedTuple):
    """A text and where it was found.

    Attributes:
      piece: the number of its piece within the unit.
      place: as `Row` has it.
      text: never blank.
      completions: where each completion begins and ends in the text; none of plain text.
    """

    piece: int
    place: int
    text: str
    completions: Spans = ()

    @property
    def digest(self) -> bytes:
        """16 bytes that stand for the text: which split it falls into, and whether it is new."""
        return hashlib.blake2b(self.text.encode(), digest_size=16).digest()


class DocumentReader:
    """Reads the documents of some pieces, in their order.

    Attributes:
      options: what to read, and how.
      skipped: how many files, lines and rows were left out as they hold no text.
      skipped_names: the first of them.
      filtered: documents that the filters left out.
    """

    def __init__(self, options: PrepareOptions, chat_turns: ChatTurns | None = None):
        """Takes what `layerskip prepare` takes; nothing is read yet.

        Args:
          options: what to read, and how.
          chat_turns: the chat template, for `messages_field`.
        """
        self.options = options
        self._chat_turns = chat_turns
        self._filters = [rule.partition("=")[::2] for rule in options.requires]
        self.skipped, self.filtered = 0, 0
        self.skipped_names: list[str] = []

    def read(self, pieces: list[Piece]) -> Iterator[Document]:
        """Yields the documents that are not blank and pass the filters.

        Raises:
          UserError: a file cannot be read, or holds what is no text.
        """
        for number, piece in enumerate(pieces):
            if not is_text(piece.url):
                name = as_bytes(piece.url)
                self._leave_out(lambda name=name: name, "has a name that is not UTF-8; rename it")
                continue
            if self.options.needs_fields and not FORMATS[piece.kind].has_fields:
                raise UserError(
                    f"{piece.url} is plain text and has no fields; name .jsonl files or "
                    f"tables that have {' and '.join(map(repr, self._all_fields(piece)))}"
                )
            yield from self._piece(number, piece)

    def _all_fields(self, piece: Piece) -> tuple[str, ...]:
        """Returns the fields that are looked at in what a piece holds."""
        options = self.options
        field = options.jsonl_field if piece.kind == "lines" else options.text_field
        texts = options.fields or (() if piece.kind == "text" else (field,))
        return tuple(dict.fromkeys((*texts, *(name for name, _ in self._filters))))

    def _piece(self, number: int, piece: Piece) -> Iterator[Document]:
        if piece.kind == "tfds" and self.options.messages_field:
            raise UserError(
                f"--messages-field={self.options.messages_field!r} is of .jsonl files and tables; "
                f"write the chats of {piece.path} as such"
            )
        most = self.options.max_document_bytes
        last = None
        try:
            if self.options.skip_bad_files and piece.kind == "lines":
                # Until a harmed one comes to an end, anything may come out of it.
                sources.check_packed(piece)
            for row in FORMATS[piece.kind].rows(piece, self._all_fields(piece), most):
                yield from self._row(number, piece, row)
                last = row.place
        except sources.TooLongError:
            self._too_long(piece, 0, f"over {most:,}")
        except sources.MissingFieldError as error:
            if piece.kind == "tfds":
                raise UserError(
                    f"{piece.path} has no text in a field {error.field!r}; its fields are "
                    f"{', '.join(error.names)}: name one with {self._option(error.field)}"
                ) from error
            self._leave_out(
                lambda: piece.url,
                f"has no column {error.field!r}; its columns are "
                f"{', '.join(error.names) or 'none'}: name one with {self._option(error.field)}",
                error,
            )
        except DamagedError as error:  # says where
            self._leave_out(lambda: "", f"{error}; get it anew, leave it out", error, piece.url)
        except (*DAMAGE, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno:
                raise UserError(
                    f"{piece.url} cannot be read ({error.strerror})"
                    f"{remedy(error) or '; leave it out'}"
                ) from error
            after = "" if last is None else f" after {self.name(piece, last)}"
            self._leave_out(
                lambda: piece.url,
                f"is damaged{after}, or no {_FILES[piece.kind]} ({error}); get it anew, "
                "leave it out",
                error,
            )

    def _option(self, field: str) -> str:
        """Returns the option by which a column was named."""
        named = ("prompt_field", "completion_field", "messages_field", "text_field")
        asked = next((name for name in named if getattr(self.options, name) == field), "require")
        return f"--{asked.replace('_', '-')}"

    def _row(self, number: int, piece: Piece, row: Row) -> Iterator[Document]:
        """Yields the documents of a row, one in most cases."""
        try:
            if isinstance(row.value, Exception):
                raise row.value
            record = self._record(piece, row.value)
            if record is None:
                return
            if isinstance(record, Mapping) and not self._passes(record):
                self.filtered += 1
                return
            if self.options.has_completions:
                texts = marked_texts(_as_text(record), self.options, self._chat_turns)
            else:
                texts = [(self._text(piece, record), ())]
        except sources.TooLongError:
            self._too_long(piece, row.place, f"over {self.options.max_document_bytes:,}")
            return
        except UnicodeDecodeError as error:
            at = (row.place if piece.kind == "lines" else 0) + error.start
            self._leave_out(
                lambda: self.name(piece, row.place),
                f"is not UTF-8 text: {error.reason} at byte {at}; convert it, leave it out",
                error,
            )
            return
        except BadRecordError as error:
            self._leave_out(
                lambda: self.name(piece, row.place), f"{error}; correct it, leave it out", error
            )
            return
        except (ValueError, OverflowError) as error:  # such as a time that Python has no value for
            self._leave_out(
                lambda: self.name(piece, row.place), f"has {error}; correct it, leave it out", error
            )
            return
        for text, completions in texts:
            if not text or text.isspace():
                continue
            most = self.options.max_document_bytes
            # A character has four bytes at most.
            if len(text) * 4 > most and (size := len(text.encode())) > most:
                self._too_long(piece, row.place, f"{size:,}")
            elif self._has_length(text):
                yield Document(number, row.place, text, completions)
            else:
                self.filtered += 1

    def _record(self, piece: Piece, value: Any) -> Any:
        """Returns what a row holds: text, or fields; None of an empty line."""
        if piece.kind == "text":
            return value.decode("utf-8").removeprefix("\ufeff")
        if piece.kind != "lines":
            return value
        if not value.strip():
            return None
        try:
            record = json.loads(value.decode("utf-8").removeprefix("\ufeff"))
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise BadRecordError(f"is no JSON object ({error})") from error
        return record

    def _text(self, piece: Piece, record: Any) -> str:
        """Returns the text of a record, blank where it is null."""
        if piece.kind == "text":
            return record
        option = "--jsonl-field" if piece.kind == "lines" else "--text-field"
        field = self.options.jsonl_field if piece.kind == "lines" else self.options.text_field
        if not isinstance(record, Mapping) or field not in record:
            raise BadRecordError(
                f"is no JSON object with text in its field {field!r}; name the field with {option}"
            )
        text = record[field]
        if text is None:
            return ""
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        if not is_text(text):  # JSON can spell half a surrogate pair, which is no text
            kind = "half a character" if isinstance(text, str) else type(text).__name__
            raise BadRecordError(
                f"is no JSON object with text in its field {field!r} ({kind}); name the field "
                f"with {option}"
                if piece.kind == "lines"
                else f"has no text in its column {field!r} ({kind}); name the column with {option}"
            )
        return text

    def _passes(self, record: Mapping[str, Any]) -> bool:
        return all(
            field in record and is_value(record[field], wanted) for field, wanted in self._filters
        )

    def _has_length(self, text: str) -> bool:
        least, most = self.options.min_characters, self.options.max_characters
        return len(text) >= least and (most == 0 or len(text) <= most)

    def _too_long(self, piece: Piece, place: int, size: str) -> None:
        what = "line" if piece.kind == "lines" else "text"
        self._leave_out(
            lambda: self.name(piece, place),
            f"is a {what} of {size} bytes, which is more than is held at once; raise "
            f"--max-document-bytes={self.options.max_document_bytes}, part the text",
        )

    def leave_out(self, piece: Piece, place: int, message: str) -> None:
        """Counts a document that cannot be tokenized, or fails.

        Args:
          piece: where it is.
          place: as `Row` has it.
          message: goes on after its name, and says what is wrong and what may be done.

        Raises:
          UserError: such documents are not to be left out.
        """
        self._leave_out(lambda: self.name(piece, place), message)

    def _leave_out(
        self,
        name: Callable[[], str],
        message: str,
        error: Exception | None = None,
        skipped_name: str = "",
    ) -> None:
        # Named only where it is said: to count lines a file is read once more.
        if not self.options.skip_bad_files:
            said = f"{name()} {message}".lstrip()
            raise UserError(f"{said}, or pass --skip-bad-files") from error
        self.skipped += 1
        if len(self.skipped_names) < NAMED_SKIPS:
            self.skipped_names.append(skipped_name or name())

    def name(self, piece: Piece, place: int) -> str:
        """Returns a row's file, with the number of its line or row, from 1 as editors count."""
        if piece.kind == "text":
            return piece.url
        if piece.kind == "lines":
            return f"{piece.url}:{line_number(piece, place)}"
        return f"{piece.url}: row {place + 1}"

    def short_name(self, piece: Piece, place: int) -> str:
        """Returns where a document was found, relative to its source."""
        return piece.path if piece.kind == "text" else f"{piece.path}:{place}"


_FILES = {
    "text": "file of text",
    "lines": "file of lines",
    "parquet": "parquet file",
    "arrow": "arrow file",
    "tfds": "file of TFDS",
}


def _as_text(record: Any) -> Any:
    """Returns fields of which TFDS and tables may have text as bytes."""
    if not isinstance(record, Mapping):
        return record
    return {
        field: value.decode("utf-8") if isinstance(value, bytes) else value
        for field, value in record.items()
    }


def is_value(value: Any, wanted: str) -> bool:
    """Returns whether a field holds what `--require` asks for.

    Args:
      value: text, or what JSON, a table or TFDS has.
      wanted: such a text; a number, `true`, `false` or `null`; or what else, as Python prints it.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8")
    if isinstance(value, str):
        return value == wanted
    if isinstance(value, bool | np.bool_):
        return wanted == ("true" if value else "false")
    if value is None or isinstance(value, list | dict):
        return json.dumps(value, default=str) == wanted
    if str(value) == wanted:
        return True
    try:
        number = json.loads(wanted)
    except (ValueError, RecursionError):
        return False
    # By value: 3.0 is 3.
    is_number = isinstance(value, numbers.Number) and type(number) in (int, float)
    return is_number and bool(value == number)


def line_number(piece: Piece, place: int) -> int:
    """Returns the number, from 1, of the line that begins at a byte."""
    left, number = place, 1
    with sources.opened(piece.url) as file:
        while left and (part := file.read(min(left, 1 << 20))):
            number += part.count(b"\n")
            left -= len(part)
    return number
