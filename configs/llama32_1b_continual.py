r"""Continual pretraining of Llama 3.2 1B with LayerSkip.

    layerskip prepare --source=TEXT --output=data/llama32_1b_continual --sequence-length=8192 \
        --tokenizer=tokenizer.json
    layerskip train --config=configs/llama32_1b_continual.py --workdir=runs/llama32_1b_continual \
        --config.data.path=data/llama32_1b_continual

The settings published with the LayerSkip checkpoints: p_max .1 constant in time, R = 8, e_scale
.1. Batch, steps and learning rate were not; those of the Llama 2 7B are taken. The head is a
fifth of this model, so the early exits are scored on a quarter of the tokens, without bias. The
published model also scales its rotary frequencies, which matters beyond 8k tokens.
The paper starts from the published weights. Add
`--config.init_from=FOLDER`, their Hugging Face folder: without it the weights are random.

`--config=configs/llama32_1b_continual.py:plain` is the plain
twin: the same without layer dropout and early exits. `:v6e` and `:h100` lay the
recipe out for the devices in TARGETS below, `:plain-v6e` its twin.
"""

from layerskip_jax.config import as_variant, default_config

# What the recipe is laid out for, chip by chip; `layerskip plan --all` compiles all of it.
TARGETS = {
    "v6e": {
        "mesh.topology": "v6e:4x8",
        "model.remat": "full",
    },
    "h100": {
        "mesh.topology": "h100:32",
        "model.remat": "full",
    },
}


def get_config(variant=""):
    config = default_config()
    config.model.vocab_size = 128256
    config.model.num_layers = 16
    config.model.model_dim = 2048
    config.model.ffn_dim = 8192
    config.model.num_heads = 32
    config.model.num_kv_heads = 8
    config.model.max_sequence_length = 8192
    config.model.rope_theta = 500_000.0
    config.model.tie_embeddings = True

    config.layer_dropout.p_max = 0.1
    config.layer_dropout.row_groups = 64

    config.early_exit.curriculum = "rotational"
    config.early_exit.rotation_interval = 8
    config.early_exit.e_scale = 0.1
    config.early_exit.exit_token_fraction = 0.25

    config.optimizer.learning_rate = 3e-5
    config.optimizer.warmup_steps = 2000

    config.training.steps = 50000
    config.training.batch_size = 256
    config.training.evaluate_every = 5000
    config.training.evaluate_batches = 16
    config.checkpoint.every_steps = 1000
    config.mesh.shape.data = 1
    config.mesh.shape.fsdp = -1
    return as_variant(config, variant, TARGETS)
