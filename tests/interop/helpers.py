"""What the tests of this folder share: small models with random weights, ours and transformers'."""

import json

import gguf
import jax
import numpy as np
import torch
import transformers

from layerskip_jax.interop.huggingface import to_hugging_face, to_hugging_face_config
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.model.definition import ModelDefinition

END = "<|end|>"
STEP = 7
EXITS = [
    {"layers": 1, "loss": 4.0, "perplexity": 54.598},
    {"layers": 3, "loss": 3.0, "perplexity": 20.086},
]
CONFIG = ModelConfig(
    vocab_size=300,
    num_layers=3,
    model_dim=32,
    ffn_dim=48,
    num_heads=4,
    num_kv_heads=2,
    max_sequence_length=64,
    rope_theta=5000.0,
    dtype="float32",
)


def random_parameters(config, seed=0):
    """Draws every parameter, norms included, so that none can be mistaken for another."""
    definition = ModelDefinition(config)
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return jax.numpy.asarray(rng.normal(scale=0.3, size=leaf.shape), leaf.dtype)

    return definition, jax.tree.map(draw, definition.shapes)


SHAPE = {
    "vocab_size": 296, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
FAMILIES = {
    "llama 2": (transformers.LlamaConfig, {"num_key_value_heads": 4}),
    "llama 3.1": (
        transformers.LlamaConfig, {"num_key_value_heads": 2, "rope_parameters": LLAMA3},
    ),
    "llama 3.2": (
        transformers.LlamaConfig,
        {"num_key_value_heads": 2, "rope_parameters": LLAMA3, "tie_word_embeddings": True},
    ),
    "linear": (
        transformers.LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "mistral": (
        transformers.MistralConfig, {"num_key_value_heads": 2, "sliding_window": 9},
    ),
    "qwen2": (
        transformers.Qwen2Config, {"num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "qwen3": (transformers.Qwen3Config, {"num_key_value_heads": 2, "head_dim": 12}),
    "qwen3 with windows": (
        transformers.Qwen3Config,
        {
            "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 9,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "smollm3": (
        transformers.SmolLM3Config, {"num_key_value_heads": 2, "no_rope_layer_interval": 2},
    ),
    "olmo2": (transformers.Olmo2Config, {"num_key_value_heads": 2}),
}  # fmt: skip


def published(
    folder, tokenizer_file, family, dtype=torch.bfloat16, vocab_size=SHAPE["vocab_size"], **save
):
    """Saves a random model of the family as transformers does, every tensor of it random."""
    cls, changes = FAMILIES[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        cls(**SHAPE | {"vocab_size": vocab_size}, **changes)
    )
    for parameter in model.parameters():  # norms and biases too
        torch.nn.init.normal_(parameter, std=0.3)
    model.to(dtype).save_pretrained(folder, **save)
    (folder / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    return folder


def write_gguf(
    path,
    config,
    parameters,
    tokenizer_file,
    quantize=None,
    extend=lambda writer: None,
    tokens=None,
):
    """Writes a model as llama.cpp's converter does: rotated pairs of q and k side by side."""
    architecture = to_hugging_face_config(config, eos_token_id=0)["model_type"]
    architecture = "llama" if architecture == "mistral" else architecture
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_sequence_length)
    writer.add_embedding_length(config.model_dim)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    if config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    tokenizer = json.loads(tokenizer_file.read_text())["model"]
    vocab = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    vocab += [f"<unused {i}>" for i in range((tokens or config.vocab_size) - len(vocab))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocab)
    writer.add_token_types([3] + [1] * (len(vocab) - 1))
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["merges"]])
    writer.add_eos_token_id(0)
    extend(writer)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    }  # fmt: skip
    if architecture == "olmo2":
        names["post_attention_layernorm"] = "post_attention_norm"
        names["post_feedforward_layernorm"] = "post_ffw_norm"
    for name, value in to_hugging_face(parameters, config):
        stem, kind = name.rsplit(".", 1)
        if stem.startswith("model.layers."):
            _, _, layer, stem = stem.split(".", 3)
            if stem[10:] in ("q_proj", "k_proj") and architecture in ("llama", "smollm3"):
                heads = value.reshape(-1, 2, config.head_dim // 2, value.shape[1])
                value = heads.swapaxes(1, 2).reshape(value.shape)
            target = f"blk.{layer}.{names[stem]}.{kind}"
        else:
            target = f"{names[stem]}.{kind}"
        value = np.ascontiguousarray(value, np.float32)
        if quantize and value.ndim == 2:
            writer.add_tensor(target, gguf.quantize(value, quantize), raw_dtype=quantize)
        else:
            writer.add_tensor(target, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
