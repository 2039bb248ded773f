"""Units of work: parts of a corpus that are prepared by themselves, by whoever comes to it.

What a unit gives follows from its pieces, the tokenizer and the settings alone, so it is the same
byte for byte however many workers there are and in which order they go. It is written under a name
of its own and moved into place when it is whole, so it is there or not.

A unit's folder holds

    train-000.array_record, ...   windows of its documents
    train-origins.npz             where each of these documents was found
    held-out.npz                  the ids of documents that are held out, which are few and packed
                                  with those of all other units at the end
    documents-*.array_record      the documents themselves, where they are kept
    record.json                   counts and checksums, written last
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Int64
from tokenizers import Tokenizer

from layerskip_jax.data import records
from layerskip_jax.data.completions import ChatTurns, add_completion, ended
from layerskip_jax.data.manifest import PrepareOptions, Shard
from layerskip_jax.data.packing import Completed, Tokens, Trace
from layerskip_jax.data.reading import Document, DocumentReader
from layerskip_jax.data.sources import Piece
from layerskip_jax.data.text import begin_tokens, begun, completion_ids, reading_special_tokens
from layerskip_jax.data.tokenizer import encode_texts, file_sha256, load_tokenizer
from layerskip_jax.data.unit_folder import UnitFolder
from layerskip_jax.run_folder.atomic import write_text
from layerskip_jax.schema import build

logger = logging.getLogger(__name__)

RECORD = "record.json"
TRAIN, VALIDATION = "train", "validation"
SHARD_BYTES = 64 << 20  # of windows; compressed, a shard is smaller
# Tokenized at once, and so what has to fit in memory.
CHUNK_DOCUMENTS, CHUNK_CHARACTERS = 1024, 4 << 20


@dataclasses.dataclass(frozen=True)
class Unit:
    """What one worker does in one go.

    Attributes:
      pieces: what it reads, in this order.
      held_out: the name of the set that all its documents are held out for, or "".
    """

    pieces: tuple[Piece, ...]
    held_out: str = ""

    def key(self, *parts: str) -> str:
        """Returns what tells its result from others': a hash of it and of what else counts."""
        told = json.dumps([dataclasses.asdict(self), *parts])
        return hashlib.sha256(told.encode()).hexdigest()[:24]

    def __str__(self) -> str:
        first = self.pieces[0]
        where = first.url if first.begin == 0 else f"{first.url} from {first.begin:,}"
        more = len(self.pieces) - 1
        return f"{where} and {more} more" if more else where


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a unit gives to one split.

    Attributes:
      documents: those that are packed; where they stay whole, those that fit a window.
      bytes: of their text.
      tokens: with one end token a document.
      targets: tokens of completions; 0 of plain text.
      over_long: documents that no window holds.
      longest: tokens of the longest of these.
      largest_token: the largest id, -1 where there is none.
    """

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    targets: int = 0
    over_long: int = 0
    longest: int = 0
    largest_token: int = -1

    def __add__(self, other: "Counts") -> "Counts":
        sums = dataclasses.asdict(self)
        add_counts(sums, **dataclasses.asdict(other))
        return Counts(**sums)


def add_counts(sums: dict[str, int], **counts: int) -> None:
    """Adds some counts to the fields of a `Counts`, of which two are the largest of all."""
    for name, count in counts.items():
        if name in ("longest", "largest_token"):
            sums[name] = max(sums[name], count)
        else:
            sums[name] += count


@dataclasses.dataclass(frozen=True)
class UnitRecord:
    """What came of a unit.

    Attributes:
      key: of the unit.
      train: counts of what it gives to train on.
      held_out: counts of what is held out of it.
      shards: files of windows.
      others: other files, with their checksums; their windows are documents, or 0.
      skipped: files, lines and rows left out as they hold no text.
      skipped_names: the first of them.
      filtered: documents that filters left out.
      duplicates: documents that were elsewhere already, or not drawn.
    """

    key: str
    train: Counts
    held_out: Counts
    shards: tuple[Shard, ...]
    others: tuple[Shard, ...]
    skipped: int = 0
    skipped_names: tuple[str, ...] = ()
    filtered: int = 0
    duplicates: int = 0


@dataclasses.dataclass(frozen=True)
class Job:
    """What all units of a corpus have in common; goes to every worker.

    Attributes:
      folder: of the units.
      request: what was asked for.
      tokenizer: the name of its file there.
      end_token_id: follows every document.
      chat_turns: the chat template, where chats are read.
    """

    folder: UnitFolder
    request: PrepareOptions
    tokenizer: str
    end_token_id: int
    chat_turns: ChatTurns | None = None


class Task(NamedTuple):
    """A unit, its key, and the name of the file that says what is left out of it, or ""."""

    unit: Unit
    key: str
    left_out: str = ""


def cut_units(pieces: Iterable[Piece], most: int, held_out: str = "") -> Iterator[Unit]:
    """Joins pieces that are small, in their order, to units of about `most` bytes."""
    held: list[Piece] = []
    total = 0
    for piece in pieces:
        if held and total + piece.bytes > most:
            yield Unit(tuple(held), held_out)
            held, total = [], 0
        held.append(piece)
        total += piece.bytes
    if held:
        yield Unit(tuple(held), held_out)


def seeded_hash(seed: int | str, name: str) -> int:
    """Returns 64 bits that depend on the seed and the name only."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def is_validation(name: str, seed: int, fraction: float) -> bool:
    """Returns whether what is called `name` is held out; of a document this is its text's digest.

    A hash decides, so a document stays where it is when others come or go, and so do its copies.
    """
    return seeded_hash(seed, name) < fraction * 2**64


