r"""Exit adapters before a model that is left as it is: its last layer stays bit for bit the same.

    layerskip train --config=configs/exit_adapters.py --workdir=runs/exit_adapters

As it stands, for the exits of a quarter and a half of the quickstart's layers; another model by
`--config.init_from=MODEL` (the folder of a run or a Hugging Face folder, or a GGUF file), its
prepared data by `--config.data.path=DATA` and its exits by `--config.model.exits.adapters`.
"""

from layerskip_jax.config import as_variant, default_config


def get_config(variant=""):
    config = default_config()
    config.init_from = "runs/quickstart/model"
    config.data.path = "runs/quickstart/data"
    config.model.exits.adapters = (2, 4)
    config.model.exits.rank = 64
    config.model.dtype = "float32"
    config.training.trainable = "exits"

    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 20
    config.optimizer.weight_decay = 0.0

    config.training.steps = 400
    config.training.batch_size = 16
    config.training.log_every = 20
    config.training.evaluate_every = 200  # and before the first step
    config.training.evaluate_batches = 8
    config.checkpoint.every_steps = 200
    return as_variant(config, variant)
