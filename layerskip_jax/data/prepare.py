"""From text to a folder of packed windows, all of it or nothing.

Everything is written into a hidden folder beside the output and moved into place at the end,
the manifest last. A run that was interrupted leaves nothing that looks finished, and the
next one starts again.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tokenizers import Tokenizer

from layerskip_jax.data import manifest as manifests
from layerskip_jax.data.corpus import CorpusReader, TextCorpus
from layerskip_jax.data.manifest import Manifest, Request, Shard, Split
from layerskip_jax.data.packing import pack
from layerskip_jax.data.tokenizer import (
    end_token_of,
    file_sha256,
    load_tokenizer,
    train_tokenizer,
)
from layerskip_jax.schema import UserError

logger = logging.getLogger(__name__)

CORPUS = "corpus"  # the documents as a TFDS data set
SHARD_WINDOWS = 1 << 16
TOKENIZE_DOCUMENTS = 256  # tokenized at once, by all cores


@dataclasses.dataclass
class _Counts:
    """What is counted while a split is packed."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    histogram: np.ndarray | int = 0


def prepare(
    request: Request, output: Path, *, tokenizer_file: Path | None = None, overwrite: bool = False
) -> Manifest:
    """Prepares what `request` asks for in the folder `output`.

    Args:
      request: what to prepare.
      output: the folder. If it already holds the same, nothing is done.
      tokenizer_file: an existing tokenizer.json to use instead of training one.
      overwrite: whether other prepared data in `output` may be replaced, once the new data
        is complete.

    Raises:
      UserError: naming what is wrong with the sources, the tokenizer or the output.
    """
    if (output / manifests.MANIFEST_FILE).is_file():
        existing = manifests.read_manifest(output)
        differing = [
            f"{field.name}: {old!r} -> {new!r}"
            for field in dataclasses.fields(Request)
            if (old := getattr(existing.request, field.name))
            != (new := getattr(request, field.name))
        ]
        if not differing and not overwrite:
            logger.info("%s is prepared already", output)
            return existing
        if not overwrite:
            raise UserError(
                f"--output={output} holds data prepared otherwise ({'; '.join(differing)}); take "
                "another --output, or pass --overwrite"
            )
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output={output} exists and is no prepared data; take another folder")
    with _staged(output) as folder:
        return _write(request, folder, tokenizer_file)


def _write(request: Request, folder: Path, tokenizer_file: Path | None) -> Manifest:
    reader = CorpusReader(
        request.sources, text_field=request.text_field, skip_bad_files=request.skip_bad_files
    )
    corpus = _build_corpus(reader, request, folder / CORPUS)

    target = folder / manifests.TOKENIZER_FILE
    if tokenizer_file is not None:
        tokenizer = load_tokenizer(tokenizer_file)
        shutil.copyfile(tokenizer_file, target)
    else:
        texts = (text for _, text in _documents(corpus, "train"))
        tokenizer = train_tokenizer(texts, request.vocab_size)
        tokenizer.save(str(target))
    end_token, end_token_id = end_token_of(tokenizer, request.end_token or None)

    splits, histograms = {}, {}
    for name in ("train", "validation"):
        counts = _Counts(histogram=np.zeros(tokenizer.get_vocab_size(), np.int64))
        tokens = _tokenized(_documents(corpus, name), tokenizer, end_token_id, counts)
        windows = pack(tokens, request.sequence_length, end_token_id)
        shards = tuple(_write_shards(windows, folder, name))
        histograms[name] = counts.histogram
        splits[name] = Split(
            documents=counts.documents,
            bytes=counts.bytes,
            tokens=counts.tokens,
            windows=sum(shard.windows for shard in shards),
            shards=shards,
        )
    tokenizer_sha256 = file_sha256(target)
    manifest = Manifest(
        format=manifests.FORMAT,
        request=request,
        sequence_length=request.sequence_length,
        vocab_size=tokenizer.get_vocab_size(),
        tokenizer_sha256=tokenizer_sha256,
        end_token=end_token,
        end_token_id=end_token_id,
        skipped_files=len(set(reader.skipped)),
        unigram_entropy_nats=_cross_entropy(histograms["train"], histograms["validation"]),
        fingerprint=manifests.fingerprint(tokenizer_sha256, *splits.values()),
        **splits,
    )
    text = json.dumps(dataclasses.asdict(manifest), indent=2)
    (folder / manifests.MANIFEST_FILE).write_text(text + "\n")
    return manifest


