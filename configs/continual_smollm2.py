r"""Continual pretraining of SmolLM2 135M with LayerSkip, from its published weights.

    layerskip prepare --source=TEXT --output=data/smollm2 --sequence-length=1024 --tokenizer=FOLDER
    layerskip train --config=configs/continual_smollm2.py --workdir=runs/smollm2 \
        --config.data.path=data/smollm2 --config.init_from=FOLDER

FOLDER is the model's Hugging Face folder, or one that `layerskip import` made of its GGUF file.
The shape and the tokenizer are the model's. `:cpu` is the same for two cores and half an
hour: prepare windows of 256 tokens, and a validation set of a few dozen of them.

Layer dropout and the early-exit loss are those of the paper's continual pretraining: p_max .1
constant in time, e_scale .2, rotating exits, here every fifth layer.
"""

from layerskip_jax.config import as_variant, default_config


def get_config(variant=""):
    config = default_config()
    small = variant == "cpu"
    config.layer_dropout.p_max = 0.1
    config.layer_dropout.row_groups = 1 if small else 8

    config.early_exit.curriculum = "rotational"
    config.early_exit.rotation_interval = 5
    config.early_exit.e_scale = 0.2

    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 20 if small else 100
    config.training.batch_size = 2 if small else 64
    config.training.steps = 150 if small else 3000
    config.training.log_every = 10
    config.training.evaluate_every = 150 if small else 500  # and before the first step
    config.training.evaluate_batches = 16
    config.training.loss_chunk = 64
    config.checkpoint.every_steps = 50 if small else 500
    config.model.remat = "full"
    config.model.dtype = "float32" if small else "bfloat16"
    return config if small else as_variant(config, variant)
