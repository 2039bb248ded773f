r"""Continual pretraining of Llama 3 70B with LayerSkip.

    layerskip prepare --source=TEXT --output=data/llama3_70b_continual --sequence-length=8192 \
        --tokenizer=tokenizer.json
    layerskip train --config=configs/llama3_70b_continual.py:v6e \
        --workdir=runs/llama3_70b_continual --config.data.path=data/llama3_70b_continual \
        --config.init_from=FOLDER

No settings of this size are published: those of the Llama 2 13B are taken, with a lower learning
rate. Early exits are scored on a quarter of the tokens, without bias.
FOLDER is the Hugging Face folder of the published weights; without it they are random.

`--config=configs/llama3_70b_continual.py:plain` is the plain
twin: the same without layer dropout and early exits. `:v6e` and `:h100` lay the
recipe out for the devices in TARGETS below, `:plain-v6e` its twin.
"""

from layerskip_jax.config import as_variant, default_config

# What the recipe is laid out for, chip by chip; `layerskip plan --all` compiles all of it.
TARGETS = {
    "v6e": {
        "mesh.topology": "v6e:16x16",
        "mesh.shape.fsdp": 64,
        "mesh.shape.tensor": 4,
        "training.gradient_accumulation": 4,
    },
    "h100": {
        "mesh.topology": "h100:512",
        "mesh.shape.fsdp": 256,
        "mesh.shape.tensor": 2,
    },
}


def get_config(variant=""):
    config = default_config()
    config.model.vocab_size = 128256
    config.model.num_layers = 80
    config.model.model_dim = 8192
    config.model.ffn_dim = 28672
    config.model.num_heads = 64
    config.model.num_kv_heads = 8
    config.model.max_sequence_length = 8192
    config.model.rope_theta = 500_000.0
    config.model.remat = "full"

    config.layer_dropout.p_max = 0.1
    config.layer_dropout.row_groups = 256

    config.early_exit.curriculum = "rotational"
    config.early_exit.rotation_interval = 79
    config.early_exit.e_scale = 0.1
    config.early_exit.exit_token_fraction = 0.25

    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_steps = 2000

    config.training.steps = 50000
    config.training.batch_size = 512
    config.training.evaluate_every = 5000
    config.training.evaluate_batches = 16
    config.checkpoint.every_steps = 500
    config.mesh.shape.data = 1
    config.mesh.shape.fsdp = -1
    return as_variant(config, variant, TARGETS)