def _build_corpus(reader: CorpusReader, request: Request, folder: Path):
    """Writes the documents as a TFDS data set and opens it."""
    # The first document is read here, so that a bad source is reported as what it is
    # rather than from within TFDS.
    if next(iter(reader), None) is None:
        raise UserError(f"--source={', '.join(request.sources)}: every document is empty")
    tfds.disable_progress_bar()
    builder = TextCorpus(
        reader=reader,
        seed=request.seed,
        validation_fraction=request.validation_fraction,
        data_dir=folder,
        file_format="array_record",
    )
    with contextlib.redirect_stdout(io.StringIO()):  # it announces paths that will not last
        builder.download_and_prepare(file_format="array_record")
    shutil.rmtree(folder / "downloads", ignore_errors=True)
    counts = {name: split.num_examples for name, split in builder.info.splits.items()}
    for name in ("train", "validation"):
        if not counts.get(name):
            raise UserError(
                f"all {sum(counts.values())} document(s) fell into one split, so {name} is "
                "empty; give more documents (a .jsonl file holds one a line), or change "
                f"--validation-fraction={request.validation_fraction} or --seed"
            )
    return builder


def _documents(corpus, split: str) -> Iterator[tuple[str, str]]:
    for example in corpus.as_data_source(split=split):
        yield example["name"].decode(), example["text"].decode()


def _tokenized(
    documents: Iterable[tuple[str, str]],
    tokenizer: Tokenizer,
    end_token_id: int,
    counts: _Counts,
) -> Iterator[list[int]]:
    iterator = iter(documents)
    while chunk := list(itertools.islice(iterator, TOKENIZE_DOCUMENTS)):
        texts = [text for _, text in chunk]
        for text, encoding in zip(
            texts, tokenizer.encode_batch_fast(texts, add_special_tokens=False), strict=True
        ):
            ids = encoding.ids
            counts.documents += 1
            counts.bytes += len(text.encode())
            counts.tokens += len(ids) + 1
            counts.histogram += np.bincount([*ids, end_token_id], minlength=len(counts.histogram))
            yield ids


def _write_shards(windows: Iterator[np.ndarray], folder: Path, split: str) -> Iterator[Shard]:
    for number in itertools.count():
        chunk = itertools.islice(windows, SHARD_WINDOWS)
        first = next(chunk, None)
        if first is None:
            return
        path = folder / f"{split}-{number:05d}.array_record"
        # Groups of one record make every record cheap to reach, in any order.
        writer = ArrayRecordWriter(str(path), "group_size:1")
        count = 0
        for window in itertools.chain([first], chunk):
            writer.write(window.astype(np.int32).tobytes())
            count += 1
        writer.close()
        yield Shard(path.name, count, file_sha256(path))


def _cross_entropy(train: np.ndarray, validation: np.ndarray) -> float:
    """Nats per validation token under the training unigrams, each counted once more."""
    log_p = np.log((train + 1) / (train.sum() + len(train)))
    return float(-(validation * log_p).sum() / validation.sum())


@contextlib.contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """Gives a hidden folder beside `output` that takes its place when the block ends well.

    What is in place stays until then; what an earlier, dead process left is removed.
    """
    output = output.absolute()
    staging = output.with_name(f".{output.name}.incomplete-{os.getpid()}")
    try:
        for stale in output.parent.glob(f".{output.name}.incomplete-*"):
            if not _alive(int(stale.name.rsplit("-", 1)[1])):
                shutil.rmtree(stale)
        staging.mkdir(parents=True)
        try:
            yield staging
            old = output.with_name(f".{output.name}.replaced-{os.getpid()}")
            if output.exists():
                output.rename(old)
            staging.rename(output)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"--output={output} cannot be written ({error.strerror or error}); free some space "
            "or take another folder"
        ) from error


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
