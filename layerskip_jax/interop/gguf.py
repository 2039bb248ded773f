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
    normalizers,
    pre_tokenizers,
    processors,
)

from layerskip_jax.interop.huggingface import FAMILIES, tensor_shapes
from layerskip_jax.model.config import ModelConfig, RopeScaling
from layerskip_jax.model.rope import rope_frequencies
from layerskip_jax.schema import ConfigError, UserError

_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
# Some are of one family alone.
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMS_AFTER = {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """What llama.cpp makes of a family.

    Attributes:
      fields: of `ModelConfig`, what its files do not say.
      pairs: whether the two of a rotated pair lie side by side, not in two halves.
    """

    fields: dict[str, Any]
    pairs: bool = False


# Mistral is a `llama` there. Of SmolLM3 llama.cpp knows that every fourth layer has no positions.
_ARCHITECTURES = {
    "llama": _Architecture({}, pairs=True),
    "qwen2": _Architecture(FAMILIES["qwen2"].fields),
    "qwen3": _Architecture(FAMILIES["qwen3"].fields),
    "smollm3": _Architecture({"no_rope_every": 4}, pairs=True),
    "olmo2": _Architecture(FAMILIES["olmo2"].fields),
}
# How each kind of byte-level BPE parts words: published with the models, see llama.cpp's
# `llama-vocab.cpp` for the list.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level_of(regex: str) -> list[pre_tokenizers.PreTokenizer]:
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return [pre_tokenizers.Split(Regex(regex), "isolated"), bytes_alone]


def _byte_level_of_gpt2(*before: pre_tokenizers.PreTokenizer) -> list[pre_tokenizers.PreTokenizer]:
    return [*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]


_WORDS = {
    "smollm": lambda: _byte_level_of_gpt2(pre_tokenizers.Digits(individual_digits=True)),
    "gpt-2": _byte_level_of_gpt2,
    "llama-bpe": lambda: _byte_level_of(_LLAMA3_WORDS),
    "dbrx": lambda: _byte_level_of(_LLAMA3_WORDS),
    "qwen2": lambda: _byte_level_of(_LLAMA3_WORDS.replace("{1,3}", "")),
}
_ROPE_FACTORS = "rope_freqs.weight"  # what the frequencies of Llama 3.1 and later are divided by
# Types of tokens. What is of another type than these stands in no text.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_SPACE = "\u2581"  # how SentencePiece writes a space
_BOS = 1  # where SentencePiece has it, in files that do not say
# Names of one way to part words.
_SAME_WORDS = {
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2",
    "smaug-bpe": "dbrx",
}  # fmt: skip


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
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from error
        except (ValueError, IndexError, KeyError) as error:
            raise UserError(
                f"{path} is damaged or no GGUF file ({error}); download it again"
            ) from error
        if (parts := self._fields.get("split.count", 0)) > 1:
            raise UserError(
                f"{path} is part {self._fields.get('split.no', 0) + 1} of {parts}; join them with "
                "llama.cpp's `llama-gguf-split --merge FIRST_PART OUTPUT`"
            )
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._family = self._field("general.architecture")
        if self._family not in _ARCHITECTURES:
            raise UserError(
                f"{path}: architecture {self._family!r} is none of {', '.join(_ARCHITECTURES)}; "
                "this decoder cannot compute that model"
            )
        self.end_token_id = self._fields.get("tokenizer.ggml.eos_token_id")
        self.config = self._config()
        self._names = {name: _gguf_name(name, self.config) for name in tensor_shapes(self.config)}
        ours = {there: name for name, there in self._names.items()}
        # What has no name there keeps its own, to be named as unknown.
        self.shapes = {
            ours.get(name, name): tuple(int(size) for size in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
            if name != _ROPE_FACTORS
        }

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Returns a part of a tensor in float32, dequantizing no row beyond it.

        Args:
          name: its Hugging Face name.
          index: a slice a dimension; rows of queries and keys in whole heads.
        """
        tensor = self._tensors[self._names[name]]
        rows, *rest = index
        values = gguf.dequantize(tensor.data[rows], tensor.tensor_type)
        if _ARCHITECTURES[self._family].pairs and re.search(r"\.self_attn\.[qk]_proj\.", name):
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
        if None not in (turn, ids["eos_token_id"]) and turn != ids["eos_token_id"]:
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
        kind = _SAME_WORDS.get(kind, kind)
        tokens = self._field("tokenizer.ggml.tokens")
        types = self._of_tokens("token_type")
        if model == "llama":
            tokenizer = self._sentencepiece(tokens, types)
        elif model == "gpt2" and kind in _WORDS:
            tokenizer = self._byte_level(tokens, kind)
        else:
            raise UserError(
                f"{self._path}: its tokenizer ({model!r}, {kind!r}) cannot be rebuilt from a GGUF "
                "file; give the model's Hugging Face folder instead"
            )
        of_type = list(zip(tokens, types, strict=True))
        tokenizer.add_special_tokens(
            [
                AddedToken(token, special=True, normalized=False)
                for token, number in of_type
                if number == _CONTROL
            ]
        )
        tokenizer.add_tokens(
            [
                AddedToken(token, special=False, normalized=False)
                for token, number in of_type
                if number == _USER_DEFINED
            ]
        )
        begin = self._fields.get("tokenizer.ggml.bos_token_id")
        if begin is None and model == "llama" and types[_BOS] == _CONTROL:
            begin = _BOS
        # Files of SentencePiece and of Llama 3 begin a text whether they say so or not.
        begins = model == "llama" or kind == "llama-bpe"
        if begin is not None and self._fields.get("tokenizer.ggml.add_bos_token", begins):
            token = tokens[begin]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{token} $A", special_tokens=[(token, begin)]
            )
        tokenizer.encode_special_tokens = True  # as `load_tokenizer` has it
        return tokenizer

    def _byte_level(self, tokens: list[str], kind: str) -> Tokenizer:
        merges = [tuple(merge.split(" ")) for merge in self._field("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(
            models.BPE(
                vocab={token: number for number, token in enumerate(tokens)},
                merges=merges,
                ignore_merges=kind == "llama-bpe",
            )
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_WORDS[kind]())
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def _sentencepiece(self, tokens: list[str], types: list[int]) -> Tokenizer:
        """Returns SentencePiece's BPE, as the converter of `transformers` 4 writes it.

        The file has no merges: a pair is merged where it makes a token, the best score first. A
        character without a token becomes its bytes. A text begins with a space, which is taken off
        again, unless the file says otherwise.
        """
        scores = self._of_tokens("scores")
        vocab = {token: number for number, token in enumerate(tokens)}
        unknown = self._fields.get("tokenizer.ggml.unknown_token_id", 0)
        tokenizer = Tokenizer(
            models.BPE(
                vocab=vocab,
                merges=_merges(tokens, scores, types),
                unk_token=tokens[unknown],
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        prefix = self._fields.get("tokenizer.ggml.add_space_prefix", True)
        # Not `Metaspace`, to which a text that begins with a space is one that does not.
        prepend = [normalizers.Prepend(_SPACE)] if prefix else []
        tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE)])
        strip = [decoders.Strip(" ", 1, 0)] if prefix else []
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        return tokenizer

    def _of_tokens(self, name: str) -> list:
        """Returns the field that says something of each token."""
        values, tokens = self._field(f"tokenizer.ggml.{name}"), self._field("tokenizer.ggml.tokens")
        if len(values) != len(tokens):
            raise UserError(
                f"{self._path} says {name} of {len(values)} tokens and has {len(tokens)}; it is "
                "damaged"
            )
        return values

    def _field(self, name: str) -> Any:
        if name not in self._fields:
            raise UserError(f"{self._path} lacks the field {name!r}")
        return self._fields[name]

    def _config(self) -> ModelConfig:
        def refuse(reason: str):
            raise UserError(f"{self._path}: {reason}; this decoder cannot compute that model")

        def of_model(name: str, default: Any = None) -> Any:
            name = f"{self._family}.{name}"
            value = self._field(name) if default is None else self._fields.get(name, default)
            if isinstance(value, list):  # one for each layer
                if len(set(value)) != 1:
                    refuse(f"{name}={value} differs from layer to layer")
                value = value[0]
            return value

        scaling = RopeScaling()
        factor = float(of_model("rope.scaling.factor", of_model("rope.scale_linear", 0.0)))
        # A factor by itself divides positions, as in llama.cpp.
        kind = of_model("rope.scaling.type", "linear" if factor else "none")
        if kind == "linear":
            scaling = RopeScaling("linear", factor or 1.0)
        elif kind != "none":
            refuse(f"rope scaling {kind!r} is none of none, linear")
        heads, width = of_model("attention.head_count"), of_model("embedding_length")
        head_dim = of_model("attention.key_length", width // max(heads, 1))
        for name in ("attention.value_length", "rope.dimension_count"):
            if (size := of_model(name, head_dim)) != head_dim:
                refuse(f"{name}={size} is not the width of a head, {head_dim}")
        context = of_model("context_length")
        window = of_model("attention.sliding_window", 0)
        if window and self._family == "olmo2":
            refuse(f"attention.sliding_window={window}, which OLMo 3 has in some of its layers")
        embedding = self._tensors.get("token_embd.weight")
        tokens = self._field("tokenizer.ggml.tokens")
        try:
            config = ModelConfig(
                vocab_size=len(tokens) if embedding is None else int(embedding.shape[-1]),
                num_layers=of_model("block_count"),
                model_dim=width,
                ffn_dim=of_model("feed_forward_length"),
                num_heads=heads,
                num_kv_heads=of_model("attention.head_count_kv", heads),
                head_dim=head_dim,
                max_sequence_length=context,
                rope_theta=float(of_model("rope.freq_base", 10_000.0)),
                rope_scaling=scaling,
                # The file has float32's nearest to it, the config's own digits are meant.
                norm_eps=float(f"{of_model('attention.layer_norm_rms_epsilon'):.6g}"),
                tie_embeddings="output.weight" not in self._tensors,
                sliding_window=window if window < context else 0,
                **_ARCHITECTURES[self._family].fields,
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


def _merges(tokens: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """Returns the pairs that make a token of a text, in the order in which they are merged."""
    # No text is merged to a special token, or to a byte's.
    pieces = {
        token: number
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == _NORMAL
    }
    found = []
    for token, number in pieces.items():
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in pieces and right in pieces:
                order = (-scores[number], number, pieces[left])
                found.append((order, left, right))
    return [(left, right) for _, left, right in sorted(found)]


def _gguf_name(name: str, config: ModelConfig) -> str:
    """Returns what a tensor is called there, given its Hugging Face name."""
    if name in _NAMES:
        return _NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    names = _LAYER_NAMES | (_NORMS_AFTER if config.norm_position == "after" else {})
    return f"blk.{layer}.{names[part]}.{kind}"
