"""A Hugging Face model folder: sharded safetensors, configuration, tokenizer and model card."""

import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from layerskip_jax.interop.exits_file import EXITS_FILE
from layerskip_jax.interop.huggingface import (
    default_token_id,
    tensor_shapes,
    to_hugging_face_config,
)
from layerskip_jax.interop.pretrained import FILES, end_token_ids
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.run_folder.atomic import remedy, staged_folder
from layerskip_jax.schema import UserError

DEFAULT_SHARD_BYTES = 4 * 2**30
PROVENANCE = "layerskip"  # the key of config.json by which an export is known as ours

_SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_OUR_FILES = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|README\.md"
    r"|tokenizer\.json|exits\.safetensors|" + "|".join(map(re.escape, FILES))
)


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Raises `UserError` unless `folder` is absent, empty, or an export to be overwritten.

    Only a folder with nothing in it but what `write_folder` puts there is overwritten.
    """
    try:
        names = {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"--output={folder} cannot be a folder: {error}") from error
    if not names:
        return
    foreign = sorted(name for name in names if not _OUR_FILES.fullmatch(name))
    if foreign or not _has_provenance(folder / "config.json"):
        found = foreign[0] if foreign else "a model from elsewhere"
        raise UserError(
            f"--output={folder} holds {found}, which `layerskip export` did not write; "
            "name another folder"
        )
    if not overwrite:
        raise UserError(
            f"--output={folder} holds an export already; replace it with --overwrite, or name "
            "another folder"
        )


def check_tokenizer(
    file: Path, config: ModelConfig, end_token: str, end_token_id: int
) -> Tokenizer:
    """Returns a tokenizer, checked to belong to a model.

    The model may have more rows than the tokenizer has tokens, since vocabularies are padded; and
    the last tokens may have none but rows of padding (see `pretrained.with_rows_for`).

    Raises:
      UserError: the file cannot be read, has a token that the embedding has no row for, or
        has `end_token` under another id than `end_token_id`.
    """
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more specific
        raise UserError(f"cannot read the tokenizer {file}: {error}") from error
    token, largest = max(
        tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1]
    )
    if largest >= config.vocab_rows:
        raise UserError(
            f"the tokenizer {file} is larger than the model: its token {token!r} has id "
            f"{largest}, and the embedding has {config.vocab_rows} rows"
        )
    if tokenizer.token_to_id(end_token) != end_token_id:
        raise UserError(
            f"the end token {end_token!r} has id {tokenizer.token_to_id(end_token)} in {file}, "
            f"but the model was trained with {end_token_id}"
        )
    return tokenizer


def write_folder(
    folder: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    config: ModelConfig,
    tokenizer_file: Path,
    end_token: str,
    end_token_id: int,
    model_card: str,
    provenance: dict[str, Any],
    published: dict[str, bytes] | None = None,
    exits: bytes = b"",
    dtype: str = "float32",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
) -> dict[str, int]:
    """Writes a folder that `transformers` loads, holding one tensor in memory at a time.

    The folder appears when it is complete, see `staged_folder`.

    Args:
      folder: where to; absent or empty, or an earlier export if `overwrite` is given.
      tensors: what `to_hugging_face` yields.
      config: the shapes.
      tokenizer_file: a `tokenizer.json`, see `check_tokenizer`.
      end_token: the token that ends a document.
      end_token_id: its id.
      model_card: text of `README.md`.
      provenance: where the model comes from; kept in `config.json` under `PROVENANCE`.
      published: files by name of the published model that the run began from: what they say of
        tokenizer, chat and generation stays as it was.
      exits: content of `EXITS_FILE`; empty where the model has no exits of its own.
      dtype: what the tensors are cast to, one of `huggingface.STORED_DTYPES`.
      max_shard_bytes: tensor bytes in a file; only a tensor larger than that exceeds it.
      overwrite: whether an earlier export may be replaced.

    Returns:
      Counts of `parameters`, `bytes` of tensors, and `shards`.

    Raises:
      UserError: the folder stands in the way or cannot be written, the tokenizer does not fit,
        or a value does not fit `dtype`.
    """
    published = published or {}
    tokenizer = check_tokenizer(tokenizer_file, config, end_token, end_token_id)
    settings = _settings(config, published, folder, end_token_id, dtype)
    begin = settings["bos_token_id"]
    # Only what is said: a class's default id need not be special in this tokenizer.
    said = json.loads(published.get("config.json", b"{}")).get("bos_token_id")
    begin_token = tokenizer.id_to_token(said) if type(said) is int and said >= 0 else None

    def check(path: Path) -> None:
        check_output(path, overwrite=overwrite)

    with staged_folder(folder, check) as stage:
        counts = _write_weights(stage, tensors, config, dtype, max_shard_bytes, indexed=bool(exits))
        if exits:
            (stage / EXITS_FILE).write_bytes(exits)
        shutil.copyfile(tokenizer_file, stage / "tokenizer.json")
        if "tokenizer_config.json" not in published:
            described = _tokenizer_settings(config, end_token, begin_token)
            _write_json(stage / "tokenizer_config.json", described)
        for name in published.keys() - {"config.json", "generation_config.json"}:
            (stage / name).write_bytes(published[name])
        generation = {
            "bos_token_id": begin,
            # Finished rows of a batch are filled with it; training has no padding token.
            "pad_token_id": end_token_id,
            **json.loads(published.get("generation_config.json", b"{}")),
            "eos_token_id": settings["eos_token_id"],
        }
        _write_json(stage / "generation_config.json", generation)
        (stage / "README.md").write_text(model_card, encoding="utf-8")
        # Last: without it the folder does not load, should the process be killed before.
        _write_json(stage / "config.json", {**settings, PROVENANCE: provenance})
    return counts


def _settings(
    config: ModelConfig, published: dict[str, bytes], folder: Path, end_token_id: int, dtype: str
) -> dict[str, Any]:
    """Returns config.json without the provenance."""
    # What the run was trained to end with ends a text, and what ended one before still does.
    known = end_token_ids(published, folder)
    end_ids = known if end_token_id in known else [end_token_id, *known]
    end_ids = end_ids[0] if len(end_ids) == 1 else end_ids
    before = json.loads(published.get("config.json", b"{}"))
    settings = to_hugging_face_config(
        config,
        eos_token_id=end_ids,
        bos_token_id=default_token_id(before, "bos_token_id"),
        dtype=dtype,
    )
    settings["pad_token_id"] = default_token_id(before, "pad_token_id")
    return settings


def _tokenizer_settings(
    config: ModelConfig, end_token: str, begin_token: str | None
) -> dict[str, Any]:
    """Returns tokenizer_config.json."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end_token,
        "model_max_length": config.max_sequence_length,
        # `generate` refuses the token types that the class adds when this is left out.
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    return settings if begin_token is None else settings | {"bos_token": begin_token}


