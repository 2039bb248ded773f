"""From text to a folder of packed windows, all of it or nothing.

Sources are cut into units, which workers prepare one by one in a folder beside the output
(`units.py`). Whatever ends that leaves the units that are done, and the next one goes on with the
rest. Out of all units the output is put together at the end (`assembly.py`). The folder holds

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
import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from layerskip_jax.data import sources, tfds_sources
from layerskip_jax.data.assembly import Done, put_together
from layerskip_jax.data.completions import ChatTurns
from layerskip_jax.data.manifest import Manifest, PrepareOptions
from layerskip_jax.data.output_places import output_place
from layerskip_jax.data.reading import DocumentReader
from layerskip_jax.data.runners import Failure, Processes, Runner
from layerskip_jax.data.selection import scan_unit, scanned, select
from layerskip_jax.data.tokenizer import end_token_of, file_sha256, load_tokenizer, train_tokenizer
from layerskip_jax.data.unit_folder import UnitFolder
from layerskip_jax.data.units import (
    Job,
    Task,
    Unit,
    cut_units,
    finished,
    is_validation,
    left_out_of,
    make_unit,
    seeded_hash,
)
from layerskip_jax.run_folder.object_store import AnyPath, is_remote
from layerskip_jax.schema import UserError, require

logger = logging.getLogger(__name__)

SAMPLED_UNITS = 256  # that a tokenizer's text is drawn from, at most


def prepare(
    request: PrepareOptions,
    output: AnyPath,
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
      output: the folder, on a disk, gs:// or s3://. If it already holds what `request` makes,
        nothing is done; whether the text of the sources has changed since is not looked at.
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
    place = output_place(output, overwrite)
    if (existing := place.prepared()) is not None:
        _require_same(request, existing.request, output)
        again = "" if is_remote(output) else " (--overwrite reads the sources once more)"
        logger.info("%s is prepared already%s", output, again)
        return existing
    place.check()
    with place.units() as folder:
        preparation = _Preparation(
            request, folder, runner or Processes(1), chat_turns, max_failed_units
        )
        done = preparation.do_units(tokenizer_file)
        with place.staged() as target:
            return put_together(done, target)


def _require_same(request: PrepareOptions, existing: PrepareOptions, output: AnyPath) -> None:
    differing = [
        f"{field.name} {old!r} there, {new!r} asked for"
        for field in dataclasses.fields(PrepareOptions)
        if (old := getattr(existing, field.name)) != (new := getattr(request, field.name))
    ]
    if differing:
        raise UserError(
            f"--output={output} holds data prepared otherwise ({'; '.join(differing)}); take "
            f"another --output, or {'remove it' if is_remote(output) else 'pass --overwrite'}"
        )


class _Preparation:
    """One preparation of one request."""

    def __init__(
        self,
        request: PrepareOptions,
        folder: UnitFolder,
        runner: Runner,
        chat_turns: ChatTurns | None,
        max_failed_units: int,
    ):
        self._request, self._folder, self._runner = request, folder, runner
        self._chat_turns, self._max_failed = chat_turns, max_failed_units
        self._failures: list[Failure] = []

    def do_units(self, tokenizer_file: Path | None) -> Done:
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
        job = Job(self._folder, request, "", 0, self._chat_turns)
        tasks = [Task(unit, unit.key(settings)) for unit in units]
        if request.deduplicate or request.max_bytes:
            logger.info("looking through %d units", len(tasks))
            self._run(scan_unit, job, list(scanned(job, tasks)))
            failed = {failure.task.key for failure in self._failures}
            tasks = select(job, [task for task in tasks if task.key not in failed])
        name = self._tokenizer(tokenizer_file, job, tasks)
        file = self._folder.find(name)
        _, end_token_id = end_token_of(load_tokenizer(file), request.end_token or None)
        job = dataclasses.replace(job, tokenizer=name, end_token_id=end_token_id)
        sha256 = file_sha256(file)
        tasks = [Task(t.unit, t.unit.key(t.key, sha256), t.left_out) for t in tasks]
        found = finished(self._folder, [task.key for task in tasks])
        missing = [task for task in tasks if task.key not in found]
        if len(missing) < len(tasks):
            logger.info("%d of %d units are done already", len(tasks) - len(missing), len(tasks))
        logger.info("tokenizing %d units", len(missing))
        found |= self._run(make_unit, job, missing)
        done = [(task.unit, record) for task in tasks if (record := found.get(task.key))]
        named = tuple(f"{failure.task.unit}: {failure.reason}" for failure in self._failures)
        return Done(job, done, named)

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

    def _tokenizer(self, given: Path | None, job: Job, tasks: list[Task]) -> str:
        """Returns the name of a tokenizer's file: the given one, or one trained on a sample."""
        if given is not None:
            told = file_sha256(given)
        else:
            told = hashlib.sha256("".join(task.key for task in tasks).encode()).hexdigest()
        name = f"tokenizer-{told[:24]}.json"
        if name in self._folder.names():
            return name
        stage = self._folder.scratch(name)
        if given is not None:
            shutil.copyfile(given, stage)
        else:
            logger.info("training a tokenizer")
            train_tokenizer(_sample(job, tasks), self._request.vocab_size).save(str(stage))
        self._folder.put(stage, name)
        return name


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
        left_out = set(left_out_of(job, task).tolist())
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
