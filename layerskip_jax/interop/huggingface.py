"""The decoder in the names, layouts and configuration of Hugging Face's Llama.

`WEIGHTS` is the whole correspondence, read in both directions. No row needs permuting: RoPE
rotates the same pairs (x_i, x_{i + h/2}) here and there.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from layerskip_jax.model.config import ModelConfig
from layerskip_jax.schema import UserError

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter here and its tensor, or its tensor in each layer, there.

    Attributes:
      path: keys of the nested parameter dict, joined by dots.
      name: the tensor's name; `{layer}` stands where there is one a layer.
      shape: dimensions here, less the leading L of the stacked layers. An arrow parts the
        inputs of a projection from its outputs: a linear layer there is a matrix of [outputs,
        inputs], each merged into one dimension. Without an arrow both sides are alike.
    """

    path: str
    name: str
    shape: str

    @property
    def per_layer(self) -> bool:
        """Whether each layer has one."""
        return "{layer}" in self.name

    def our_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Returns the shape here, of a single layer."""
        return _sizes(self.shape.replace("->", ""), config)

    def their_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Returns the shape of the tensor there."""
        if "->" not in self.shape:
            return self.our_shape(config)
        inputs, outputs = self.shape.split("->")
        return math.prod(_sizes(outputs, config)), math.prod(_sizes(inputs, config))

    def to_theirs(self, value: np.ndarray, config: ModelConfig) -> np.ndarray:
        """Returns one layer's value, laid out as it is there; a view where possible."""
        shape = self.their_shape(config)
        return value.reshape(shape[::-1]).T if "->" in self.shape else value

    def to_ours(self, value: np.ndarray, config: ModelConfig) -> np.ndarray:
        """Returns one layer's value, laid out as it is here; a view where possible."""
        value = value.T if "->" in self.shape else value
        return value.reshape(self.our_shape(config))


_LAYER = "model.layers.{layer}."

WEIGHTS = (
    Weight("embedding", "model.embed_tokens.weight", "V D"),
    Weight("layers.attention_norm.scale", _LAYER + "input_layernorm.weight", "D"),
    Weight("layers.attention.q", _LAYER + "self_attn.q_proj.weight", "D -> H h"),
    Weight("layers.attention.k", _LAYER + "self_attn.k_proj.weight", "D -> K h"),
    Weight("layers.attention.v", _LAYER + "self_attn.v_proj.weight", "D -> K h"),
    Weight("layers.attention.o", _LAYER + "self_attn.o_proj.weight", "H h -> D"),
    Weight("layers.mlp_norm.scale", _LAYER + "post_attention_layernorm.weight", "D"),
    Weight("layers.mlp.gate", _LAYER + "mlp.gate_proj.weight", "D -> F"),
    Weight("layers.mlp.up", _LAYER + "mlp.up_proj.weight", "D -> F"),
    Weight("layers.mlp.down", _LAYER + "mlp.down_proj.weight", "F -> D"),
    Weight("final_norm.scale", "model.norm.weight", "D"),
    Weight("head", "lm_head.weight", "D -> V"),
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


def _weights(config: ModelConfig) -> tuple[Weight, ...]:
    # A tied head is the embedding: neither side stores it a second time.
    return tuple(w for w in WEIGHTS if not (w.path == "head" and config.tie_embeddings))


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
      parameters: nested dict of jax or numpy arrays, layers stacked.
      config: the shapes.

    Yields:
      Name and tensor, in the order of `tensor_shapes` and in the parameter's own dtype.
    """
    for name, weight, layer in _tensors(config):
        value = parameters
        for key in weight.path.split("."):
            value = value[key]
        # Sliced where it lives: a device hands over one layer, not the whole stack.
        value = np.asarray(value if layer is None else value[layer])
        yield name, weight.to_theirs(value, config)


def from_hugging_face(read: Callable[[str], np.ndarray], config: ModelConfig) -> dict[str, Any]:
    """Returns the nested parameters, float32 and with stacked layers, of Hugging Face tensors.

    Args:
      read: returns the tensor of a name, such as `get_tensor` of an open safetensors file.
      config: the shapes.

    Raises:
      UserError: a tensor has another shape than `config` gives it.
    """

    def convert(weight: Weight, name: str) -> np.ndarray:
        value, shape = read(name), weight.their_shape(config)
        if value.shape != shape:
            raise UserError(f"{name} has shape {value.shape}; the model's config makes it {shape}")
        return weight.to_ours(value, config)

    parameters: dict[str, Any] = {}
    for weight in _weights(config):
        shape = weight.our_shape(config)
        if weight.per_layer:
            value = np.empty((config.num_layers, *shape), np.float32)
            for layer in range(config.num_layers):
                value[layer] = convert(weight, weight.name.format(layer=layer))
        else:
            value = convert(weight, weight.name).astype(np.float32)
        *groups, leaf = weight.path.split(".")
        group = parameters
        for key in groups:
            group = group.setdefault(key, {})
        group[leaf] = value
    return parameters


def llama_config(
    config: ModelConfig,
    *,
    eos_token_id: int,
    bos_token_id: int | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Returns the `config.json` of the same model as a `LlamaForCausalLM`.

    Args:
      config: the shapes.
      eos_token_id: the token that ends a document.
      bos_token_id: the token that starts one; None where documents start without.
      dtype: dtype of the stored tensors, one of `DTYPES`.

    Raises:
      UserError: a Llama there cannot have these shapes.
    """
    if config.model_dim % config.num_heads:
        raise UserError(
            f"transformers reads no Llama whose width ({config.model_dim}) is not a multiple of "
            f"its heads ({config.num_heads}); a model of this shape cannot be exported"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
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
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "use_cache": True,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
        # Each of the next two settings twice: as transformers 5 names it, then as 4 does.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