def read_records(folder: UnitFolder, keys: Sequence[str]) -> dict[str, UnitRecord]:
    """Returns the records of units by key, those that are there and can be read."""
    texts = folder.texts(f"{key}/{RECORD}" for key in keys)
    records = {}
    for key in keys:
        name = f"{key}/{RECORD}"
        with contextlib.suppress(KeyError, ValueError):
            records[key] = build(UnitRecord, json.loads(texts[name]), name)
    return records


def finished(folder: UnitFolder, keys: Sequence[str]) -> dict[str, UnitRecord]:
    """Returns the records of units by key, those that are there, whole and undamaged."""
    return {
        key: record
        for key, record in read_records(folder, keys).items()
        if _is_whole(folder, record)
    }


def _is_whole(folder: UnitFolder, record: UnitRecord) -> bool:
    for shard in (*record.shards, *record.others):
        name = f"{record.key}/{shard.name}"
        if not folder.is_whole(name, shard.bytes, shard.sha256):
            logger.warning("%s is damaged, so its unit is made again", name)
            return False
    return True


def make_unit(job: Job, task: Task) -> UnitRecord:
    """Reads, tokenizes and packs one unit, and puts its folder in place.

    Raises:
      UserError: its sources hold what is no text, or cannot be read.
    """
    with job.folder.staged(task.key, last=RECORD) as stage:
        record = _UnitWork(job, task, stage).run()
        write_text(stage / RECORD, json.dumps(dataclasses.asdict(record)))
    return record


# By its name, which follows from what it holds.
_tokenizer = functools.lru_cache(maxsize=2)(load_tokenizer)


def left_out_of(job: Job, task: Task) -> Int64[np.ndarray, "documents"]:
    """Returns the numbers of the documents that a unit leaves out, in their order.

    As an array, for they may be most documents.
    """
    if not task.left_out:
        return np.zeros(0, np.int64)
    return np.load(job.folder.find(task.left_out))


class _HeldOut:
    """Documents that are packed later, together with those of other units."""

    def __init__(self):
        # Bytes, which take no more room than these: there may be very many and very short ones.
        self._tokens, self._targets, self._digests = bytearray(), bytearray(), bytearray()
        self._lengths, self._origins = array("q"), array("q")

    def __len__(self) -> int:
        return len(self._lengths)

    def add(
        self, tokens: Tokens, targets: np.ndarray, digest: bytes, origin: tuple[int, int]
    ) -> None:
        self._tokens += tokens.tobytes()
        self._targets += targets.tobytes()
        self._digests += digest
        self._lengths.append(len(tokens))
        self._origins.extend(origin)

    def arrays(self) -> dict[str, np.ndarray]:
        return {
            "tokens": np.frombuffer(self._tokens, np.int32),
            "targets": np.frombuffer(self._targets, bool),
            "lengths": np.array(self._lengths, np.int64),
            "digests": np.frombuffer(self._digests, np.uint64).reshape(-1, 2),
            "origins": np.array(self._origins, np.int64).reshape(-1, 2),
        }


