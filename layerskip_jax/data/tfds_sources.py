"""TFDS data sets on this disk as sources, read without TensorFlow and without their code."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder

from layerskip_jax.data.shards import read_range
from layerskip_jax.data.sources import TFDS_PREFIX, Piece
from layerskip_jax.schema import UserError


def find(source: str) -> list[Piece]:
    """Returns the shards of a split.

    Args:
      source: `tfds:NAME_OR_FOLDER[:SPLIT]`; the split is `train` where none is named.

    Raises:
      UserError: there is no such data set or split on this disk, in array_record format.
    """
    folder, _, split = source.removeprefix(TFDS_PREFIX).partition(":")
    split = split or "train"
    try:
        builder = _builder(folder)
        builder.as_data_source(split=split)  # which checks the format and the split
    except Exception as error:  # TFDS raises many kinds, all about what was asked for
        raise UserError(
            f"--source={source}: {folder} is no folder or name of a TFDS data set on this "
            f"disk, in array_record format, with the split {split!r} ({error})"
        ) from error
    result = []
    for part in builder.info.splits[split].file_instructions:
        try:
            stat = Path(part.filename).stat()
        except OSError as error:
            raise UserError(
                f"--source={source}: {part.filename} cannot be read ({error.strerror}); make the "
                "data set anew"
            ) from error
        piece = Piece(
            path=f"{builder.name}:{split}:{Path(part.filename).name}",
            url=str(part.filename),
            size=stat.st_size,
            version=str(stat.st_mtime_ns),
            kind="tfds",
            begin=part.skip,
            end=part.skip + part.take,
            about=str(builder.data_path),
            bytes=int(stat.st_size * part.take / max(part.examples_in_shard, 1)),
        )
        result.append(piece)
    return result


@functools.cache
def _builder(folder: str) -> tfds.core.DatasetBuilder:
    if Path(folder).is_dir():
        return tfds.builder_from_directory(folder)
    # From its files and not its code, which is only needed to make it.
    return read_only_builder.builder_from_files(folder)


def examples(
    file: str, folder: str, begin: int, end: int
) -> tuple[list[str], Iterator[tuple[int, Mapping[str, Any]]]]:
    """Returns the fields of a data set, and the numbered examples of a part of one shard.

    Args:
      file: the shard.
      folder: of the data set.
      begin: the first example, counted in the shard.
      end: what follows the last.
    """
    features = _builder(folder).info.features

    def rows():
        for number, record in enumerate(read_range(file, begin, end), start=begin):
            yield number, features.deserialize_example_np(record)

    return sorted(features), rows()
