"""A published model on disk, a Hugging Face folder or a GGUF file, without PyTorch."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from layerskip_jax.data.tokenizer import END_TOKENS, load_tokenizer, vocabulary_size
from layerskip_jax.interop.gguf import GGUF
from layerskip_jax.interop.huggingface import (
    check_tensors,
    from_hugging_face,
    from_hugging_face_config,
)
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.run_folder.object_store import require_local
from layerskip_jax.schema import UserError

_INDEX = "model.safetensors.index.json"
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
      config: its shapes.
      tokenizer: its tokenizer, as `load_tokenizer` reads it.
      end_token: the token that ends a document.
      end_token_id: its id.
      files: by name, those of `FILES` that the folder has, or what a GGUF file says of the same.
      tokenizer_json: the tokenizer's file, or what would be in it.
      read: reads a part of a tensor by its Hugging Face name.
    """

    source: Path
    config: ModelConfig
    tokenizer: Tokenizer
    end_token: str
    end_token_id: int
    files: dict[str, bytes]
    tokenizer_json: str
    read: Callable[[str, tuple[slice, ...]], np.ndarray]

    def parameters(
        self, shardings: Any = None, config: ModelConfig | None = None
    ) -> dict[str, Any]:
        """Reads the parameters, float32, each device its own part.

        Args:
          shardings: nested like the parameters; None puts all on the first device.
          config: the model's, but for the padding of the vocabulary; None takes none.
        """
        if shardings is None:
            shardings = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return from_hugging_face(self.read, config or self.config, shardings)


def open_pretrained(path: str | PurePath) -> Pretrained:
    """Opens a Hugging Face folder or a GGUF file, and checks it without reading its tensors.

    Raises:
      UserError: it is neither, is damaged, is a model this decoder cannot compute, or its parts
        contradict each other.
    """
    require_local(path, "a model that is no run of ours")
    path = Path(path)
    if path.suffix == ".gguf":
        return _open_gguf(path)
    if not path.is_dir():
        raise UserError(f"{path} is no folder and no .gguf file; give a model's own")
    settings = _read_json(path / "config.json")
    config = from_hugging_face_config(settings, str(path / "config.json"))
    tensors = _open_safetensors(path)
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in tensors.items()}
    check_tensors(shapes, config, str(path))
    if (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file():
        raise UserError(
            f"{path} has its tokenizer in tokenizer.model only; "
            "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes the "
            "tokenizer.json that is read here"
        )
    tokenizer = load_tokenizer(path / "tokenizer.json")
    files = {name: (path / name).read_bytes() for name in FILES if (path / name).is_file()}
    end_token_id = next(iter(end_token_ids(files, path)), None)

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        return tensors[name].get_slice(name)[index]

    text = (path / "tokenizer.json").read_text(encoding="utf-8")
    return _checked(path, config, tokenizer, end_token_id, text, read, files)


def _open_gguf(path: Path) -> Pretrained:
    file = GGUF(path)
    check_tensors(file.shapes, file.config, str(path))
    tokenizer = file.tokenizer()
    text = tokenizer.to_str(pretty=True)
    return _checked(path, file.config, tokenizer, file.end_token_id, text, file.read, file.files())


def end_token_ids(files: dict[str, bytes], source: Path) -> list[int]:
    """Returns the ids of the tokens that end a text, the model's own end token first.

    Args:
      files: its small files by name, as in `Pretrained`.
      source: where they are, for the message.

    Raises:
      UserError: a file is no JSON.
    """
    ids = []
    for name in ("config.json", "generation_config.json"):
        found = parse_json(files.get(name, b"{}"), source / name).get("eos_token_id")
        ids += found if isinstance(found, list) else [found]
    return [i for i in dict.fromkeys(ids) if isinstance(i, int)]


def _checked(path, config, tokenizer, end_token_id, text, read, files) -> Pretrained:
    size = vocabulary_size(tokenizer)
    if size > config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {size} tokens, and the embedding {config.vocab_size} rows"
        )
    if end_token_id is None:
        known = (tokenizer.token_to_id(token) for token in END_TOKENS)
        end_token_id = next((i for i in known if i is not None), None)
    end_token = None if end_token_id is None else tokenizer.id_to_token(end_token_id)
    if end_token is None:
        raise UserError(f"{path}: eos_token_id={end_token_id} is none of the tokenizer's tokens")
    return Pretrained(path, config, tokenizer, end_token, end_token_id, files, text, read)


def _open_safetensors(folder: Path) -> dict[str, Any]:
    """Returns the open file of each tensor."""
    if (folder / _INDEX).is_file():
        names = sorted(set(_read_json(folder / _INDEX)["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and list(folder.glob("pytorch_model*.bin")):
        raise UserError(
            f"{folder} has its weights in pytorch_model.bin; only safetensors are read: "
            "transformers.AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER) "
            "writes them"
        )
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}; download it again")
    tensors = {}
    for name in names:
        try:
            file = safe_open(folder / name, "numpy")
        except SafetensorError as error:
            raise UserError(
                f"{folder / name} is damaged or cut short ({error}); download it again"
            ) from error
        tensors |= dict.fromkeys(file.keys(), file)
    return tensors


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