class _UnitWork:
    """The making of one unit."""

    def __init__(self, job: Job, task: Task, folder: Path):
        self._job, self._unit, self._key, self._folder = job, task.unit, task.key, folder
        self._request = job.request
        self._reader = DocumentReader(job.request, job.chat_turns)
        self._tokenizer = _tokenizer(job.folder.find(job.tokenizer))
        self._left_out = left_out_of(job, task)
        # Added up in place: a `Counts` for each document would take longer than a short one's ids.
        self._sums = {held_out: dataclasses.asdict(Counts()) for held_out in (False, True)}
        self._held_out = _HeldOut()
        self._trace = Trace()
        self._kept: dict[bool, ArrayRecordWriter] = {}
        self._kept_counts = {False: 0, True: 0}

    def run(self) -> UnitRecord:
        request = self._request
        if request.has_completions:
            make, documents = self._trace.pack_whole, self._whole()
        else:
            make, documents = self._trace.pack, self._cut()
        windows = make(documents, request.sequence_length, self._job.end_token_id)
        shards = write_shards(windows, self._folder, TRAIN, request.sequence_length)
        shards = tuple(shards)
        others = []
        if shards:
            self._trace.save(self._folder / ORIGINS)
            others.append(shard_of(self._folder / ORIGINS))
        if len(self._held_out):
            np.savez(self._folder / HELD_OUT, **self._held_out.arrays())
            others.append(shard_of(self._folder / HELD_OUT))
        for held_out, writer in self._kept.items():
            writer.close()
            name = kept_name(held_out)
            others.append(shard_of(self._folder / name, self._kept_counts[held_out]))
        return UnitRecord(
            key=self._key,
            train=Counts(**self._sums[False]),
            held_out=Counts(**self._sums[True]),
            shards=shards,
            others=tuple(others),
            skipped=self._reader.skipped,
            skipped_names=tuple(self._reader.skipped_names),
            filtered=self._reader.filtered,
            duplicates=len(self._left_out),
        )

    def _documents(self) -> Iterator[tuple[Document, bytes, bool]]:
        """Yields the documents that are wanted, with their digest and whether they are held out."""
        request, passed = self._request, 0
        for number, document in enumerate(self._reader.read(list(self._unit.pieces))):
            if passed < len(self._left_out) and number == self._left_out[passed]:
                passed += 1
                continue
            digest = document.digest
            held_out = bool(self._unit.held_out) or is_validation(
                digest.hex(), request.seed, request.validation_fraction
            )
            yield document, digest, held_out

    def _add(self, held_out: bool, **counts: int) -> None:
        add_counts(self._sums[held_out], **counts)

    def _keep(self, document: Document, held_out: bool) -> None:
        if not self._request.keep_documents:
            return
        if held_out not in self._kept:
            file = str(self._folder / kept_name(held_out))
            self._kept[held_out] = ArrayRecordWriter(file, "group_size:16")
        self._kept_counts[held_out] += 1
        piece = self._unit.pieces[document.piece]
        name = self._reader.short_name(piece, document.place)
        self._kept[held_out].write(
            records.document_record(
                name,
                document.text,
                document.completions,
                has_completions=self._request.has_completions,
            )  # fmt: skip
        )

    def _cut(self) -> Iterator[tuple[Tokens, tuple[int, int]]]:
        """Yields the ids of plain text that is trained on, with where it was found."""
        end, begin = self._job.end_token_id, np.array(begin_tokens(self._tokenizer), np.int32)
        for chunk in _chunks(self._documents()):
            encoded = encode_texts(self._tokenizer, [document.text for document, _, _ in chunk])
            encoded = [np.concatenate([begin, ids]) if len(begin) else ids for ids in encoded]
            for split in (False, True):
                mine = [n for n, (_, _, held_out) in enumerate(chunk) if held_out == split]
                self._add(
                    split,
                    documents=len(mine),
                    bytes=sum(len(chunk[n][0].text.encode()) for n in mine),
                    tokens=sum(len(encoded[n]) + 1 for n in mine),
                    largest_token=max(
                        (max(int(encoded[n].max(initial=-1)), end) for n in mine), default=-1
                    ),
                )
            for (document, digest, held_out), ids in zip(chunk, encoded, strict=True):
                self._keep(document, held_out)
                origin = (document.piece, document.place)
                if held_out:
                    self._held_out.add(ids, np.zeros(0, bool), digest, origin)
                else:
                    yield ids, origin

    def _whole(self) -> Iterator[tuple[Completed, tuple[int, int]]]:
        """Yields the documents that are trained on and fit a window, with where they were found."""
        for made, document, digest, held_out, size in self._completed():
            count = len(made.tokens)
            if count > self._request.sequence_length + 1:
                self._add(held_out, over_long=1, longest=count)
                continue
            self._add(
                held_out, documents=1, bytes=size, tokens=count, targets=int(made.is_target.sum()),
                largest_token=int(made.tokens.max()),
            )  # fmt: skip
            origin = (document.piece, document.place)
            if held_out:
                self._held_out.add(made.tokens, made.is_target, digest, origin)
            else:
                yield made, origin

    def _completed(self) -> Iterator[tuple[Completed, Document, bytes, bool, int]]:
        """Yields the documents of each text with what is learned of them, and its bytes.

        What comes before a completion has the ids that `generate` makes of it as a prompt. Special
        tokens that a chat's template writes, or a message spells out, are those tokens, as there.
        """
        tokenizer, end = self._tokenizer, self._job.end_token_id
        if self._request.messages_field:
            tokenizer, begin = reading_special_tokens(tokenizer), []
        else:
            begin = begin_tokens(tokenizer)
        for chunk in _chunks(self._documents()):
            # Of each completion what comes before it, and that with it.
            beginnings = [
                document.text[:stop]
                for document, _, _ in chunk
                for span in document.completions
                for stop in span
            ]
            encodings = tokenizer.encode_batch_fast(beginnings, add_special_tokens=False)
            ids = iter(begun(begin, encoding.ids) for encoding in encodings)
            for document, digest, held_out in chunk:
                made = self._marked(document, tokenizer, ids)
                if made:
                    self._keep(document, held_out)
                size = len(document.text.encode())
                for one in made:
                    yield ended(one, tokenizer, end), document, digest, held_out, size
                    size = 0  # of the text they share

    def _marked(
        self, document: Document, tokenizer: Tokenizer, ids: Iterator[list[int]]
    ) -> list[Completed]:
        """Returns the documents of a text, none where the tokenizer cannot say a completion."""
        made: list[Completed] = []
        unsaid = ""
        for start, end in document.completions:
            prompt, whole = next(ids), next(ids)
            text = document.text
            completion = completion_ids(tokenizer, text[start:end], prompt, whole)
            if completion is None:
                unsaid = f"{text[start:end]!r} after {text[:start]!r}"
            else:
                add_completion(made, prompt, completion)
        if not unsaid:
            return made
        self._reader.leave_out(
            self._unit.pieces[document.piece],
            document.place,
            f"cannot be learned: the tokenizer has no tokens that say {unsaid}; part them where a "
            "word ends, leave it out",
        )
        return []


