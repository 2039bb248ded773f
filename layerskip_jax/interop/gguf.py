"""A model in one GGUF file, quantized or not, read by the names of Hugging Face."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
)

from layerskip_jax.interop.huggingface import FAMILIES
from layerskip_jax.model.config import ModelConfig, RopeScaling
from layerskip_jax.model.rope import rope_frequencies
from layerskip_jax.schema import ConfigError, UserError

_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# How each kind of byte-level BPE parts words: published with the models, see llama.cpp's
# `llama-vocab.cpp` for the list.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ROPE_FACTORS = "rope_freqs.weight"  # what the frequencies of Llama 3.1 and later are divided by
_SPECIAL_TYPE = 3  # of a token: control


class GGUF:
    """An open GGUF file.

    Attributes:
      config: the model's shapes.
      shapes: the shape of each tensor, by its Hugging Face name.
      end_token_id: the token that ends a text.
    """

    def __init__(self, path: Path):
        """Opens the file; its tensors stay on disk until they are read.

        Raises:
          UserError: it is missing, damaged, or a model that this decoder is not.
        """
        if not path.is_file():
            raise UserError(f"{path}: there is no such file")
        self._path = path
        try:
            reader = gguf.GGUFReader(path)
            self._fields = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, OSError) as error:
            raise UserError(
                f"{path} is damaged or no GGUF file ({error}); download it again"
            ) from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._family = self._field("general.architecture")
        if self._family not in ("llama", "qwen2"):
            raise UserError(
                f"{path}: architecture {self._family!r} is none of llama, qwen2; this decoder "
                "cannot compute that model"
            )
        self.end_token_id = self._fields.get("tokenizer.ggml.eos_token_id")
        self.config = self._config()
        self.shapes = {
            _hugging_face_name(name): tuple(int(size) for size in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
            if name != _ROPE_FACTORS
        }

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Returns a part of a tensor in float32, dequantizing no row beyond it.

        Args:
          name: its Hugging Face name.
          index: a slice a dimension; rows of queries and keys in whole heads.
        """
        tensor = self._tensors[_gguf_name(name)]
        rows, *rest = index
        values = gguf.dequantize(tensor.data[rows], tensor.tensor_type)
        if self._family == "llama" and re.search(r"\.self_attn\.[qk]_proj\.", name):
            # The file has the two of a rotated pair side by side, Hugging Face in two halves.
            heads = values.reshape(-1, self.config.head_dim // 2, 2, *values.shape[1:])
            values = heads.swapaxes(1, 2).reshape(values.shape)
        return values[(slice(None), *rest)].astype(np.float32)

    def files(self) -> dict[str, bytes]:
        """Returns what the file says of ids and chat, as files of a Hugging Face folder."""
        names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
        ids = {
            theirs: self._fields.get(f"tokenizer.ggml.{name}_token_id")
            for theirs, name in names.items()
        }
        turn = self._fields.get("tokenizer.ggml.eot_token_id")
        if turn not in (None, ids["eos_token_id"]):
            ids["eos_token_id"] = [ids["eos_token_id"], turn]
        files = {"config.json": json.dumps(ids).encode()}
        if template := self._fields.get("tokenizer.chat_template"):
            files["chat_template.jinja"] = template.encode()
        return files

    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer in the file.

        Raises:
          UserError: it is of a kind that cannot be rebuilt here.
        """
        model, kind = self._field("tokenizer.ggml.model"), self._fields.get("tokenizer.ggml.pre")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        of_regex = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        words = {
            "smollm": [pre_tokenizers.Digits(individual_digits=True), byte_level],
            "gpt-2": [byte_level],
            "llama-bpe": [pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated"), of_regex],
            "qwen2": [
                pre_tokenizers.Split(Regex(_LLAMA3_WORDS.replace("{1,3}", "")), "isolated"),
                of_regex,
            ],
        }
        if model != "gpt2" or kind not in words:
            raise UserError(
                f"{self._path}: its tokenizer ({model!r}, {kind!r}) cannot be rebuilt from a GGUF "
                "file; give the model's Hugging Face folder instead"
            )
        tokens = self._field("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ")) for merge in self._field("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(
            models.BPE(
                vocab={token: number for number, token in enumerate(tokens)},
                merges=merges,
                ignore_merges=kind == "llama-bpe",
            )
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words[kind])
        tokenizer.decoder = decoders.ByteLevel()
        types = self._field("tokenizer.ggml.token_type")
        tokenizer.add_special_tokens(
            [
                AddedToken(token, special=True, normalized=False)
                for token, of_type in zip(tokens, types, strict=True)
                if of_type == _SPECIAL_TYPE
            ]
        )
        begin = self._fields.get("tokenizer.ggml.bos_token_id")
        # Llama 3's files begin a text whether they say so or not.
        if begin is not None and self._fields.get(
            "tokenizer.ggml.add_bos_token", kind == "llama-bpe"
        ):
            token = tokens[begin]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{token} $A", special_tokens=[(token, begin)]
            )
        tokenizer.encode_special_tokens = True  # as `load_tokenizer` has it
        return tokenizer

    def _field(self, name: str) -> Any:
        if name not in self._fields:
            raise UserError(f"{self._path} lacks the field {name!r}")
        return self._fields[name]

    def _config(self) -> ModelConfig:
        def of_model(name: str, default: Any = None) -> Any:
            name = f"{self._family}.{name}"
            return self._field(name) if default is None else self._fields.get(name, default)

        scaling = RopeScaling()
        kind = of_model("rope.scaling.type", "none")
        if kind == "linear":
            scaling = RopeScaling("linear", float(of_model("rope.scaling.factor")))
        elif kind != "none":
            raise UserError(f"{self._path}: rope scaling {kind!r} is none of none, linear")
        heads, width = of_model("attention.head_count"), of_model("embedding_length")
        try:
            config = ModelConfig(
                vocab_size=len(self._field("tokenizer.ggml.tokens")),
                num_layers=of_model("block_count"),
                model_dim=width,
                ffn_dim=of_model("feed_forward_length"),
                num_heads=heads,
                num_kv_heads=of_model("attention.head_count_kv", heads),
                head_dim=of_model("attention.key_length", width // heads),
                max_sequence_length=of_model("context_length"),
                rope_theta=float(of_model("rope.freq_base", 10_000.0)),
                rope_scaling=scaling,
                # The file has float32's nearest to it, the config's own digits are meant.
                norm_eps=float(f"{of_model('attention.layer_norm_rms_epsilon'):.6g}"),
                tie_embeddings="output.weight" not in self._tensors,
                **FAMILIES[self._family].fields,
            )
        except ConfigError as error:
            raise UserError(f"{self._path}: {error}") from error
        if _ROPE_FACTORS in self._tensors:
            return self._with_rope_factors(config)
        return config

    def _with_rope_factors(self, config: ModelConfig) -> ModelConfig:
        """Returns the config with the scaling whose factors the file has: they say nothing else."""
        tensor = self._tensors[_ROPE_FACTORS]
        factors = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        scaling = RopeScaling("llama3", factor=max(float(factors.max()), 1.0))
        scaled = dataclasses.replace(config, rope_scaling=scaling)
        expected = np.asarray(rope_frequencies(config) / rope_frequencies(scaled))
        if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
            raise UserError(
                f"{self._path}: the factors in {_ROPE_FACTORS} are not those of Llama 3.1 and its "
                "successors; this decoder cannot compute that model"
            )
        return scaled


def _gguf_name(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_LAYER_NAMES[part]}.{kind}"


def _hugging_face_name(name: str) -> str:
    """Returns the name there, or this one where there is none."""
    ours = {theirs: name for name, theirs in (_NAMES | _LAYER_NAMES).items()}
    if name in ours:
        return ours[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in ours:
        return f"model.layers.{match[1]}.{ours[match[2]]}.{match[3]}"
    return name
