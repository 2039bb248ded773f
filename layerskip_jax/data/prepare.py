"""From text to a folder of packed windows, all of it or nothing.

Sources are cut into units, which workers prepare one by one in a folder beside the output
(`units.py`). Whatever ends that leaves the units that are done, and the next one goes on with the
rest. Out of all units the output is put together at the end, the manifest last. The folder holds

    manifest.json      what was asked for, what came of it, and checksums
    tokenizer.json     of the `tokenizers` library
    train-*.array_record, validation-*.array_record, and of each set that is held out by name
    dataset_info.json, features.json       by which TFDS opens the folder
    origins/           where each document was found
    documents/         the documents, as a TFDS data set, where they are kept

A record is one packed window, `[2, S + 1]` int32 in native byte order: tokens, then segment
ids (`packing.py`), after a few bytes for TFDS (`records.py`). Positions, and which tokens are
targets, are derived from the segment ids when a window is read.
"""

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from layerskip_jax.data import manifest as manifests
from layerskip_jax.data import origins, records, sources, tfds_sources
from layerskip_jax.data.completions import ChatTurns
from layerskip_jax.data.manifest import Manifest, NamedSplit, PrepareOptions, Shard, Split
from layerskip_jax.data.packing import Completed, Trace
from layerskip_jax.data.reading import DocumentReader
from layerskip_jax.data.runners import Failure, Processes, Runner, is_of_disk
from layerskip_jax.data.selection import scan_unit, scanned, select
from layerskip_jax.data.tokenizer import (
    end_token_of,
    file_sha256,
    load_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from layerskip_jax.data.units import (
    HELD_OUT,
    ORIGINS,
    TRAIN,
    VALIDATION,
    Counts,
    Job,
    Task,
    Unit,
    UnitRecord,
    cut_units,
    finished,
    is_validation,
    kept_name,
    make_unit,
    seeded_hash,
    write_shards,
)
from layerskip_jax.run_folder.atomic import remedy, staged_folder, unwritable, write_json
from layerskip_jax.schema import UserError, require

logger = logging.getLogger(__name__)

SAMPLED_UNITS = 256  # that a tokenizer's text is drawn from, at most
DOCUMENTS = "documents"  # the documents as a TFDS data set


class EmptyError(UserError):
    """A split would have no document, however often the same is prepared."""


def prepare(
    request: PrepareOptions,
    output: Path,
    *,
    tokenizer_file: Path | None = None,
    chat_turns: ChatTurns | None = None,
    overwrite: bool = False,
    runner: Runner | None = None,
    max_failed_units: int = 0,
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
      runner: who does the units; None is this process alone.
      max_failed_units: units that may fail; they are left out and named.

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

    check(output.resolve())
    with _work_folder(output) as work, _disk_errors(output):
        preparation = _Preparation(
            request, work, runner or Processes(1), chat_turns, max_failed_units
        )
        done = preparation.do_units(tokenizer_file)
        with staged_folder(output, check) as folder:
            return preparation.put_together(done, folder)


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
def _work_folder(output: Path) -> Iterator[Path]:
    """Yields the folder of the units, kept where the body fails and some units are done.

    Raises:
      UserError: another process prepares the same output, or nothing can be written there.
    """
    output = output.resolve()
    work = output.with_name(f".{output.name}.units")
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("a")
    except OSError as error:
        raise UserError(unwritable(output, error)) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--output={output} is being prepared by another process; wait for it, end it, or "
                "take another folder"
            ) from None
        except OSError as error:  # some network file systems have no locks
            logger.warning(
                "%s cannot be locked (%s); see to it that no other process prepares there",
                work, error.strerror,
            )  # fmt: skip
        for stage in work.glob("*.*/"):  # of workers that were killed
            if stage.is_dir():
                shutil.rmtree(stage, ignore_errors=True)
        try:
            yield work
        except BaseException as error:
            done = any(path.is_dir() for path in work.iterdir())
            if isinstance(error, EmptyError) or not done:
                shutil.rmtree(work, ignore_errors=True)
            else:
                logger.info("what is done is kept in %s, and the same command goes on there", work)
            raise
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _disk_errors(output: Path) -> Iterator[None]:
    """Raises as a `UserError` what the system, or a library in its own errors, says of the disk."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not is_of_disk(error):
            raise
        told = error if isinstance(error, OSError) else OSError(str(error))  # has no number then
        raise UserError(f"cannot write {output}: {error}{remedy(told)}") from error


@dataclasses.dataclass
class _Done:
    """The units of a corpus that are done, in its order.

    Attributes:
      job: what they have in common.
      units: each with its record.
      failed: the others, in words.
    """

    job: Job
    units: list[tuple[Unit, UnitRecord]]
    failed: tuple[str, ...]


class _Preparation:
    """One preparation of one request."""

    def __init__(
        self,
        request: PrepareOptions,
        work: Path,
        runner: Runner,
        chat_turns: ChatTurns | None,
        max_failed_units: int,
    ):
        self._request, self._work, self._runner = request, work, runner
        self._chat_turns, self._max_failed = chat_turns, max_failed_units
        self._failures: list[Failure] = []

    def do_units(self, tokenizer_file: Path | None) -> _Done:
        """Does the units that are not done yet.

        Raises:
          UserError: more of them fail than may.
        """
        request = self._request
        if tokenizer_file is not None:
            # Looked at already now: reading the corpus can take long.
            end_token_of(load_tokenizer(tokenizer_file), request.end_token or None)
        units = find_units(request)
        settings = json.dumps(
            {
                name: value
                for name, value in dataclasses.asdict(request).items()
                if name not in ("sources", "held_outs")
            }
        )
        job = Job(self._work, request, Path(), 0, self._chat_turns)
        tasks = [Task(unit, unit.key(settings)) for unit in units]
        if request.deduplicate or request.max_bytes:
            logger.info("looking through %d units", len(tasks))
            self._run(scan_unit, job, list(scanned(job, tasks)))
            failed = {failure.task.key for failure in self._failures}
            tasks = select(job, [task for task in tasks if task.key not in failed])
        file = self._tokenizer(tokenizer_file, job, tasks)
        tokenizer = load_tokenizer(file)
        _, end_token_id = end_token_of(tokenizer, request.end_token or None)
        job = dataclasses.replace(job, tokenizer=file, end_token_id=end_token_id)
        sha256 = file_sha256(file)
        tasks = [Task(t.unit, t.unit.key(t.key, sha256), t.left_out) for t in tasks]
        found = {task.key: finished(self._work, task.key) for task in tasks}
        missing = [task for task in tasks if found[task.key] is None]
        if len(missing) < len(tasks):
            logger.info("%d of %d units are done already", len(tasks) - len(missing), len(tasks))
        logger.info("tokenizing %d units", len(missing))
        found |= self._run(make_unit, job, missing)
        done = [(task.unit, record) for task in tasks if (record := found[task.key]) is not None]
        named = tuple(f"{failure.task.unit}: {failure.reason}" for failure in self._failures)
        return _Done(job, done, named)

    def _run(self, work: Callable, job: Job, tasks: list[Task]) -> dict[str, Any]:
        results: dict[str, Any] = {}

        def done(task: Task, result: Any) -> None:
            results[task.key] = result

        self._runner.run(work, job, tasks, done, self._fail)
        return results

    def _fail(self, failure: Failure) -> None:
        """Takes note of a unit that failed.

        Raises:
          UserError: it is one more than may fail.
          OSError: the disk is full.
        """
        if failure.is_disk:
            raise OSError(failure.reason)
        self._failures.append(failure)
        if len(self._failures) <= self._max_failed:
            logger.warning("left out: %s: %s", failure.task.unit, failure.reason)
            return
        if failure.is_input and not self._max_failed:
            raise UserError(failure.reason)
        named = "; ".join(f"{f.task.unit}: {f.reason}" for f in self._failures[:5])
        raise UserError(
            f"{len(self._failures)} units failed, more than --max-failed-units={self._max_failed} "
            f"({named}); see to them and give the same command once more, or allow more"
        )

    def _tokenizer(self, given: Path | None, job: Job, tasks: list[Task]) -> Path:
        """Returns the tokenizer's file: a copy of the given one, or one trained on a sample."""
        if given is not None:
            file = self._work / manifests.TOKENIZER_FILE
            shutil.copyfile(given, file)
            return file
        told = hashlib.sha256("".join(task.key for task in tasks).encode()).hexdigest()
        file = self._work / f"tokenizer-{told[:24]}.json"
        if not file.is_file():
            logger.info("training a tokenizer")
            tokenizer = train_tokenizer(_sample(job, tasks), self._request.vocab_size)
            stage = file.with_suffix(".new")
            tokenizer.save(str(stage))
            os.replace(stage, file)
        return file

    def put_together(self, done: _Done, folder: Path) -> Manifest:
        """Fills the output's folder with what the units hold.

        Raises:
          UserError: no document is left in one of the splits.
        """
        request, job = self._request, done.job
        shutil.copyfile(job.tokenizer, folder / manifests.TOKENIZER_FILE)
        tokenizer = load_tokenizer(job.tokenizer)
        end_token, end_token_id = end_token_of(tokenizer, request.end_token or None)
        _require_documents(request, done)
        logger.info("putting %d units together", len(done.units))
        shards = _take_train(self._work, done.units, folder)
        names = dict.fromkeys([VALIDATION, *(_held_out_for(unit) for unit, _ in done.units)])
        splits, entropy = {}, 0.0
        train = sum((record.train for _, record in done.units), Counts())
        splits[TRAIN] = _split(request, train, shards)
        for name in names:
            mine = [
                (number, unit, record)
                for number, (unit, record) in enumerate(done.units)
                if _held_out_for(unit) == name and record.held_out.documents
            ]
            histogram = np.zeros(vocabulary_size(tokenizer), np.int64)
            held = _take_held_out(job, mine, folder, name, histogram)
            counts = sum((record.held_out for _, _, record in mine), Counts())
            splits[name] = _split(request, counts, held)
            if name == VALIDATION:
                entropy = _entropy(histogram)
        for name, split in splits.items():
            _say_over_long(name, split, done, request.sequence_length)
        if request.keep_documents:
            _take_documents(self._work, done.units, folder / DOCUMENTS, request)
        origins.write_units(folder, [unit for unit, _ in done.units])
        records.write_description(
            folder,
            "windows",
            records.window_features(request.sequence_length),
            {name: split.shards for name, split in splits.items()},
        )
        every = [record for _, record in done.units]
        tokenizer_sha256 = file_sha256(job.tokenizer)
        largest = [c.largest_token for r in every for c in (r.train, r.held_out)]
        for name in [name for record in every for name in record.skipped_names][:5]:
            logger.warning("left out: %s", name)
        manifest = Manifest(
            format=manifests.FORMAT,
            request=request,
            sequence_length=request.sequence_length,
            vocab_size=vocabulary_size(tokenizer),
            tokenizer_sha256=tokenizer_sha256,
            end_token=end_token,
            end_token_id=end_token_id,
            skipped_files=sum(record.skipped for record in every),
            largest_token=max(end_token_id, *largest),
            unigram_entropy_nats=entropy,
            fingerprint=manifests.fingerprint(tokenizer_sha256, *splits.values()),
            train=splits.pop(TRAIN),
            validation=splits.pop(VALIDATION),
            held_out=tuple(NamedSplit(name, split) for name, split in splits.items()),
            filtered=sum(record.filtered for record in every),
            duplicates=sum(record.duplicates for record in every),
            failed_units=done.failed,
        )
        write_json(folder / manifests.MANIFEST_FILE, dataclasses.asdict(manifest))
        return manifest


def find_units(request: PrepareOptions) -> list[Unit]:
    """Returns the units of a request, in the order of its sources and their paths.

    Raises:
      UserError: a source that does not exist or matches nothing, or a file that two sources match.
    """
    logger.info("looking for %s", ", ".join(request.sources))
    found_by: dict[str, str] = {}
    result: list[Unit] = []
    with_fields = request.needs_fields
    named = [("", source) for source in request.sources]
    named += [tuple(rule.split("=", 1)) for rule in request.held_outs]
    for held_out, source in named:
        if source.startswith(sources.TFDS_PREFIX):
            pieces = tfds_sources.find(source)
        else:
            files, others = sources.find_files(source, with_fields=with_fields)
            if others:
                _say_left_out(source, others, with_fields)
            for file in files:
                # Read twice, a text would be trained on twice.
                place = file.url if "://" in file.url else str(Path(file.url).resolve())
                if (other := found_by.setdefault(place, source)) != source:
                    raise UserError(
                        f"{file.url} is matched by both --source={other} and --source={source}; "
                        "leave it out of one"
                    )
            pieces = sources.pieces(files, request.unit_bytes)
        result += cut_units(pieces, request.unit_bytes, held_out)
    return result


def _say_left_out(source: str, others: collections.Counter[str], with_fields: bool) -> None:
    logger.warning(
        "--source=%s: %d files are left out (%s); a folder is searched for %s",
        source, others.total(),
        ", ".join(f"{kind} {count}" for kind, count in others.most_common(5)),
        sources.searched_endings(with_fields),
    )  # fmt: skip


def _sample(job: Job, tasks: Sequence[Task]) -> Iterator[str]:
    """Yields the text to train a tokenizer on: all there is, or as much as was asked for at most.

    Of more, units are drawn, of which each source has its share on average, and the first texts of
    each are taken. What is held out is no part of it.
    """
    request = job.request
    units = [task for task in tasks if not task.unit.held_out]
    total = sum(piece.bytes for task in units for piece in task.unit.pieces)
    if total > request.tokenizer_bytes:
        # By draws and not by place: the units of a source lie one after the other.
        units = sorted(units, key=lambda task: _draw(request.seed, task.unit))[:SAMPLED_UNITS]
    quota = -(-request.tokenizer_bytes // max(len(units), 1))
    plain = all(sources.is_plain(piece) for task in units for piece in task.unit.pieces)
    if total <= request.tokenizer_bytes and plain:
        quota = request.tokenizer_bytes  # units differ in size, and all of them fit
    for task in units:
        left_out = set() if task.left_out is None else set(np.load(task.left_out).tolist())
        reader, taken = DocumentReader(request, job.chat_turns), 0
        try:
            for number, document in enumerate(reader.read(list(task.unit.pieces))):
                if number in left_out or is_validation(
                    document.digest.hex(), request.seed, request.validation_fraction
                ):
                    continue
                taken += len(document.text)
                yield document.text
                if taken >= quota:
                    break
        except UserError as error:
            # Whoever makes the unit says so too, where that ends the preparation.
            logger.warning("%s; the tokenizer is trained without the rest of it", error)


def _draw(seed: int, unit: Unit) -> int:
    """Returns a number drawn for a unit, which is the same wherever its files lie."""
    first = unit.pieces[0]
    return seeded_hash(seed, f"{first.path}:{first.begin}")


def _require_documents(request: PrepareOptions, done: _Done) -> None:
    trained = sum(record.train.documents for unit, record in done.units)
    held_out = sum(record.held_out.documents for unit, record in done.units if not unit.held_out)
    over_long = sum(r.train.over_long + r.held_out.over_long for _, r in done.units)
    filtered = sum(record.filtered for _, record in done.units)
    total = trained + held_out
    if total + over_long == 0:
        why = f"{filtered:,} are left out by the filters, and " if filtered else ""
        raise EmptyError(f"--source={', '.join(request.sources)}: {why}every document is blank")
    for name, count in ((TRAIN, trained), (VALIDATION, held_out)):
        longer = sum(
            (record.train if name == TRAIN else record.held_out).over_long
            for unit, record in done.units
            if name == TRAIN or not unit.held_out
        )
        if count == 0 and longer == 0:
            raise EmptyError(
                f"none of {total} document(s) fell into the {name} split; give "
                "more documents (a .jsonl file holds one a line), or change "
                f"--validation-fraction={request.validation_fraction} or --seed={request.seed}"
            )
    for name in {unit.held_out for unit, _ in done.units} - {""}:
        if not any(r.held_out.documents for unit, r in done.units if unit.held_out == name):
            raise EmptyError(f"--held-out={name}=... has no document that is not blank")


def _held_out_for(unit: Unit) -> str:
    """Returns the name of the set that a unit's held-out documents belong to."""
    return unit.held_out or VALIDATION


def _split(request: PrepareOptions, counts: Counts, shards: tuple[Shard, ...]) -> Split:
    return Split(
        documents=counts.documents,
        bytes=counts.bytes,
        tokens=counts.tokens,
        windows=sum(shard.windows for shard in shards),
        shards=shards,
        over_long=counts.over_long,
        targets=counts.targets if request.has_completions else -1,
    )


def _link(file: Path, target: Path) -> None:
    """Puts a file where it belongs too, without a second copy where the disk can."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def _take_train(
    work: Path, units: Sequence[tuple[Unit, UnitRecord]], folder: Path
) -> tuple[Shard, ...]:
    shards: list[Shard] = []
    (folder / origins.FOLDER).mkdir()
    for number, (_, record) in enumerate(units):
        for shard in record.shards:
            name = f"{TRAIN}-{len(shards):05d}.array_record"
            _link(work / record.key / shard.name, folder / name)
            shards.append(dataclasses.replace(shard, name=name, unit=number))
        if record.shards:
            _link(work / record.key / ORIGINS, origins.file_of(folder, TRAIN, number))
    return tuple(shards)


def _take_held_out(
    job: Job,
    units: Sequence[tuple[int, Unit, UnitRecord]],
    folder: Path,
    name: str,
    histogram: Int64[np.ndarray, "V"],
) -> tuple[Shard, ...]:
    """Packs the documents that units hold out, in an order that their hashes draw.

    Holds 40 bytes a document. Each unit is read once: its ids go to where the order has them in a
    file beside the units, which is read from its beginning then.
    """
    request, files = job.request, [job.folder / record.key / HELD_OUT for _, _, record in units]
    index = []
    for place, file in enumerate(files):
        with np.load(file) as arrays:
            lengths, digests = arrays["lengths"], arrays["digests"]
            begins = np.cumsum(lengths) - lengths
            index.append(
                np.stack(
                    [
                        digests[:, 0].view(np.int64), np.full(len(lengths), place), begins,
                        lengths, np.arange(len(lengths)),
                    ],
                    axis=1,
                )
            )  # fmt: skip
    if not index:  # all documents are longer than a window
        return ()
    every = np.concatenate(index)
    every = every[np.lexsort((every[:, 4], every[:, 1], every[:, 0]))]

    ends = np.cumsum(every[:, 3])
    gathered = np.lib.format.open_memmap(
        job.folder / f"{name}.npy", "w+", np.dtype([("token", np.int32), ("is_target", bool)]),
        (int(ends[-1]),),
    )  # fmt: skip
    found = np.empty((len(every), 3), np.int64)  # the origin of each document
    by_unit = np.argsort(every[:, 1], kind="stable")
    bounds = np.searchsorted(every[by_unit, 1], np.arange(1, len(files)))
    for place, rows in enumerate(np.split(by_unit, bounds)):
        with np.load(files[place]) as arrays:
            tokens, targets, places = (arrays[n] for n in ("tokens", "targets", "origins"))
        for row in rows.tolist():
            _, _, begin, count, at = every[row].tolist()
            there, here = slice(ends[row] - count, ends[row]), slice(begin, begin + count)
            gathered["token"][there] = tokens[here]
            if request.has_completions:
                gathered["is_target"][there] = targets[here]
            found[row] = units[place][0], *places[at]

    def documents():
        for end, count, origin in zip(ends.tolist(), every[:, 3].tolist(), found, strict=True):
            tokens = np.array(gathered["token"][end - count : end])
            if request.has_completions:
                is_target = np.array(gathered["is_target"][end - count : end])
                np.add.at(histogram, tokens[is_target], 1)
                yield Completed(tokens, is_target), tuple(origin.tolist())
            else:
                np.add.at(histogram, tokens, 1)
                histogram[job.end_token_id] += 1
                yield tokens, tuple(origin.tolist())

    trace, size = Trace(), request.sequence_length
    make = trace.pack_whole if request.has_completions else trace.pack
    windows = make(documents(), size, job.end_token_id)
    shards = tuple(write_shards(windows, folder, name, size))
    trace.save(origins.file_of(folder, name))
    return shards


def _take_documents(
    work: Path, units: Sequence[tuple[Unit, UnitRecord]], folder: Path, request: PrepareOptions
) -> None:
    folder.mkdir()
    splits: dict[str, list[Shard]] = {}
    for unit, record in units:
        known = {other.name: other for other in record.others}
        for held_out in (False, True):
            if (shard := known.get(kept_name(held_out))) is None:
                continue
            split = _held_out_for(unit) if held_out else TRAIN
            mine = splits.setdefault(split, [])
            name = f"{split}-{len(mine):05d}.array_record"
            _link(work / record.key / shard.name, folder / name)
            mine.append(dataclasses.replace(shard, name=name))
    features = records.document_features(request.has_completions)
    records.write_description(
        folder, "documents", features, {name: tuple(mine) for name, mine in splits.items()}
    )


def _say_over_long(name: str, split: Split, done: _Done, sequence_length: int) -> None:
    """Logs how many documents were left out.

    Raises:
      UserError: all of them were.
    """
    if not split.over_long:
        return
    longest = max(max(r.train.longest, r.held_out.longest) for _, r in done.units)
    about = (
        f"{split.over_long:,} of the {name} split's {split.over_long + split.documents:,} "
        f"documents are longer than --sequence-length={sequence_length} and the token after it, "
        f"the longest of all {longest:,} tokens"
    )
    if not split.documents:
        raise EmptyError(f"{about}; none is left, so give a longer one")
    logger.warning("%s; they are left out", about)


def _entropy(histogram: Int64[np.ndarray, "V"]) -> float:
    """Returns the entropy of tokens counted by id, in nats a token."""
    p = histogram[histogram > 0] / histogram.sum()
    return float(-(p * np.log(p)).sum())
