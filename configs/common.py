"""What the recipes of published sizes share; a recipe shows only what is its own.

Every recipe takes a variant after a colon. `plain` is its twin: the same without layer dropout and
early exits. A name in its TARGETS lays it out for those devices, and `plain-NAME` its twin:
`--config=llama2_7b_scratch:v5p`. `layerskip plan --all` plans every target of every recipe.
"""

from layerskip_jax.config import ConfigDict, default_config

# (layers, width, width of the MLP, query heads, key and value heads, vocabulary)
SHAPES = {
    "1.5B": (24, 2048, 5504, 16, 16, 32_000),  # the paper's own
    "Llama 2 7B": (32, 4096, 11008, 32, 32, 32_000),  # and of Llama 1
    "Llama 2 13B": (40, 5120, 13824, 40, 40, 32_000),
    "Llama 2 34B": (48, 8192, 22016, 64, 8, 32_000),
    "Llama 2 70B": (80, 8192, 28672, 64, 8, 32_000),
    "Llama 3.2 1B": (16, 2048, 8192, 32, 8, 128_256),
    "Llama 3 8B": (32, 4096, 14336, 32, 8, 128_256),
    "Llama 3 70B": (80, 8192, 28672, 64, 8, 128_256),
    "Mistral 7B": (32, 4096, 14336, 32, 8, 32_000),
    "Qwen3 8B": (36, 4096, 12288, 32, 8, 151_936),
    "SmolLM3 3B": (36, 2048, 11008, 16, 4, 128_256),
    "OLMo 2 7B": (32, 4096, 11008, 32, 32, 100_352),
}


def at_scale(shape: str) -> ConfigDict:
    """Returns what a recipe begins from: LayerSkip's continual pretraining, 50k steps, sharded.

    Args:
      shape: one of SHAPES.
    """
    config = default_config()
    model = config.model
    model.num_layers, model.model_dim, model.ffn_dim, *rest = SHAPES[shape]
    model.num_heads, model.num_kv_heads, model.vocab_size = rest
    model.max_sequence_length = 4096
    if shape.startswith("Llama 3"):
        model.max_sequence_length = 8192
        model.rope_theta = 500_000.0

    config.layer_dropout.p_max = 0.1
    config.layer_dropout.row_groups = 64  # the batch's shards divide them
    config.early_exit.curriculum = "rotational"
    config.optimizer.warmup_steps = 2000
    config.training.steps = 50_000
    config.training.batch_size = 256
    config.training.evaluate_every = 5000
    config.training.evaluate_batches = 16
    config.checkpoint.every_steps = 1000
    config.mesh.shape.data = 1
    config.mesh.shape.fsdp = -1
    return config


def like_llama3(shape: str) -> ConfigDict:
    """Returns `at_scale` with the settings published with LayerSkip's Llama 3 8B."""
    config = at_scale(shape)
    config.early_exit.rotation_interval = 8
    config.early_exit.e_scale = 0.1
    config.early_exit.exit_token_fraction = 0.25
    config.optimizer.learning_rate = 3e-5
    return config
