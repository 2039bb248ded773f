r"""Layer dropout that saves compute and costs no quality, at 1.5B parameters.

    layerskip prepare --source=TEXT --output=data/dont_drop --sequence-length=2048 \
        --tokenizer=tokenizer.json
    layerskip train --config=configs/dont_drop.py --workdir=runs/dont_drop \
        --config.data.path=data/dont_drop

Don't Drop Dropout (arXiv 2609.05275): drop probabilities linear in depth, falling linearly to 0
over the run, p_max .6, the residual branch scaled by 1 / (1 - p); no early exits. The mean
probability is .15, which is the share of the layers' FLOPs saved. What it reached there, at
1.8B: loss 1.836 against 1.849 of the dense model. The shape is that of the 1.5B recipe; the
learning rate is the plain twin's, which `inverse_keep` keeps right.

`--config=configs/dont_drop.py:plain` is the plain
twin: the same without layer dropout and early exits. `:v5e` and `:h100` lay the
recipe out for the devices in TARGETS below, `:plain-v5e` its twin.
"""

from layerskip_jax.config import as_variant, default_config

# What the recipe is laid out for, chip by chip; `layerskip plan --all` compiles all of it.
TARGETS = {
    "v5e": {
        "mesh.topology": "v5e:4x8",
        "model.remat": "full",
    },
    "h100": {
        "mesh.topology": "h100:16",
        "model.remat": "full",
    },
}


def get_config(variant=""):
    config = default_config()
    config.model.vocab_size = 32000
    config.model.num_layers = 24
    config.model.model_dim = 2048
    config.model.ffn_dim = 5504
    config.model.num_heads = 16
    config.model.num_kv_heads = 16
    config.model.max_sequence_length = 2048

    config.layer_dropout.p_max = 0.6
    config.layer_dropout.depth_schedule = "linear"
    config.layer_dropout.time_schedule = "decreasing"
    config.layer_dropout.residual_scale = "inverse_keep"
    config.layer_dropout.row_groups = 64

    config.optimizer.learning_rate = 4e-4
    config.optimizer.warmup_steps = 2000

    config.training.steps = 50000
    config.training.batch_size = 128
    config.training.evaluate_every = 5000
    config.training.evaluate_batches = 16
    config.checkpoint.every_steps = 1000
    config.mesh.shape.data = 1
    config.mesh.shape.fsdp = -1
    return as_variant(config, variant, TARGETS)