ORIGINS, HELD_OUT = f"{TRAIN}-origins.npz", "held-out.npz"


def kept_name(held_out: bool) -> str:
    """Returns the file of the documents that are kept of a unit."""
    return f"documents-{VALIDATION if held_out else TRAIN}.array_record"


def _chunks(
    items: Iterable[tuple[Document, bytes, bool]],
) -> Iterator[list[tuple[Document, bytes, bool]]]:
    """Groups documents so that a group is many of them, but no more than fits in memory."""
    chunk, characters = [], 0
    for item in items:
        chunk.append(item)
        characters += len(item[0].text)
        if len(chunk) == CHUNK_DOCUMENTS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def shard_of(file: Path, windows: int = 0) -> Shard:
    """Returns what is known of a file once it is written."""
    return Shard(file.name, windows, file.stat().st_size, file_sha256(file))


def write_shards(
    windows: Iterator[np.ndarray], folder: Path, name: str, sequence_length: int
) -> Iterator[Shard]:
    """Writes windows to files of at most `SHARD_BYTES`, named NAME-NUMBER.array_record."""
    head = records.window_head(sequence_length)
    most = max(SHARD_BYTES // (8 * (sequence_length + 1)), 1)
    writer, count, file, number = None, 0, folder, 0
    for window in windows:
        if writer is None:
            file = folder / f"{name}-{number:05d}.array_record"
            # Groups of one record make every record cheap to reach, in any order.
            writer = ArrayRecordWriter(str(file), "group_size:1")
        writer.write(head + window.tobytes())
        count += 1
        if count == most:
            writer.close()
            yield shard_of(file, count)
            writer, count, number = None, 0, number + 1
    if writer is not None:
        writer.close()
        yield shard_of(file, count)
