"""Exit adapters and the learned exit as a file of their own, beside a published model.

Tensors in float32, outputs before inputs as torch's `Linear` has them; E is the exit, D the model's
width, r the rank:

    exits.E.norm.weight    [D]       scale of the exit's own norm
    exits.E.down.weight    [r, D]    A, transposed
    exits.E.up.weight      [D, r]    B, transposed
    classifier.weight      [1, D]    the learned exit, one for all exits
    classifier.bias        [1]

The header's metadata has `format` (`layerskip-exits-1`), `exits` (`8,12,15`; empty for the learned
exit alone), `rank`, `learned` (`true` or `false`) and `target`, see `ExitsConfig`.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from layerskip_jax.model.config import ModelConfig
from layerskip_jax.model.exits import ExitsConfig
from layerskip_jax.run_folder.atomic import remedy
from layerskip_jax.schema import ConfigError, UserError

EXITS_FILE = "exits.safetensors"  # in a folder; MODEL.exits.safetensors beside MODEL.gguf
_FORMAT = "layerskip-exits-1"


def exits_shapes(config: ExitsConfig, dim: int) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor of the file, given the model's width."""
    shapes: dict[str, tuple[int, ...]] = {}
    for exit_layer in config.adapters:
        shapes[f"exits.{exit_layer}.norm.weight"] = (dim,)
        shapes[f"exits.{exit_layer}.down.weight"] = (config.rank, dim)
        shapes[f"exits.{exit_layer}.up.weight"] = (dim, config.rank)
    if config.learned:
        shapes |= {"classifier.weight": (1, dim), "classifier.bias": (1,)}
    return shapes


def exits_bytes(exits: dict[str, Any], config: ExitsConfig) -> bytes:
    """Returns the content of the file.

    Args:
      exits: the parameters of `model.adapters.Exits` by name; arrays, also on disk.
      config: what they are.

    Raises:
      UserError: one holds a number that is not finite.
    """

    def whole(name: str) -> np.ndarray:
        array = exits[name]
        value = np.asarray(array[tuple(slice(size) for size in array.shape)], np.float32)
        if not np.isfinite(value).all():
            raise UserError(
                f"the parameter exits.{name} holds a number that is not finite; take another "
                "checkpoint (--step)"
            )
        return value

    tensors = {}
    if config.adapters:
        scale, down, up = whole("scale"), whole("down"), whole("up")
        for index, exit_layer in enumerate(config.adapters):
            tensors[f"exits.{exit_layer}.norm.weight"] = scale[index]
            tensors[f"exits.{exit_layer}.down.weight"] = down[index].T
            tensors[f"exits.{exit_layer}.up.weight"] = up[index].T
    if config.learned:
        tensors["classifier.weight"] = whole("weight")[None]
        tensors["classifier.bias"] = whole("score_bias")
    metadata = {
        "format": _FORMAT,
        "exits": ",".join(map(str, config.adapters)),
        "rank": str(config.rank),
        "learned": str(config.learned).lower(),
        "target": config.target,
    }
    return _safetensors(tensors, metadata)


def _safetensors(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """Returns a file of float32 tensors, the same bytes every time.

    A header of JSON, its length before it in 8 bytes, and the tensors one after another. What
    safetensors itself writes has the metadata in an order drawn anew.
    """
    header, end = {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    values = [np.ascontiguousarray(t, "<f4").tobytes() for t in tensors.values()]
    return b"".join([len(text).to_bytes(8, "little"), text, *values])


def open_exits(file: Path, model: ModelConfig) -> ExitsConfig:
    """Returns what exits a file holds, checked to be those of a model of this shape.

    Raises:
      UserError: it is damaged, another kind of file, or made for another model.
    """
    try:
        with safe_open(file, "numpy") as opened:
            metadata = opened.metadata() or {}
            found = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
            kinds = {name: opened.get_slice(name).get_dtype() for name in found}
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error}){remedy(error)}") from error
    except SafetensorError as error:
        raise UserError(
            f"{file} is damaged or cut short ({error}); export it again, or move it away"
        ) from error
    config = _described(file, metadata)
    try:
        config.check_layers(model.num_layers)
    except ConfigError as error:
        raise UserError(f"{file} is of another model than the one beside it: {error}") from error
    expected = exits_shapes(config, model.model_dim)
    wrong = [
        f"{name} is {found[name]}, and the model makes it {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    wrong += [f"missing: {name} {expected[name]}" for name in expected.keys() - found.keys()]
    wrong += [f"unknown: {name} {found[name]}" for name in found.keys() - expected.keys()]
    wrong += [f"{name} is stored as {kind}, not as F32" for name, kind in kinds.items()
              if kind != "F32"]  # fmt: skip
    if wrong:
        raise UserError(
            f"{file} does not fit the model beside it; take the one that was exported with the "
            "model, or move it away:\n  " + "\n  ".join(sorted(wrong))
        )
    return config


def _described(file: Path, metadata: dict[str, str]) -> ExitsConfig:
    """Returns what the header says of the exits."""
    if metadata.get("format") != _FORMAT:
        raise UserError(
            f"{file} has the format {metadata.get('format')!r}, and {_FORMAT!r} is read: it is no "
            "file of exit adapters, or a newer one; move it away"
        )
    try:
        if metadata["learned"] not in ("true", "false"):
            raise ValueError(f"learned={metadata['learned']!r}")
        return ExitsConfig(
            adapters=tuple(map(int, filter(None, metadata["exits"].split(",")))),
            rank=int(metadata["rank"]),
            learned=metadata["learned"] == "true",
            target=metadata["target"],
        )
    except (KeyError, ValueError, ConfigError) as error:
        raise UserError(
            f"{file}: its header does not say what exits it holds ({error}); export it again"
        ) from error


def read_exits(file: Path, config: ExitsConfig, shardings: Any) -> dict[str, jax.Array]:
    """Returns the parameters of `model.adapters.Exits` by name.

    Args:
      file: the file, see `open_exits`.
      config: what `open_exits` returned.
      shardings: one for all, or by name.

    Raises:
      UserError: a tensor holds a number that is not finite.
    """
    with safe_open(file, "numpy") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise UserError(f"{file}: {name} holds values that are not finite; export it again")
    found = {}
    if config.adapters:
        stacked = {
            name: np.stack([tensors[f"exits.{e}.{theirs}.weight"] for e in config.adapters])
            for name, theirs in (("scale", "norm"), ("down", "down"), ("up", "up"))
        }
        found = {
            "scale": stacked["scale"],
            "down": stacked["down"].swapaxes(1, 2),
            "up": stacked["up"].swapaxes(1, 2),
        }
    if config.learned:
        found["weight"] = tensors["classifier.weight"][0]
        found["score_bias"] = tensors["classifier.bias"]

    def put(name, value):
        of_name = shardings[name] if isinstance(shardings, dict) else shardings
        return jax.make_array_from_callback(value.shape, of_name, lambda index: value[index])

    return {name: put(name, np.ascontiguousarray(value)) for name, value in found.items()}
