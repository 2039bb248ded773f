"""What the tests of this folder share: small models with random weights, ours and transformers'."""

import jax
import numpy as np
import torch
import transformers

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
        transformers.MistralConfig, {"num_key_value_heads": 2, "sliding_window": None},
    ),
    "qwen2": (
        transformers.Qwen2Config, {"num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
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
