"""What the tests of this folder share: a small model with random weights."""

import jax
import numpy as np

from layerskip_jax.model.config import ModelConfig
from layerskip_jax.training.state import ModelDefinition

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
