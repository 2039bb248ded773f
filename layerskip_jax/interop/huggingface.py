"""The decoder in the names, layouts and configuration of Hugging Face's Llama and its relatives.

`WEIGHTS` is the whole correspondence, read in both directions. No row needs permuting: RoPE
rotates the same pairs (x_i, x_{i + h/2}) here and there.
"""

import dataclasses
import functools
import logging
import math
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from layerskip_jax.model.config import ModelConfig, RopeScaling
from layerskip_jax.schema import ConfigError, UserError

logger = logging.getLogger(__name__)

STORED_DTYPES = ("float32", "bfloat16", "float16")


# Reads a part of one tensor, given a slice a dimension.
Tensor = Callable[[tuple[slice, ...]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter here and its tensor, or its tensor in each layer, there.

    Attributes:
      path: keys of the nested parameter dict, joined by dots.
      name: the tensor's name; `{layer}` stands where there is one a layer.
      shape: dimensions here, less the leading L of the stacked layers. An arrow parts the
        inputs of a projection from its outputs: a linear layer there is a matrix of [outputs,
        inputs], each merged into one dimension. Without an arrow both sides are alike.
      exists: whether a model has it.
    """

    path: str
    name: str
    shape: str
    exists: Callable[[ModelConfig], bool] = lambda config: True

    @property
    def per_layer(self) -> bool:
        """Whether each layer has one."""
        return "{layer}" in self.name

    def our_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Returns the shape here, of a single layer, with the vocabulary padded as it is here."""
        letters = self.shape.replace("->", "").split()
        sizes = zip(letters, self.exported_shape(config), strict=True)
        return tuple(config.vocab_rows if letter == "V" else size for letter, size in sizes)

    def exported_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Returns the shape here without the padding, which is not there."""
        return _sizes(self.shape.replace("->", ""), config)

    def their_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Returns the shape of the tensor there."""
        if "->" not in self.shape:
            return self.exported_shape(config)
        inputs, outputs = (_sizes(side, config) for side in self.shape.split("->"))
        # A bias or a scale has outputs only, and is a vector there.
        return (math.prod(outputs), math.prod(inputs)) if inputs else (math.prod(outputs),)

    def to_theirs(self, value: np.ndarray, config: ModelConfig) -> np.ndarray:
        """Returns one layer's value, laid out as it is there; a view where possible."""
        shape = self.their_shape(config)
        return value.reshape(shape[::-1]).T if "->" in self.shape else value

    def read(self, tensor: Tensor, index: tuple[slice, ...], config: ModelConfig) -> np.ndarray:
        """Reads a part of one layer's value, and no more of the tensor than it needs.

        Args:
          tensor: reads a part of the tensor there, given a slice a dimension.
          index: the part, in the dimensions here; the padding of the vocabulary is zeros.
          config: the shapes.
        """
        ours, theirs = self.our_shape(config), self.exported_shape(config)
        if ours == theirs:
            return self._read(tensor, index, config)
        ranges = [part.indices(size)[:2] for part, size in zip(index, ours, strict=True)]
        there = [(min(a, size), min(b, size)) for (a, b), size in zip(ranges, theirs, strict=True)]
        shape = [b - a for a, b in ranges]
        if not all(b > a for a, b in there):
            return np.zeros(shape, np.float32)
        value = self._read(tensor, tuple(slice(a, b) for a, b in there), config)
        missing = zip(shape, value.shape, strict=True)
        return np.pad(value, [(0, size - found) for size, found in missing])

    def _read(self, tensor: Tensor, index: tuple[slice, ...], config: ModelConfig) -> np.ndarray:
        if "->" not in self.shape:
            return tensor(index)
        inputs, outputs = (_sizes(side, config) for side in self.shape.split("->"))
        of_inputs, of_outputs = index[: len(inputs)], index[len(inputs) :]
        # Of merged dimensions only a range of the first one is a range; the rest is cut after.
        groups = [(outputs, of_outputs)] + ([(inputs, of_inputs)] if inputs else [])
        value = tensor(tuple(_merged(sizes, parts) for sizes, parts in groups)).T
        cut, shape = [], []
        for sizes, parts in reversed(groups):
            first, *rest = (part.indices(size) for part, size in zip(parts, sizes, strict=True))
            shape += [first[1] - first[0], *sizes[1:]]
            cut += [slice(None), *(slice(start, stop) for start, stop, _ in rest)]
        return value.reshape(shape)[tuple(cut)]


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models there.

    Attributes:
      architecture: its class in transformers.
      fields: the fields of `ModelConfig` that make it what it is; others of `OF_FAMILIES` are at
        their defaults.
      varies: those of `OF_FAMILIES` that differ from one model of it to another.
      settings: returns what only its `config.json` has, of a model.
      defaults: what its configuration class takes for a key that `config.json` leaves out, for
        every key that is read.
    """

    architecture: str
    fields: dict[str, Any]
    settings: Callable[[ModelConfig], dict[str, Any]]
    defaults: dict[str, Any]
    varies: tuple[str, ...] = ()

    def has(self, config: ModelConfig) -> bool:
        """Whether a model is of this family."""
        wanted = {name: getattr(_PLAIN, name) for name in OF_FAMILIES} | self.fields
        return all(
            getattr(config, name) == value
            for name, value in wanted.items()
            if name not in self.varies
        )


# The fields in which families differ.
OF_FAMILIES = (
    "qkv_bias", "qk_norm", "norm_position", "no_rope_every", "sliding_window",
    "full_attention_every",
)  # fmt: skip
_PLAIN = ModelConfig()
_WINDOW = ("sliding_window", "full_attention_every")


def _window_by_layer(config: ModelConfig) -> dict[str, Any]:
    """Returns what Qwen's and SmolLM's files say of windows."""
    if not config.sliding_window:
        return {"use_sliding_window": False}
    kinds = [kind.window > 0 for kind in config.layer_kinds]
    return {
        "use_sliding_window": True,
        "sliding_window": config.sliding_window,
        # Read where there is no `layer_types`, as by transformers before 4.53.
        "max_window_layers": kinds.index(True) if any(kinds) else config.num_layers,
        "layer_types": ["sliding_attention" if kind else "full_attention" for kind in kinds],
    }


def _rotary_by_layer(config: ModelConfig) -> dict[str, Any]:
    """Returns what SmolLM3's files say of layers without rotary positions."""
    every = config.no_rope_every
    return {
        "no_rope_layers": [int(kind.rotary) for kind in config.layer_kinds],
        "no_rope_layer_interval": every or config.num_layers + 1,
    }


_DEFAULTS = {
    "vocab_size": 32_000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "head_dim": None, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10_000.0,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
_QWEN = _DEFAULTS | {
    "vocab_size": 151_936, "intermediate_size": 22_016, "num_key_value_heads": 32,
    "max_position_embeddings": 32_768, "use_sliding_window": False, "sliding_window": 4096,
    "max_window_layers": 28, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip

# What is read. A model is exported as the first whose fields are its own.
FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        {},
        lambda config: {"attention_bias": False, "mlp_bias": False},
        _DEFAULTS
        | {
            "intermediate_size": 11_008,
            "num_key_value_heads": None,
            "max_position_embeddings": 2048,
            "attention_bias": False,
            "mlp_bias": False,
        },
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {},
        lambda config: {"sliding_window": config.sliding_window},
        _DEFAULTS
        | {
            "intermediate_size": 14_336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "sliding_window": 4096,
        },
        varies=("sliding_window",),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {"qkv_bias": True},
        _window_by_layer,
        _QWEN,
        varies=_WINDOW,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {"qk_norm": "head"},
        lambda config: {"attention_bias": False} | _window_by_layer(config),
        _QWEN | {"head_dim": 128, "attention_bias": False},
        varies=_WINDOW,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {},
        lambda config: (
            {"attention_bias": False, "mlp_bias": False}
            | _rotary_by_layer(config)
            | _window_by_layer(config)
        ),
        _DEFAULTS
        | {
            "vocab_size": 128_256,
            "hidden_size": 2048,
            "intermediate_size": 11_008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32_768,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "use_sliding_window": False,
            "sliding_window": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            "bos_token_id": 128_000,
            "eos_token_id": 128_001,
            "pad_token_id": 128_004,
        },
        varies=("no_rope_every", *_WINDOW),
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        {"qk_norm": "all", "norm_position": "after"},
        lambda config: {"attention_bias": False},
        _DEFAULTS
        | {
            "vocab_size": 50_304,
            "intermediate_size": 11_008,
            "num_key_value_heads": None,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "attention_bias": False,
            "bos_token_id": None,
            "eos_token_id": 50_279,
            "pad_token_id": 1,
        },
    ),
}

_LAYER = "model.layers.{layer}."


def _before(config: ModelConfig) -> bool:
    return config.norm_position == "before"


def _after(config: ModelConfig) -> bool:
    return config.norm_position == "after"


def _has_bias(config: ModelConfig) -> bool:
    return config.qkv_bias


def _norms_heads(config: ModelConfig) -> bool:
    return config.qk_norm == "head"


def _norms_all(config: ModelConfig) -> bool:
    return config.qk_norm == "all"


def _has_head(config: ModelConfig) -> bool:
    # A tied head is the embedding: neither side stores it a second time.
    return not config.tie_embeddings


WEIGHTS = (
    Weight("embedding", "model.embed_tokens.weight", "V D"),
    Weight("layers.attention_norm.scale", _LAYER + "input_layernorm.weight", "D", _before),
    Weight("layers.attention.q", _LAYER + "self_attn.q_proj.weight", "D -> H h"),
    Weight("layers.attention.k", _LAYER + "self_attn.k_proj.weight", "D -> K h"),
    Weight("layers.attention.v", _LAYER + "self_attn.v_proj.weight", "D -> K h"),
    Weight("layers.attention.q_bias", _LAYER + "self_attn.q_proj.bias", "-> H h", _has_bias),
    Weight("layers.attention.k_bias", _LAYER + "self_attn.k_proj.bias", "-> K h", _has_bias),
    Weight("layers.attention.v_bias", _LAYER + "self_attn.v_proj.bias", "-> K h", _has_bias),
    Weight("layers.attention.q_norm.scale", _LAYER + "self_attn.q_norm.weight", "h", _norms_heads),
    Weight("layers.attention.k_norm.scale", _LAYER + "self_attn.k_norm.weight", "h", _norms_heads),
    Weight(
        "layers.attention.q_norm.scale", _LAYER + "self_attn.q_norm.weight", "-> H h", _norms_all
    ),
    Weight(
        "layers.attention.k_norm.scale", _LAYER + "self_attn.k_norm.weight", "-> K h", _norms_all
    ),
    Weight("layers.attention.o", _LAYER + "self_attn.o_proj.weight", "H h -> D"),
    Weight("layers.attention_norm.scale", _LAYER + "post_attention_layernorm.weight", "D", _after),
    Weight("layers.mlp_norm.scale", _LAYER + "post_attention_layernorm.weight", "D", _before),
    Weight("layers.mlp.gate", _LAYER + "mlp.gate_proj.weight", "D -> F"),
    Weight("layers.mlp.up", _LAYER + "mlp.up_proj.weight", "D -> F"),
    Weight("layers.mlp.down", _LAYER + "mlp.down_proj.weight", "F -> D"),
    Weight("layers.mlp_norm.scale", _LAYER + "post_feedforward_layernorm.weight", "D", _after),
    Weight("final_norm.scale", "model.norm.weight", "D"),
    Weight("head", "lm_head.weight", "D -> V", _has_head),
)


def _sizes(letters: str, config: ModelConfig) -> tuple[int, ...]:
    sizes = {
        "V": config.vocab_size,
        "D": config.model_dim,
        "F": config.ffn_dim,
        "H": config.num_heads,
        "K": config.num_kv_heads,
        "h": config.head_dim,
    }
    return tuple(sizes[letter] for letter in letters.split())


def _merged(sizes: tuple[int, ...], parts: tuple[slice, ...]) -> slice:
    """Returns the range of the merged dimension that holds a range of the first one."""
    start, stop, _ = parts[0].indices(sizes[0])
    inner = math.prod(sizes[1:])
    return slice(start * inner, stop * inner)


def _weights(config: ModelConfig) -> tuple[Weight, ...]:
    return tuple(weight for weight in WEIGHTS if weight.exists(config))


def _tensors(config: ModelConfig) -> Iterator[tuple[str, Weight, int | None]]:
    """Yields name, weight and layer of each tensor: from the embedding up, layer by layer."""
    weights = _weights(config)
    layers = [i for i, weight in enumerate(weights) if weight.per_layer]
    first, end = layers[0], layers[-1] + 1
    yield from ((weight.name, weight, None) for weight in weights[:first])
    for layer in range(config.num_layers):
        for weight in weights[first:end]:
            yield weight.name.format(layer=layer), weight, layer
    yield from ((weight.name, weight, None) for weight in weights[end:])


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each Hugging Face tensor by name, in the order of writing.

    These are all the tensors that the model has. Weights under any other name, such as the
    biases of some relatives of Llama, have no place in it.
    """
    return {name: weight.their_shape(config) for name, weight, _ in _tensors(config)}


def to_hugging_face(
    parameters: dict[str, Any], config: ModelConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the Hugging Face tensors one at a time, so that a large model need not fit twice.

    Args:
      parameters: nested dict of arrays, layers stacked: jax's, numpy's, or arrays on disk that
        are read where they are indexed.
      config: the shapes.

    Yields:
      Name and tensor, in the order of `tensor_shapes` and in the parameter's own dtype.
    """
    for name, weight, layer in _tensors(config):
        value = parameters
        for key in weight.path.split("."):
            value = value[key]
        # Sliced where it lives: a device hands over one layer, not the whole stack.
        index = tuple(slice(size) for size in weight.exported_shape(config))
        value = np.asarray(value[index if layer is None else (layer, *index)])
        yield name, weight.to_theirs(value, config)


def from_hugging_face(
    read: Callable[[str, tuple[slice, ...]], np.ndarray],
    config: ModelConfig,
    shardings: jax.sharding.Sharding | dict[str, Any],
) -> dict[str, Any]:
    """Returns the nested parameters, float32 and with stacked layers, of Hugging Face tensors.

    Args:
      read: `read(name, index)` returns a part of a tensor, given a slice a dimension.
      config: the shapes; see `check_tensors` for whether the tensors have them.
      shardings: one for all parameters, or nested like them. Each process reads the parts of its
        own devices.

    Raises:
      UserError: a tensor holds values that are not finite in float32; naming it.
    """

    def make(weight: Weight, sharding) -> jax.Array:
        shape = weight.our_shape(config)
        if not weight.per_layer:

            def part(index):
                tensor = functools.partial(read, weight.name)
                return _finite(weight.name, weight.read(tensor, index, config))

            return jax.make_array_from_callback(shape, sharding, part)

        def part_of_layers(index):
            layers, *inner = index
            chosen = range(config.num_layers)[layers]
            sizes = (part.indices(size) for part, size in zip(inner, shape, strict=True))
            value = np.empty((len(chosen), *(b - a for a, b, _ in sizes)), np.float32)
            for row, layer in zip(value, chosen, strict=True):
                name = weight.name.format(layer=layer)
                tensor = functools.partial(read, name)
                row[...] = _finite(name, weight.read(tensor, tuple(inner), config))
            return value

        return jax.make_array_from_callback((config.num_layers, *shape), sharding, part_of_layers)

    parameters: dict[str, Any] = {}
    for weight in _weights(config):
        *groups, leaf = weight.path.split(".")
        group, sharding = parameters, shardings
        for key in groups:
            group = group.setdefault(key, {})
        for key in (*groups, leaf):
            sharding = sharding[key] if isinstance(sharding, dict) else sharding
        group[leaf] = make(weight, sharding)
    return parameters


def _finite(name: str, value: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # reported below, with the tensor's name
        value = value.astype(np.float32, copy=False)
    if not np.isfinite(value).all():
        raise UserError(
            f"{name} holds values that are not finite in float32 (NaN or infinite): the weights "
            "are damaged, or their training diverged; take another checkpoint"
        )
    return value


# Buffers that old checkpoints store and that follow from the config.
_BUFFERS = re.compile(r"(.*\.)?rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)")


def check_tensors(shapes: dict[str, tuple[int, ...]], config: ModelConfig, source: str) -> None:
    """Checks that a model's tensors are those of `config`, all of them at once.

    Args:
      shapes: the shape of each tensor by name.
      config: what they should be.
      source: where they are, for the message.

    Raises:
      UserError: listing every tensor that is missing, unknown or of another shape.
    """
    wanted = tensor_shapes(config)
    # Published checkpoints store some of what follows from the rest.
    implied = {name for name in shapes if _BUFFERS.fullmatch(name)}
    if config.tie_embeddings:
        implied.add("lm_head.weight")
    lines = [f"missing: {name} {shape}" for name, shape in wanted.items() if name not in shapes]
    lines += [
        f"unknown: {name} {tuple(shape)}"
        for name, shape in shapes.items()
        if name not in wanted and name not in implied
    ]
    lines += [
        f"shape: {name} is {tuple(shapes[name])}, and the config makes it {shape}"
        for name, shape in wanted.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    if lines:
        raise UserError(
            f"{source}: the tensors are not those of its config:\n  " + "\n  ".join(lines)
        )


def to_hugging_face_config(
    config: ModelConfig,
    *,
    eos_token_id: int | list[int],
    bos_token_id: int | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Returns the `config.json` of the same model, of the first family that has it.

    Args:
      config: the shapes.
      eos_token_id: the token that ends a document, or all that end a text.
      bos_token_id: the token that starts one; None where documents start without.
      dtype: dtype of the stored tensors, one of `STORED_DTYPES`.

    Raises:
      UserError: no family there has such models, or a Llama there cannot have these shapes.
    """
    found = next((item for item in FAMILIES.items() if item[1].has(config)), None)
    if found is None:
        said = ", ".join(
            f"{name}={getattr(config, name)!r}"
            for name in OF_FAMILIES
            if getattr(config, name) != getattr(_PLAIN, name)
        )
        raise UserError(
            f"no family of transformers ({', '.join(FAMILIES)}) has {said} together; a model like "
            "this cannot be exported"
        )
    name, family = found
    if name == "llama" and config.model_dim % config.num_heads:
        raise UserError(
            f"transformers reads no Llama whose width ({config.model_dim}) is not a multiple of "
            f"its heads ({config.num_heads}); a model of this shape cannot be exported"
        )
    settings = {
        "architectures": [family.architecture],
        "model_type": name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_sequence_length,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
        # Each of the next settings twice: as transformers 5 names it, then as 4 does.
        "rope_parameters": {**_rope_scaling(config), "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if config.rope_scaling.kind != "none":
        settings["rope_scaling"] = _rope_scaling(config)
    return settings | family.settings(config)


def _rope_scaling(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling.kind == "none":
        return {"rope_type": "default"}
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_length,
    }


class _Settings:
    """A `config.json`: what it leaves out is as its class in transformers has it."""

    def __init__(self, settings: dict[str, Any], source: str):
        self.said, self._source = settings, source
        self.family = settings.get("model_type")
        if not isinstance(self.family, str) or self.family not in FAMILIES:
            self.refuse(f"model_type={self.family!r} is none of {', '.join(FAMILIES)}")
        self._defaults = FAMILIES[self.family].defaults

    def refuse(self, reason: str):
        raise UserError(f"{self._source}: {reason}; this decoder cannot compute that model")

    def __getitem__(self, name: str) -> Any:
        """Returns what is said, null too, or else the default of the class."""
        return self.said.get(name, self._defaults.get(name))

    def integer(self, name: str) -> int:
        if type(value := self[name]) is not int:
            raise UserError(f"{self._source}: {name}={value!r} is no integer")
        return value

    def number(self, name: str, group: dict[str, Any] | None = None) -> float:
        value = self[name] if group is None else group[name]
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            raise UserError(f"{self._source}: {name}={value!r} is no finite number")
        return float(value)

    def flag(self, name: str) -> bool:
        if not isinstance(value := self[name], bool | None):
            raise UserError(f"{self._source}: {name}={value!r} is neither true nor false")
        return bool(value)

    def group(self, name: str) -> dict[str, Any]:
        value = self.said.get(name) or {}
        if not isinstance(value, dict):
            raise UserError(f"{self._source}: {name}={value!r} is no object")
        return value

    def warn(self, name: str, used: Any, other: Any) -> None:
        logger.warning(
            "%s says %s twice, %r and %r; %r counts, as in transformers 5",
            self._source, name, used, other, used,
        )  # fmt: skip


def from_hugging_face_config(settings: dict[str, Any], source: str) -> ModelConfig:
    """Returns the shapes that a `config.json` describes, as transformers 4 or 5 wrote it.

    A key that it leaves out has the default of its class there, see `Family`. docs/weights.md
    lists what each key means when it is absent, null, or said twice.

    Args:
      settings: the file's content.
      source: where it is, for messages.

    Raises:
      UserError: a setting is of no use, or describes a model that this decoder is not.
    """
    read = _Settings(settings, source)
    layers, width, heads = (
        read.integer(name) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    _check_computable(read)
    # Null is as many as there are queries, and a null or absent width is D / H, rounded down.
    kv_heads = heads if read["num_key_value_heads"] is None else read.integer("num_key_value_heads")
    head_dim = width // max(heads, 1) if read["head_dim"] is None else read.integer("head_dim")
    if head_dim == 0:
        read.refuse("head_dim=0 leaves its heads nothing to compare")
    try:
        return ModelConfig(
            vocab_size=read.integer("vocab_size"),
            num_layers=layers,
            model_dim=width,
            ffn_dim=read.integer("intermediate_size"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_sequence_length=read.integer("max_position_embeddings"),
            norm_eps=read.number("rms_norm_eps"),
            tie_embeddings=read.flag("tie_word_embeddings"),
            **FAMILIES[read.family].fields,
            **_read_rope(read),
            **_read_kinds(read),
        )
    except ConfigError as error:
        raise UserError(f"{source}: {error}") from error


def _check_computable(read: _Settings) -> None:
    """Refuses what the families can be there and this decoder is not."""
    if read["hidden_act"] not in ("silu", "swish"):  # two names of one function
        read.refuse(f"hidden_act={read['hidden_act']!r} is not 'silu'")
    for name in ("attention_bias", "mlp_bias"):
        if name in FAMILIES[read.family].defaults and read.flag(name):
            read.refuse(f"{name}=true puts biases where it has none")
    for name in ("quantization_config", "compression_config"):
        if read[name]:
            read.refuse(
                f"its weights are quantized ({name}); save them in a floating-point dtype, or give "
                "a GGUF file"
            )
    for name in ("per_layer_config", "transformers_weights"):
        if read[name]:
            read.refuse(f"{name}={read[name]!r} is not read")
    types = read["layer_types"]
    layers = read.integer("num_hidden_layers")
    if types is not None and (not isinstance(types, list) or len(types) != layers):
        read.refuse(f"layer_types={types!r} does not list its {layers} layers")
    for kind in types or ():
        if kind not in ("full_attention", "attention", "sliding_attention"):
            read.refuse(f"layer_types has {kind!r}, which is not full_attention")


def _read_kinds(read: _Settings) -> dict[str, Any]:
    """Returns what layers see, and which are without rotary positions.

    Raises:
      UserError: the layers that are unlike others are not every n-th.
    """
    layers, context = read.integer("num_hidden_layers"), read.integer("max_position_embeddings")
    found = {"no_rope_every": 0}
    rotates = [True] * layers
    if read.family == "smollm3":
        rotates = _rotating(read, layers)
        found["no_rope_every"] = _period(read, [not rotary for rotary in rotates], "no_rope_layers")
    window, types = read["sliding_window"], read["layer_types"]
    if window is not None:
        window = read.integer("sliding_window")
        if window < 1:
            read.refuse(f"sliding_window={window} lets a token see nothing")
    if window is not None and read.family in ("llama", "olmo2"):
        # The class has none, but the cache of transformers 5 reads the key.
        read.refuse(f"sliding_window={window} limits what a token sees in some programs alone")
    if read.family in ("qwen2", "qwen3", "smollm3") and not read.flag("use_sliding_window"):
        window = None
    if types is not None:
        slides = [kind == "sliding_attention" for kind in types]
    elif window is None:
        slides = [False] * layers
    elif read.family == "smollm3":
        slides = [not rotary for rotary in rotates]
    else:
        most = 0 if read.family == "mistral" else read.integer("max_window_layers")
        slides = [layer >= most for layer in range(layers)]
    if any(slides) and window is None:
        read.refuse("layer_types has 'sliding_attention', and no sliding_window is in use")
    if read.family == "mistral" and window is not None and not all(slides):
        read.refuse("layer_types of a Mistral are not read by its class; leave them out")
    if window is None or window >= context or not any(slides):
        return found  # no token is out of sight
    every = _period(read, [not slide for slide in slides], "layer_types")
    return found | {"sliding_window": window, "full_attention_every": every}


def _rotating(read: _Settings, layers: int) -> list[bool]:
    """Returns which layers of a SmolLM3 have rotary positions."""
    listed = read["no_rope_layers"]
    if listed is None:
        interval = read.integer("no_rope_layer_interval")
        if interval < 1:
            read.refuse(f"no_rope_layer_interval={interval} is below 1")
        return [(layer + 1) % interval != 0 for layer in range(layers)]
    if not isinstance(listed, list) or len(listed) < layers or set(listed) - {0, 1}:
        read.refuse(f"no_rope_layers={listed!r} does not say 0 or 1 of its {layers} layers")
    return [bool(rotary) for rotary in listed[:layers]]


def _period(read: _Settings, chosen: list[bool], name: str) -> int:
    """Returns n where every n-th layer is chosen, 0 where none is."""
    every = chosen.index(True) + 1 if any(chosen) else 0
    if chosen != [every > 0 and (layer + 1) % every == 0 for layer in range(len(chosen))]:
        numbers = [layer + 1 for layer, is_chosen in enumerate(chosen) if is_chosen]
        read.refuse(f"{name} sets layers {numbers} apart, which are not every n-th")
    return every


def _read_rope(read: _Settings) -> dict[str, Any]:
    """Returns the rotary settings, from `rope_parameters` or from what came before it.

    Said twice, `rope_scaling` counts before `rope_parameters`, and what either says of `rope_theta`
    before the key beside them.
    """
    scaling, other = read.group("rope_scaling"), read.group("rope_parameters")
    for name in sorted(scaling.keys() & other.keys()):
        if scaling[name] != other[name]:
            read.warn(name, scaling[name], other[name])
    scaling = scaling or other
    if nested := sorted(name for name, value in scaling.items() if isinstance(value, dict)):
        read.refuse(f"its rotary settings differ by kind of layer ({', '.join(nested)})")
    theta = read.number("rope_theta", scaling if "rope_theta" in scaling else None)
    if read.said.get("rope_theta", theta) != theta:
        read.warn("rope_theta", theta, read.said["rope_theta"])
    part = scaling.get("partial_rotary_factor", read["partial_rotary_factor"])
    if part not in (None, 1):
        read.refuse(f"partial_rotary_factor={part!r} rotates a part of each head")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if scaling.get("type", kind) != kind:
        read.warn("rope_type", kind, scaling["type"])
    if kind == "default":
        return {"rope_theta": theta}
    if kind not in ("linear", "llama3"):
        read.refuse(f"rope scaling {kind!r} is none of default, linear, llama3")
    names = {"factor": "factor"}
    if kind == "llama3":
        names |= {"low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"}
    missing = sorted(name for name in names if name not in scaling)
    if missing:
        read.refuse(f"rope scaling {kind!r} lacks {', '.join(missing)}")
    values = {ours: read.number(theirs, scaling) for theirs, ours in names.items()}
    if kind == "llama3":
        values["original_length"] = _original_length(read, scaling)
    return {"rope_theta": theta, "rope_scaling": RopeScaling(kind, **values)}


def _original_length(read: _Settings, scaling: dict[str, Any]) -> int:
    """Returns the context before it was stretched: the context itself where none is said."""
    name = "original_max_position_embeddings"
    lengths = {int(read.number(name, group)) for group in (scaling, read.said) if name in group}
    if len(lengths) > 1:  # of which transformers takes now one, now the other
        read.refuse(f"it says {name} twice, {' and '.join(map(str, sorted(lengths)))}")
    return next(iter(lengths), read.integer("max_position_embeddings"))


def default_token_id(settings: dict[str, Any], name: str) -> int | list[int] | None:
    """Returns `bos_token_id`, `eos_token_id` or `pad_token_id`: as said, or its class's default."""
    said = settings.get("model_type")
    family = FAMILIES.get(said) if isinstance(said, str) else None
    return settings.get(name, family.defaults[name] if family else None)
