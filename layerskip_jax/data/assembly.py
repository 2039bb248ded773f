"""From the units of a corpus to a folder of prepared data, the manifest last.

On a disk the files of units are taken over by links, and on a store they are copied there, so no
window passes through who puts the units together, but those of documents that are held out.
"""

import dataclasses
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePath

import numpy as np
from jaxtyping import Int64

from layerskip_jax.data import manifest as manifests
from layerskip_jax.data import origins, records
from layerskip_jax.data.manifest import Manifest, NamedSplit, PrepareOptions, Shard, Split
from layerskip_jax.data.packing import Completed, Trace
from layerskip_jax.data.tokenizer import (
    end_token_of,
    file_sha256,
    load_tokenizer,
    vocabulary_size,
)
from layerskip_jax.data.unit_folder import UnitFolder
from layerskip_jax.data.units import (
    HELD_OUT,
    ORIGINS,
    TRAIN,
    VALIDATION,
    Counts,
    Job,
    Unit,
    UnitRecord,
    kept_name,
    write_shards,
)
from layerskip_jax.run_folder.atomic import write_json
from layerskip_jax.schema import UserError

logger = logging.getLogger(__name__)

DOCUMENTS = "documents"  # the documents as a TFDS data set


class EmptyError(UserError):
    """A split would have no document, however often the same is prepared."""


@dataclasses.dataclass
class Done:
    """The units of a corpus that are done, in its order.

    Attributes:
      job: what they have in common.
      units: each with its record.
      failed: the others, in words.
    """

    job: Job
    units: list[tuple[Unit, UnitRecord]]
    failed: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Output:
    """Where prepared data are put together.

    Attributes:
      folder: an empty one of this machine, for what is written here.
      place: where the files of units go: the same, or on the units' store where all goes at last.
    """

    folder: Path
    place: str

    def take(self, units: UnitFolder, name: str, target: str) -> None:
        """Takes a file of the units over, under another name."""
        units.copy(name, f"{self.place}/{target}")


def put_together(done: Done, output: Output) -> Manifest:
    """Fills an output's folder with what the units hold.

    Raises:
      UserError: no document is left in one of the splits.
    """
    job, folder = done.job, output.folder
    request, tokenizer_file = job.request, folder / manifests.TOKENIZER_FILE
    shutil.copyfile(job.folder.find(job.tokenizer), tokenizer_file)
    tokenizer = load_tokenizer(tokenizer_file)
    end_token, end_token_id = end_token_of(tokenizer, request.end_token or None)
    _require_documents(request, done)
    logger.info("putting %d units together", len(done.units))
    shards = _take_train(done, output)
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
        _take_documents(done, output)
    origins.write_units(folder, [unit for unit, _ in done.units])
    records.write_description(
        folder,
        "windows",
        records.window_features(request.sequence_length),
        {name: split.shards for name, split in splits.items()},
    )
    every = [record for _, record in done.units]
    tokenizer_sha256 = file_sha256(tokenizer_file)
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


def _require_documents(request: PrepareOptions, done: Done) -> None:
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


def _take_train(done: Done, output: Output) -> tuple[Shard, ...]:
    shards: list[Shard] = []
    (output.folder / origins.FOLDER).mkdir()
    for number, (_, record) in enumerate(done.units):
        for shard in record.shards:
            name = f"{TRAIN}-{len(shards):05d}.array_record"
            output.take(done.job.folder, f"{record.key}/{shard.name}", name)
            shards.append(dataclasses.replace(shard, name=name, unit=number))
        if record.shards:
            file = origins.file_of(PurePath(), TRAIN, number)
            output.take(done.job.folder, f"{record.key}/{ORIGINS}", str(file))
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
    request = job.request
    files = [job.folder.find(f"{record.key}/{HELD_OUT}") for _, _, record in units]
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
        job.folder.scratch(f"{name}.npy"), "w+",
        np.dtype([("token", np.int32), ("is_target", bool)]), (int(ends[-1]),),
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


def _take_documents(done: Done, output: Output) -> None:
    folder = output.folder / DOCUMENTS
    folder.mkdir()
    splits: dict[str, list[Shard]] = {}
    for unit, record in done.units:
        known = {other.name: other for other in record.others}
        for held_out in (False, True):
            if (shard := known.get(kept_name(held_out))) is None:
                continue
            split = _held_out_for(unit) if held_out else TRAIN
            mine = splits.setdefault(split, [])
            name = f"{split}-{len(mine):05d}.array_record"
            output.take(done.job.folder, f"{record.key}/{shard.name}", f"{DOCUMENTS}/{name}")
            mine.append(dataclasses.replace(shard, name=name))
    features = records.document_features(done.job.request.has_completions)
    records.write_description(
        folder, "documents", features, {name: tuple(mine) for name, mine in splits.items()}
    )


def _say_over_long(name: str, split: Split, done: Done, sequence_length: int) -> None:
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
