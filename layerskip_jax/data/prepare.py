"""From text to a folder of packed windows, all of it or nothing.

Everything is written into a folder beside the output, the manifest last, and moved into
place at the end. A run that was interrupted leaves nothing that looks finished, and the next
one starts again. The folder holds

    manifest.json      what was asked for, what came of it, and checksums
    tokenizer.json     of the `tokenizers` library
    train-*.array_record, validation-*.array_record
    corpus/            the documents, as a TFDS data set

A record is one packed window, `[2, S + 1]` int32 in native byte order: tokens, then segment
ids (`packing.py`). Positions, and which tokens are targets, are derived from the segment ids when
a window is read.
"""

import contextlib
import dataclasses
import errno
import io
import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Int64
from tokenizers import Tokenizer

from layerskip_jax.data import manifest as manifests
from layerskip_jax.data.completions import ChatTurns, add_completion, ended
from layerskip_jax.data.corpus import SPLITS, CorpusReader, TextCorpus, read_examples
from layerskip_jax.data.manifest import Manifest, PrepareOptions, Shard, Split
from layerskip_jax.data.packing import Completed, Tokens, pack, pack_whole
from layerskip_jax.data.text import begin_tokens, begun, completion_ids, reading_special_tokens
from layerskip_jax.data.tokenizer import (
    end_token_of,
    file_sha256,
    load_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from layerskip_jax.run_folder.atomic import staged_folder
from layerskip_jax.schema import UserError, require

logger = logging.getLogger(__name__)
T = TypeVar("T")

DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE,
)  # fmt: skip
CORPUS = "corpus"  # the documents as a TFDS data set
SHARD_BYTES = 64 << 20  # of windows; compressed, a shard is smaller
# Tokenized at once by all cores, and so what has to fit in memory.
CHUNK_DOCUMENTS, CHUNK_CHARACTERS = 1024, 4 << 20


@dataclasses.dataclass
class _Counts:
    """What is counted while a split is packed.

    Attributes:
      histogram: the tokens of each id, end tokens included.
      targets: the same of completions alone; None of plain text.
      documents: those that are packed.
      bytes: of their texts.
      over_long: documents that no window holds.
      longest: tokens of the longest of these.
    """

    histogram: Int64[np.ndarray, "V"]
    targets: Int64[np.ndarray, "V"] | None = None
    documents: int = 0
    bytes: int = 0
    over_long: int = 0
    longest: int = 0


