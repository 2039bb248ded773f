r"""One model trained five ways, to see what each part of the method does.

    make ablation
    python benchmarks/ablation.py --workdir=runs/ablation-100m --size=100m --source=FOLDER

`--config=configs/ablation.py:VARIANT` with `plain`, `dropout` (layer dropout only), `exits`
(early-exit loss only), `both` or `dont_drop` (Don't Drop Dropout: linear, decreasing, p_max .6,
inverse keep); `VARIANT-100m` is the same at about 100M parameters, for a GPU.
"""

from layerskip_jax.config import ConfigError, default_config

VARIANTS = ("plain", "dropout", "exits", "both", "dont_drop")


def get_config(variant="both"):
    method, _, size = (variant or "both").partition("-")
    if method not in VARIANTS or size not in ("", "100m"):
        known = ", ".join(VARIANTS)
        raise ConfigError(f"--config: {variant!r} is none of {known}, nor one of these with -100m")
    config = default_config()
    config.data.path = "runs/ablation/data"

    config.model.num_layers = 12
    config.model.model_dim = 64
    config.model.ffn_dim = 176
    config.model.num_heads = 4
    config.model.num_kv_heads = 4
    config.model.max_sequence_length = 128
    config.model.dtype = "float32"
    config.model.remat = "full"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.schedule = "wsd"
    config.optimizer.warmup_steps = 40
    config.training.steps = 2000
    config.training.batch_size = 8
    config.training.log_every = 20
    config.training.evaluate_every = 200
    config.training.evaluate_batches = 16
    config.checkpoint.every_steps = 1000

    if size == "100m":
        config.model.num_layers = 12
        config.model.model_dim = 768
        config.model.ffn_dim = 2048
        config.model.num_heads = 12
        config.model.num_kv_heads = 12
        config.model.max_sequence_length = 1024
        config.model.dtype = "bfloat16"
        config.optimizer.learning_rate = 6e-4
        config.optimizer.warmup_steps = 500
        config.training.steps = 10_000
        config.training.batch_size = 64
        config.training.evaluate_every = 1000

    config.layer_dropout.row_groups = 1 if size == "" else 8
    if method in ("dropout", "both"):
        config.layer_dropout.p_max = 0.1
        config.layer_dropout.time_schedule = "exp"
    if method in ("exits", "both"):
        config.early_exit.curriculum = "rotational"
        config.early_exit.rotation_interval = 8
        config.early_exit.e_scale = 1.0
    if method == "dont_drop":
        config.layer_dropout.p_max = 0.6
        config.layer_dropout.depth_schedule = "linear"
        config.layer_dropout.time_schedule = "decreasing"
        config.layer_dropout.residual_scale = "inverse_keep"
    return config
