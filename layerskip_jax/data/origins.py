"""Where the documents of a window were found."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np

from layerskip_jax.data.manifest import Manifest
from layerskip_jax.data.sources import Piece
from layerskip_jax.data.units import TRAIN, Unit
from layerskip_jax.schema import UserError, build

FOLDER = "origins"
UNITS = "units.ndjson"  # an ending that a folder of sources is not searched for


class Origin(NamedTuple):
    """Where a document that a window holds a part of was found.

    Attributes:
      piece: of which file.
      place: the byte where its line begins, once unpacked; the number of its row, from 0.
      begin: the token of the document that the window begins with, 0 where it begins in the window.
      tokens: how many of its tokens the window holds.
    """

    piece: Piece
    place: int
    begin: int
    tokens: int


def file_of(folder: PurePath, split: str, unit: int | None = None) -> PurePath:
    """Returns the file with the origins of a unit, or of a whole split that is held out."""
    name = f"{split}.npz" if unit is None else f"{split}-{unit:05d}.npz"
    return folder / FOLDER / name


def write_units(folder: Path, units: Sequence[Unit]) -> None:
    """Writes what each unit read, one a line."""
    with (folder / FOLDER / UNITS).open("w", encoding="utf-8") as file:
        for unit in units:
            file.write(json.dumps(dataclasses.asdict(unit)) + "\n")


def _read_unit(folder: Path, number: int) -> Unit:
    with (folder / FOLDER / UNITS).open(encoding="utf-8") as file:
        for at, line in enumerate(file):
            if at == number:
                return build(Unit, json.loads(line), str(file.name))
    raise UserError(f"{folder / FOLDER / UNITS} has no unit {number}; prepare the data again")


def find(folder: Path, manifest: Manifest, split: str, window: int) -> list[Origin]:
    """Returns where the documents of a window were found, in their order.

    Args:
      folder: prepared data.
      manifest: of these.
      split: the window's.
      window: its number in the split.

    Raises:
      UserError: the data were prepared before origins were kept, or are damaged.
    """
    size = manifest.sequence_length
    stride = size + 1 if manifest.request.has_completions else size
    unit, number = None, window
    if split == TRAIN:
        first = 0
        for shard in manifest.split(split).shards:
            if unit is None or shard.unit != unit:
                unit, number = shard.unit, window - first
            first += shard.windows
            if window < first:
                break
    file = file_of(folder, split, unit)
    try:
        with np.load(file) as arrays:
            starts, lengths, origins = (arrays[n] for n in ("starts", "lengths", "origins"))
    except FileNotFoundError:
        raise UserError(
            f"{folder} does not tell where its documents are from; it was prepared by an older "
            "version, so prepare it again"
        ) from None
    begin, end = number * stride, number * stride + size + 1
    # The last document that begins at or before the window does reaches into it, if any does.
    first = max(int(np.searchsorted(starts, begin, side="right")) - 1, 0)
    last = int(np.searchsorted(starts, end, side="left"))
    result = []
    for at in range(first, last):
        begins = int(starts[at])
        held = min(begins + int(lengths[at]), end) - max(begins, begin)
        *where, piece, place = origins[at].tolist()
        read = _read_unit(folder, where[0] if where else unit or 0)
        if held > 0:
            result.append(Origin(read.pieces[piece], place, max(begin - begins, 0), held))
    return result
