"""A published model on disk, a Hugging Face folder or a GGUF file, without PyTorch."""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from layerskip_jax.data.text import begin_tokens
from layerskip_jax.data.tokenizer import END_TOKENS, load_tokenizer, vocabulary_size
from layerskip_jax.interop.exits_file import EXITS_FILE, open_exits, read_exits
from layerskip_jax.interop.gguf import GGUF
from layerskip_jax.interop.huggingface import (
    check_tensors,
    default_token_id,
    from_hugging_face,
    from_hugging_face_config,
)
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.run_folder.atomic import remedy, require_text_name
from layerskip_jax.run_folder.object_store import require_local
from layerskip_jax.schema import UserError

logger = logging.getLogger(__name__)

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_STORED = ("F64", "F32", "F16", "BF16")  # dtypes whose values are the weights themselves
# Rows beyond the embedding come in so many, for any number of devices to share.
_ROWS = 64
# What else a published folder says of the model and its tokenizer, all of it small.
FILES = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "tokenizer.model",
    "vocab.json", "merges.txt",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A published model, its tensors still on disk.

    Attributes:
      source: the folder or file.
      config: its shapes. Where the tokenizer has more tokens than the embedding has rows, such as
        a token to pad with, both have rows of padding for them, see `with_rows_for`.
      tokenizer: its tokenizer, as `load_tokenizer` reads it.
      end_token: the token that ends a document.
      end_token_id: its id.
      files: by name, those of `FILES` that the folder has, or what a GGUF file says of the same.
      tokenizer_json: the tokenizer's file, or what would be in it.
      read: reads a part of a tensor by its Hugging Face name.
      exits_file: with the exits that `config` has; None where there are none.
    """

    source: Path
    config: ModelConfig
    tokenizer: Tokenizer
    end_token: str
    end_token_id: int
    files: dict[str, bytes]
    tokenizer_json: str
    read: Callable[[str, tuple[slice, ...]], np.ndarray]
    exits_file: Path | None = None

    def parameters(
        self, shardings: Any = None, config: ModelConfig | None = None
    ) -> dict[str, Any]:
        """Reads the parameters, float32, each device its own part.

        Args:
          shardings: nested like the parameters; None puts all on the first device.
          config: the model's, but for the padding of the vocabulary, and with its exits or
            without; None takes none of the padding, and the exits.
        """
        if shardings is None:
            shardings = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        config = config or self.config
        parameters = from_hugging_face(self.read, config, shardings)
        if self.exits_file is None or not config.exits:
            return parameters
        of_exits = shardings["exits"] if isinstance(shardings, dict) else shardings
        return {**parameters, "exits": read_exits(self.exits_file, config.exits, of_exits)}


def open_pretrained(path: str | PurePath) -> Pretrained:
    """Opens a Hugging Face folder or a GGUF file, and checks it without reading its tensors.

    Only a head that should be the embedding is read, and compared with it. Whether values are
    finite shows when `parameters` reads them.

    Raises:
      UserError: it is neither, is damaged, is a model this decoder cannot compute, or its parts
        contradict each other.
    """
    require_local(path, "a model that is no run of ours")
    path = Path(path)
    require_text_name(path.absolute())
    if path.suffix == ".gguf":
        return _open_gguf(path)
    if path.suffix == ".safetensors" and path.is_file():
        raise UserError(f"{path} is a part of a model; give its folder, {path.parent}")
    if not path.is_dir():
        raise UserError(f"{path} is no folder and no .gguf file; give a model's own")
    settings = _read_json(path / "config.json")
    config = from_hugging_face_config(settings, str(path / "config.json"))
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path} has an adapter beside its weights (adapter_config.json), which changes what "
            "the model computes; merge it with peft's merge_and_unload(), or move it away"
        )
    tensors = _open_safetensors(path)
    for name, tensor in tensors.items():
        if (dtype := tensor().get_dtype()) not in _STORED:
            raise UserError(
                f"{path}: {name} is stored as {dtype}, which stands for weights without being "
                f"them; only {', '.join(_STORED)} are read"
            )
    shapes = {name: tuple(tensor().get_shape()) for name, tensor in tensors.items()}

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        return tensors[name]()[index]

    config = _with_head(config, tensors, shapes, read, path)
    check_tensors(shapes, config, str(path))
    if (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file():
        raise UserError(
            f"{path} has its tokenizer in tokenizer.model only; "
            "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes the "
            "tokenizer.json that is read here"
        )
    tokenizer = load_tokenizer(path / "tokenizer.json")
    files = published_files(path)
    said = parse_json(files.get("tokenizer_config.json", b"{}"), path / "tokenizer_config.json")
    begins = bool(begin_tokens(tokenizer))
    if said.get("add_bos_token", begins) not in (None, begins):
        logger.warning(
            "%s: tokenizer_config.json says add_bos_token=%s, by which some classes of "
            "transformers go; tokenizer.json %s a text with a token of its own, which counts "
            "here. `layerskip verify` compares the two",
            path, said["add_bos_token"], "begins" if begins else "does not begin",
        )  # fmt: skip
    end_token_id = next(iter(end_token_ids(files, path)), None)
    text = (path / "tokenizer.json").read_text(encoding="utf-8")
    model = _checked(path, config, tokenizer, end_token_id, text, read, files)
    return _with_exits(model, path / EXITS_FILE)


def published_files(folder: Path) -> dict[str, bytes]:
    """Returns those of `FILES` that a folder has, by name."""
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}


def _with_exits(model: Pretrained, file: Path) -> Pretrained:
    """Returns the model with the exits that are in a file beside it, if there is one."""
    if not file.is_file():
        return model
    config = dataclasses.replace(model.config, exits=open_exits(file, model.config))
    return dataclasses.replace(model, config=config, exits_file=file)


def _with_head(config, tensors, shapes, read, path) -> ModelConfig:
    """Returns the config, tied only if what is stored is; one tensor of two tied ones is enough."""
    if not config.tie_embeddings or _HEAD not in tensors:
        return config
    if _EMBEDDING not in tensors:
        tensors[_EMBEDDING], shapes[_EMBEDDING] = tensors[_HEAD], shapes[_HEAD]
        return config
    if _are_equal(read, shapes):
        return config
    logger.warning(
        "%s ties the head to the embedding and has another head: it is not tied, as in "
        "transformers 5 (4 ties it)", path,
    )  # fmt: skip
    return dataclasses.replace(config, tie_embeddings=False)


def _open_gguf(path: Path) -> Pretrained:
    file = GGUF(path)
    check_tensors(file.shapes, file.config, str(path))
    tokenizer = file.tokenizer()
    text = tokenizer.to_str(pretty=True)
    model = _checked(path, file.config, tokenizer, file.end_token_id, text, file.read, file.files())
    return _with_exits(model, path.with_suffix(f".{EXITS_FILE}"))


def end_token_ids(files: dict[str, bytes], source: Path) -> list[int]:
    """Returns the ids of the tokens that end a text, the model's own end token first.

    Args:
      files: its small files by name, as in `Pretrained`.
      source: where they are, for the message.

    Raises:
      UserError: a file is no JSON, or an id no id.
    """
    ids = []
    settings = {
        name: parse_json(files[name], source / name)
        for name in ("config.json", "generation_config.json")
        if name in files
    }
    for name, said in settings.items():
        found = said.get("eos_token_id")
        ids += _token_ids(found, source / name)
    of_model = settings.get("config.json", {})
    if not ids and "eos_token_id" not in of_model:
        ids = _token_ids(default_token_id(of_model, "eos_token_id"), source)
    return list(dict.fromkeys(ids))


def _token_ids(found: Any, source: Path) -> list[int]:
    ids = found if isinstance(found, list) else [] if found is None else [found]
    for number in ids:
        if type(number) is not int or number < 0:
            raise UserError(f"{source}: eos_token_id={found!r} is no token's id, nor several")
    return ids


def with_rows_for(config: ModelConfig, tokens: int) -> ModelConfig:
    """Returns the config with rows of embedding and head for a tokenizer of so many tokens.

    A tokenizer may be larger than the model, most often by a token to pad with that no text
    yields. In transformers such a token is in no row of logits, so it is never drawn, and reading
    one is an error. Here it is the same: the rows more are padding, zeros with probability 0, which
    change no other token's, and are not exported. `resize_token_embeddings` would do otherwise
    (rows near the mean, which draw some probability), because it makes tokens to be trained.
    """
    if tokens <= config.vocab_rows:
        return config
    rows = -(-tokens // _ROWS) * _ROWS
    return dataclasses.replace(config, pad_vocab_to_multiple_of=rows)


def _checked(path, config, tokenizer, end_token_id, text, read, files) -> Pretrained:
    size = vocabulary_size(tokenizer)
    if size > config.vocab_size:
        logger.warning(
            "%s: the tokenizer has %d tokens, and the embedding %d rows; the tokens from %r on are "
            "never drawn, and a prompt or data with one is refused",
            path, size, config.vocab_size, tokenizer.id_to_token(config.vocab_size),
        )  # fmt: skip
        config = with_rows_for(config, size)
    if end_token_id is None:
        known = (tokenizer.token_to_id(token) for token in END_TOKENS)
        end_token_id = next((i for i in known if i is not None), None)
    end_token = None if end_token_id is None else tokenizer.id_to_token(end_token_id)
    if end_token is None:
        raise UserError(f"{path}: eos_token_id={end_token_id} is none of the tokenizer's tokens")
    if end_token_id >= config.vocab_size:
        raise UserError(
            f"{path}: the end token {end_token!r} has id {end_token_id}, and the embedding "
            f"{config.vocab_size} rows, so the model cannot end a text"
        )
    return Pretrained(path, config, tokenizer, end_token, end_token_id, files, text, read)


def _are_equal(read: Callable[..., np.ndarray], shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether the head is the embedding, value by value, a part of it in memory at a time."""
    if shapes[_HEAD] != shapes[_EMBEDDING] or len(shapes[_HEAD]) != 2:
        return False
    rows, step = shapes[_HEAD][0], 4096
    parts = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    return all(
        np.array_equal(*(read(name, (part, slice(None))) for name in (_HEAD, _EMBEDDING)))
        for part in parts
    )


