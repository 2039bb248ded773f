"""Records that TFDS reads too: packed windows and documents as `tf.train.Example`s.

A window's record is the bytes that every such message with one array of that length begins with,
and the array's own, so nothing is parsed to read it.
"""

import functools
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import dataset_info, naming
from tensorflow_datasets.proto import tf_example_pb2

from layerskip_jax.data.manifest import Shard

TEMPLATE = "{SPLIT}-{SHARD_INDEX}.{FILEFORMAT}"


def window_features(sequence_length: int) -> tfds.features.FeaturesDict:
    """Returns what TFDS calls a window: tokens and segment ids, [2, S + 1] int32."""
    shape = (2, sequence_length + 1)
    array = tfds.features.Tensor(shape=shape, dtype=np.int32, encoding="bytes")
    return tfds.features.FeaturesDict({"window": array})


@functools.cache
def window_head(sequence_length: int) -> bytes:
    """Returns the bytes before the array in the record of a window."""
    window = np.zeros((2, sequence_length + 1), np.int32)
    record = window_features(sequence_length).serialize_example({"window": window})
    assert record.endswith(window.tobytes())
    return record[: -window.nbytes]


@functools.cache
def document_features(has_completions: bool) -> tfds.features.FeaturesDict:
    """Returns what TFDS calls a document."""
    features = {"path": tfds.features.Text(), "text": tfds.features.Text()}
    if has_completions:
        # Where each begins and ends, in characters of the text.
        features["completions"] = tfds.features.Tensor(shape=(None, 2), dtype=np.int64)
    return tfds.features.FeaturesDict(features)


def document_record(
    path: str, text: str, completions: tuple[tuple[int, int], ...], *, has_completions: bool
) -> bytes:
    """Returns the record of a document."""
    example = {"path": path, "text": text}
    if has_completions:
        example["completions"] = np.array(completions, np.int64).reshape(-1, 2)
    record = document_features(has_completions).serialize_example(example)
    # Its fields lie in no order otherwise, and the same documents would give other bytes.
    message = tf_example_pb2.Example.FromString(record)
    return message.SerializeToString(deterministic=True)


def write_description(
    folder: Path,
    name: str,
    features: tfds.features.FeaturesDict,
    splits: dict[str, tuple[Shard, ...]],
) -> None:
    """Writes what `tfds.builder_from_directory` needs to open a folder.

    Args:
      folder: of files called SPLIT-NUMBER.array_record, numbered from 0.
      name: of the data set.
      features: of a record.
      splits: the files of each split.
    """
    template = naming.ShardedFileTemplate(
        data_dir=folder, template=TEMPLATE, dataset_name=name, filetype_suffix="array_record"
    )
    identity = dataset_info.DatasetIdentity(
        name=name,
        version=tfds.core.Version("1.0.0"),
        data_dir=str(folder),
        module_name="layerskip_jax",
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features)
    info.set_file_format("array_record")
    info.set_splits(
        tfds.core.splits.SplitDict(
            [
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[shard.windows for shard in shards],
                    num_bytes=sum(shard.bytes for shard in shards),
                    filename_template=template.replace(split=split),
                )
                for split, shards in splits.items()
                if shards
            ]
        )
    )
    info.write_to_directory(str(folder))
