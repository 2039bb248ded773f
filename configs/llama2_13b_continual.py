r"""Continual pretraining of Llama 2 13B with LayerSkip, 52B tokens.

    layerskip prepare --source=TEXT --output=data/llama2_13b_continual --sequence-length=4096 \
        --tokenizer=tokenizer.json
    layerskip train --config=configs/llama2_13b_continual.py --workdir=runs/llama2_13b_continual \
        --config.data.path=data/llama2_13b_continual

LayerSkip, section 5: as for the 7B, but e_scale .1, R = 39 (one early exit a step) and 2e-5.
The paper starts from the published weights. Add
`--config.init_from=FOLDER`, their Hugging Face folder: without it the weights are random.

`--config=configs/llama2_13b_continual.py:plain` is the plain
twin: the same without layer dropout and early exits. `:v5p` and `:h100` lay the
recipe out for the devices in TARGETS below, `:plain-v5p` its twin.
"""

from layerskip_jax.config import as_variant, default_config

# What the recipe is laid out for, chip by chip; `layerskip plan --all` compiles all of it.
TARGETS = {
    "v5p": {
        "mesh.topology": "v5p:4x4x4",
        "mesh.shape.data": 4,
        "mesh.shape.fsdp": 16,
        "model.remat": "full",
    },
    "h100": {
        "mesh.topology": "h100:32",
        "model.remat": "full",
    },
}


def get_config(variant=""):
    config = default_config()
    config.model.vocab_size = 32000
    config.model.num_layers = 40
    config.model.model_dim = 5120
    config.model.ffn_dim = 13824
    config.model.num_heads = 40
    config.model.num_kv_heads = 40
    config.model.max_sequence_length = 4096

    config.layer_dropout.p_max = 0.1
    config.layer_dropout.row_groups = 64

    config.early_exit.curriculum = "rotational"
    config.early_exit.rotation_interval = 39
    config.early_exit.e_scale = 0.1

    config.optimizer.learning_rate = 2e-5
    config.optimizer.warmup_steps = 2000

    config.training.steps = 50000
    config.training.batch_size = 256
    config.training.evaluate_every = 5000
    config.training.evaluate_batches = 16
    config.checkpoint.every_steps = 1000
    config.mesh.shape.data = 1
    config.mesh.shape.fsdp = -1
    return as_variant(config, variant, TARGETS)
