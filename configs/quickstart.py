r"""A small LayerSkip model of Python source code, in about three minutes on two CPU cores.

    layerskip prepare --source=stdlib --output=runs/quickstart/data \
        --vocab-size=2048 --sequence-length=128 --validation-fraction=0.02
    layerskip train --config=configs/quickstart.py --workdir=runs/quickstart/model

`make quickstart` runs both, and what comes after. `--config=configs/quickstart.py:plain` is
the plain twin, without layer dropout and early exits.

The recipe is LayerSkip's, with three dials turned for a run of 420 steps: dropout is constant in
time, as in the paper's continual pretraining, since a run this short has no late phase; every exit
that is on weighs the same, where eq. 6 gives the early ones little; and only the exits of a quarter
and a half of the layers learn beside the last one. They are the ones that draft, and scoring three
exits costs less than a rotation over eight. Of the drafts of two layers four in five are accepted,
where it was half with eq. 6 and all exits in rotation, and the last exit is better too.
"""

from layerskip_jax.config import as_variant, default_config


def get_config(variant=""):
    config = default_config()
    config.data.path = "runs/quickstart/data"

    config.model.num_layers = 8
    config.model.model_dim = 128
    config.model.ffn_dim = 352
    config.model.num_heads = 4
    config.model.num_kv_heads = 2
    config.model.max_sequence_length = 256
    config.model.tie_embeddings = True
    config.model.dtype = "float32"
    config.model.remat = "none"

    config.layer_dropout.p_max = 0.2
    config.layer_dropout.row_groups = 8  # so that it runs on 1, 2, 4 or 8 devices

    config.early_exit.curriculum = "all"
    config.early_exit.depth_weight = "uniform"
    config.early_exit.e_scale = 1.0
    config.early_exit.layers = (1, 3)

    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_steps = 40
    config.optimizer.schedule = "wsd"

    config.training.steps = 420
    config.training.batch_size = 16
    config.training.log_every = 20
    config.training.evaluate_every = 100
    config.training.evaluate_batches = 8
    config.checkpoint.every_steps = 200
    return as_variant(config, variant)
