"""What a config leaves to its data and to the model it starts from."""

import dataclasses
from pathlib import Path
from typing import Protocol, runtime_checkable

from layerskip_jax.config import RunConfig
from layerskip_jax.data.manifest import Manifest
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.schema import ConfigError
from layerskip_jax.training.state import Parameters


@runtime_checkable
class Initial(Protocol):
    """A model to start from, its parameters not yet read.

    Attributes:
      config: its shape.
      files: see `RunFolder.published`.
    """

    config: ModelConfig
    files: dict[str, bytes]

    def check_tokenizer(self, file: Path) -> None:
        """Raises `UserError` unless the tokenizer in `file` is the model's."""

    def parameters(self, config: ModelConfig, shardings: Parameters) -> Parameters:
        """Reads the parameters, each device its own part.

        Args:
          config: the shape to read them in: that of the model, the vocabulary padded otherwise.
          shardings: nested like the parameters.

        Raises:
          UserError: they cannot be had in that shape.
        """


def resolve(config: RunConfig, manifest: Manifest) -> RunConfig:
    """Fills in what the data decides, and checks that model and data fit each other.

    Raises:
      ConfigError: naming the setting.
    """
    model = config.model
    vocab_size = model.vocab_size or manifest.vocab_size
    if vocab_size < manifest.vocab_size:
        raise ConfigError(
            f"config.model.vocab_size={vocab_size} is smaller than the tokenizer's "
            f"{manifest.vocab_size}; set 0 to take it from the data"
        )
    if manifest.sequence_length > model.max_sequence_length:
        raise ConfigError(
            f"config.model.max_sequence_length={model.max_sequence_length} is shorter than the "
            f"windows of {manifest.sequence_length} tokens in {config.data.path}; raise it, or "
            "prepare shorter windows"
        )
    return dataclasses.replace(config, model=dataclasses.replace(model, vocab_size=vocab_size))


def shaped_like(model: ModelConfig, source: ModelConfig) -> ModelConfig:
    """Returns `source` with what `model` says of how to compute, not of the shape.

    Raises:
      ConfigError: a setting of the shape was changed, to something else than the source's.
    """
    free, default = ["dtype", "remat", "attention", "packing_mask"], ModelConfig()
    for name in ("max_sequence_length", "vocab_multiple"):
        if getattr(model, name) != getattr(default, name):
            free.append(name)
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(model, field.name), getattr(source, field.name)
        if field.name not in free and ours not in (theirs, getattr(default, field.name)):
            raise ConfigError(
                f"config.model.{field.name}={ours} contradicts config.init_from, whose model has "
                f"{theirs}; leave it out"
            )
    return dataclasses.replace(source, **{name: getattr(model, name) for name in free})