def _write_weights(
    stage: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    config: ModelConfig,
    dtype: str,
    max_shard_bytes: int,
    indexed: bool,
) -> dict[str, int]:
    """Writes the shards and, if there are several or `indexed` asks for it, their index.

    Some clients read every safetensors file of a folder unless an index names those of the model.
    """
    shapes = tensor_shapes(config)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    itemsize = jnp.dtype(dtype).itemsize
    shards = list(_split(sizes, max_shard_bytes // itemsize))
    counts = {
        "parameters": sum(sizes.values()),
        "bytes": sum(sizes.values()) * itemsize,
        "shards": len(shards),
    }
    tensors = iter(tensors)
    file_of = {}
    for number, names in enumerate(shards, start=1):
        several = len(shards) > 1
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if several else _WEIGHTS
        path = stage / file
        of_shard = {name: shapes[name] for name in names}
        _write_shard(path, tensors, of_shard, dtype)
        file_of.update(dict.fromkeys(names, file))
    if len(shards) > 1 or indexed:
        metadata = {"total_size": counts["bytes"], "total_parameters": counts["parameters"]}
        _write_json(stage / _INDEX, {"metadata": metadata, "weight_map": file_of})
    return counts


def _write_shard(
    path: Path,
    tensors: Iterator[tuple[str, np.ndarray]],
    shapes: dict[str, tuple[int, ...]],
    dtype: str,
) -> None:
    """Writes a safetensors file, one tensor in memory at a time.

    The format is a header of JSON, its length before it in 8 bytes, and the tensors one after
    another; safetensors' own writer wants all of them at once.
    """
    itemsize, header, end = jnp.dtype(dtype).itemsize, {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * itemsize
        code = _SAFETENSORS_DTYPES[dtype]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for expected, shape in shapes.items():
            name, tensor = next(tensors, (None, None))
            if name != expected or tensor.shape != shape:
                raise ValueError(f"expected the tensor {expected} {shape}, got {name}")
            file.write(_cast(name, tensor, dtype).reshape(-1).view(np.uint8).data)


def _split(sizes: dict[str, int], limit: int) -> Iterator[list[str]]:
    """Yields the names of each shard, in order, each shard as full as `limit` scalars allow."""
    names, total = [], 0
    for name, size in sizes.items():
        if names and total + size > limit:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names


def _cast(name: str, tensor: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # reported below, with the tensor's name
        # safetensors writes the memory as it lies, so a transposed view must be copied.
        cast = np.ascontiguousarray(tensor, dtype=jnp.dtype(dtype))
    if not np.isfinite(cast).all():
        largest = np.abs(tensor).max()
        raise UserError(
            f"{name} holds values that are not finite in {dtype} (the largest is {largest})"
        )
    return cast


def _has_provenance(config_file: Path) -> bool:
    try:
        settings = json.loads(config_file.read_text())
    except (FileNotFoundError, ValueError):
        return False
    except OSError as error:
        raise UserError(f"{config_file} cannot be read ({error}){remedy(error)}") from error
    return isinstance(settings, dict) and PROVENANCE in settings


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