def _open_safetensors(folder: Path) -> dict[str, Callable[[], Any]]:
    """Returns what opens each tensor, by its name in the model with a head.

    Beside an index and all that it names, one file of everything counts, as in transformers. What
    was saved without a head lacks the `model.` of every name.
    """
    index, names = folder / _INDEX, [_WEIGHTS]
    if index.is_file():
        files = _read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(x, str) for x in files.values()):
            raise UserError(f"{index} does not say where which tensor is; download it again")
        names = sorted(set(files.values()))
    elif not (folder / _WEIGHTS).is_file():
        _refuse_without_index(folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and list(folder.glob("pytorch_model*.bin")):
        raise UserError(
            f"{folder} has its weights in pytorch_model.bin; only safetensors are read: "
            "transformers.AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER) "
            "writes them"
        )
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}; download it again")
    if (folder / _WEIGHTS).is_file():
        names = [_WEIGHTS]
    files, tensors = {}, {}
    for name in names:
        try:
            file = safe_open(folder / name, "numpy")
        except OSError as error:
            raise UserError(f"{folder / name} cannot be read ({error}){remedy(error)}") from error
        except SafetensorError as error:
            raise UserError(
                f"{folder / name} is damaged or cut short ({error}); download it again"
            ) from error
        for tensor in file.keys():
            if tensor in files:
                raise UserError(f"{folder}: {tensor} is in {files[tensor]} and in {name}")
            files[tensor] = name
            tensors[tensor] = functools.partial(file.get_slice, tensor)
    if _EMBEDDING not in tensors and _EMBEDDING.removeprefix("model.") in tensors:
        tensors = {
            name if name == _HEAD else f"model.{name}": tensor for name, tensor in tensors.items()
        }
    return tensors


def _refuse_without_index(folder: Path) -> None:
    """Raises `UserError` if the folder has parts of several, which only an index completes."""
    parts = sorted(path.name for path in folder.glob("model-*-of-*.safetensors"))
    if parts:
        raise UserError(
            f"{folder} has {parts[0]}, a part of the weights, but not {_INDEX}, which says what "
            "the other parts hold; download it too"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    return parse_json(content, path)


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """Returns the object in a file.

    Raises:
      UserError: it is no JSON object.
    """
    try:
        value = json.loads(content)
    except ValueError as error:
        raise UserError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value