def prepare(
    request: PrepareOptions,
    output: Path,
    *,
    tokenizer_file: Path | None = None,
    chat_turns: ChatTurns | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Prepares what `request` asks for in the folder `output`.

    Args:
      request: what to prepare.
      output: the folder. If it already holds what `request` makes, nothing is done; whether
        the text of the sources has changed since is not looked at.
      tokenizer_file: an existing tokenizer.json to use instead of training one.
      chat_turns: the chat template of which the request has the hash.
      overwrite: whether to prepare in any case, and replace prepared data in `output` once
        the new data is complete.

    Raises:
      ConfigError: the request is of chats, and there is no template.
      UserError: naming what is wrong with the sources, the tokenizer or the output.
    """
    require(
        chat_turns is not None or not request.messages_field,
        f"messages_field={request.messages_field!r} needs chat_turns, of the model's chat template",
    )
    if (output / manifests.MANIFEST_FILE).is_file() and not overwrite:
        existing = manifests.read_manifest(output)
        _require_same(request, existing.request, output)
        logger.info("%s is prepared already (--overwrite reads the sources once more)", output)
        return existing

    def check(place: Path) -> None:
        if (place / manifests.MANIFEST_FILE).is_file():
            if not overwrite:
                raise UserError(f"--output={output} was prepared by another process meanwhile")
        elif place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise UserError(
                f"--output={output} exists and is no prepared data; take another folder"
            )

    with staged_folder(output, check) as folder, _disk_errors():
        return _write(request, folder, tokenizer_file, chat_turns)


def _require_same(request: PrepareOptions, existing: PrepareOptions, output: Path) -> None:
    differing = [
        f"{field.name} {old!r} there, {new!r} asked for"
        for field in dataclasses.fields(PrepareOptions)
        if (old := getattr(existing, field.name)) != (new := getattr(request, field.name))
    ]
    if differing:
        raise UserError(
            f"--output={output} holds data prepared otherwise ({'; '.join(differing)}); take "
            "another --output, or pass --overwrite"
        )


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """Raises as an `OSError` what the libraries report of the disk in errors of their own."""
    try:
        yield
    except Exception as error:
        if any(os.strerror(code) in str(error) for code in DISK_ERRORS):
            raise OSError(str(error)) from error  # without a number, as `remedy` takes it
        raise


def _write(
    request: PrepareOptions,
    folder: Path,
    tokenizer_file: Path | None,
    chat_turns: ChatTurns | None,
) -> Manifest:
    reader = CorpusReader(request, chat_turns)
    target = folder / manifests.TOKENIZER_FILE
    if tokenizer_file is not None:
        shutil.copyfile(tokenizer_file, target)
        # Looked at already now: reading the corpus can take long.
        end_token_of(load_tokenizer(target), request.end_token or None)

    logger.info("reading %s", ", ".join(request.sources))
    corpus = _build_corpus(reader, folder / CORPUS)
    if tokenizer_file is None:
        logger.info("training a tokenizer")
        train_tokenizer(_texts(corpus, "train"), request.vocab_size).save(str(target))
    tokenizer = load_tokenizer(target)
    vocab_size = vocabulary_size(tokenizer)
    end_token, end_token_id = end_token_of(tokenizer, request.end_token or None)

    splits, largest_token = {}, end_token_id
    for name in SPLITS:
        logger.info("packing %s", name)
        counts = _Counts(np.zeros(vocab_size, np.int64))
        length = request.sequence_length
        if request.has_completions:
            counts.targets = np.zeros_like(counts.histogram)
            completed = _completed(read_examples(corpus, name), reader, tokenizer, end_token_id)
            windows = pack_whole(_fitting(completed, length + 1, counts), length, end_token_id)
        else:
            tokens = _tokenized(_texts(corpus, name), tokenizer, end_token_id, counts)
            windows = pack(tokens, length, end_token_id)
        shards = tuple(_write_shards(windows, folder, name))
        _say_over_long(name, counts, length)
        largest_token = max([largest_token, *np.flatnonzero(counts.histogram)[-1:].tolist()])
        splits[name] = Split(
            documents=counts.documents,
            bytes=counts.bytes,
            tokens=int(counts.histogram.sum()),
            windows=sum(shard.windows for shard in shards),
            shards=shards,
            over_long=counts.over_long,
            targets=-1 if counts.targets is None else int(counts.targets.sum()),
        )
    tokenizer_sha256 = file_sha256(target)
    manifest = Manifest(
        format=manifests.FORMAT,
        request=request,
        sequence_length=request.sequence_length,
        vocab_size=vocab_size,
        tokenizer_sha256=tokenizer_sha256,
        end_token=end_token,
        end_token_id=end_token_id,
        skipped_files=len(reader.skipped),
        largest_token=largest_token,
        # The last counts are those of the validation split.
        unigram_entropy_nats=_entropy(
            counts.histogram if counts.targets is None else counts.targets
        ),
        fingerprint=manifests.fingerprint(tokenizer_sha256, *splits.values()),
        **splits,
    )
    text = json.dumps(dataclasses.asdict(manifest), indent=2)
    (folder / manifests.MANIFEST_FILE).write_text(text + "\n")
    return manifest


def _build_corpus(reader: CorpusReader, folder: Path) -> TextCorpus:
    """Writes the documents as a TFDS data set and opens it."""
    tfds.disable_progress_bar()
    builder = TextCorpus(reader=reader, data_dir=folder, file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):  # it announces paths that will not last
        builder.download_and_prepare(file_format="array_record")
    shutil.rmtree(folder / "downloads", ignore_errors=True)
    return builder


def _texts(corpus: TextCorpus, split: str) -> Iterator[str]:
    for example in read_examples(corpus, split):
        yield example["text"].decode("utf-8")


def _chunks(items: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Groups texts so that a group is many of them, but no more than fits in memory.

    Args:
      items: the texts, or what each is part of.
      size: returns the length of one.
    """
    chunk, characters = [], 0
    for item in items:
        chunk.append(item)
        characters += size(item)
        if len(chunk) == CHUNK_DOCUMENTS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _tokenized(
    texts: Iterable[str], tokenizer: Tokenizer, end_token_id: int, counts: _Counts
) -> Iterator[Tokens]:
    """Yields the token ids of each text, begun as the tokenizer begins one.

    Counts them, and the end token that will follow each text.
    """
    begin = begin_tokens(tokenizer)
    for chunk in _chunks(texts, len):
        encodings = tokenizer.encode_batch_fast(chunk, add_special_tokens=False)
        documents = [np.array(begin + encoding.ids, np.int32) for encoding in encodings]
        counts.documents += len(chunk)
        counts.bytes += sum(len(text.encode()) for text in chunk)
        counts.histogram += np.bincount(np.concatenate(documents), minlength=len(counts.histogram))
        counts.histogram[end_token_id] += len(chunk)
        yield from documents


def _completed(
    examples: Iterable[dict], reader: CorpusReader, tokenizer: Tokenizer, end_token_id: int
) -> Iterator[tuple[Completed, int]]:
    """Yields the documents of each example, each with the bytes of its text.

    What comes before a completion has the ids that `generate` makes of it as a prompt. Special
    tokens that a chat's template writes, or a message spells out, are those tokens, as there.
    """
    is_chat = bool(reader.options.messages_field)
    if is_chat:
        tokenizer = reading_special_tokens(tokenizer)
    begin = [] if is_chat else begin_tokens(tokenizer)
    for chunk in _chunks(examples, lambda example: len(example["text"])):
        texts = [example["text"].decode("utf-8") for example in chunk]
        parts = [example["completions"].tolist() for example in chunk]
        # Of each completion what comes before it, and that with it.
        beginnings = [
            text[:end]
            for text, spans in zip(texts, parts, strict=True)
            for span in spans
            for end in span
        ]
        encodings = tokenizer.encode_batch_fast(beginnings, add_special_tokens=False)
        ids = iter(begun(begin, encoding.ids) for encoding in encodings)
        for example, text, spans in zip(chunk, texts, parts, strict=True):
            documents: list[Completed] = []
            unsaid = False
            for start, end in spans:
                prompt, whole = next(ids), next(ids)
                completion = completion_ids(tokenizer, text[start:end], prompt, whole)
                if completion is None:
                    path = example["path"].decode()
                    reader.leave_out(
                        path,
                        f"{path}: the tokenizer has no tokens that say {text[start:end]!r} after "
                        f"{text[:start]!r}; part them where a word ends, leave it out",
                    )
                    unsaid = True
                else:
                    add_completion(documents, prompt, completion)
            if unsaid:
                continue
            size = len(text.encode())
            for document in documents:
                yield ended(document, tokenizer, end_token_id), size
                size = 0  # of the text they share


def _fitting(
    documents: Iterable[tuple[Completed, int]], size: int, counts: _Counts
) -> Iterator[Completed]:
    """Yields the documents of at most `size` tokens and counts them, and those that are longer."""
    for document, text_bytes in documents:
        tokens, is_target = document
        if len(tokens) > size:
            counts.over_long += 1
            counts.longest = max(counts.longest, len(tokens))
            continue
        counts.documents += 1
        counts.bytes += text_bytes
        np.add.at(counts.histogram, tokens, 1)
        np.add.at(counts.targets, tokens[is_target], 1)
        yield document


def _say_over_long(split: str, counts: _Counts, sequence_length: int) -> None:
    """Logs how many documents were left out.

    Raises:
      UserError: all of them were.
    """
    if not counts.over_long:
        return
    about = (
        f"{counts.over_long:,} of the {split} split's {counts.over_long + counts.documents:,} "
        f"documents are longer than --sequence-length={sequence_length} and the token after it, "
        f"the longest {counts.longest:,} tokens"
    )
    if not counts.documents:
        raise UserError(f"{about}; none is left, so give a longer one")
    logger.warning("%s; they are left out", about)


def _write_shards(windows: Iterator[np.ndarray], folder: Path, split: str) -> Iterator[Shard]:
    for number in itertools.count():
        first = next(windows, None)
        if first is None:
            return
        rest = itertools.islice(windows, max(SHARD_BYTES // first.nbytes, 1) - 1)
        path = folder / f"{split}-{number:05d}.array_record"
        # Groups of one record make every record cheap to reach, in any order.
        writer = ArrayRecordWriter(str(path), "group_size:1")
        count = 0
        for window in itertools.chain([first], rest):
            writer.write(window.tobytes())
            count += 1
        writer.close()
        yield Shard(path.name, count, path.stat().st_size, file_sha256(path))


def _entropy(histogram: Int64[np.ndarray, "V"]) -> float:
    """Returns the entropy of tokens counted by id, in nats a token."""
    p = histogram[histogram > 0] / histogram.sum()
    return float(-(p * np.log(p)).sum())
