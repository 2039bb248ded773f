r"""Continual pretraining of Llama 2 70B with LayerSkip.

    layerskip prepare --source=TEXT --output=data/llama2_70b_continual --sequence-length=4096 \
        --tokenizer=tokenizer.json
    layerskip train --config=configs/llama2_70b_continual.py:v5e \
        --workdir=runs/llama2_70b_continual --config.data.path=data/llama2_70b_continual \
        --config.init_from=FOLDER

LayerSkip published a checkpoint of Llama 2 70B without its settings: those of its 13B are taken,
with a lower learning rate and a batch of two million tokens. Keys and values have 8 heads.
FOLDER is the Hugging Face folder of the published weights; without it they are random.

`--config=configs/llama2_70b_continual.py:plain` is the plain
twin: the same without layer dropout and early exits. `:v5e` and `:h100` lay the
recipe out for the devices in TARGETS below, `:plain-v5e` its twin.
"""

from layerskip_jax.config import as_variant, default_config

# What the recipe is laid out for, chip by chip; `layerskip plan --all` compiles all of it.
TARGETS = {
    "v5e": {
        "mesh.topology": "v5e:16x16",
        "mesh.shape.slice": 2,
        "mesh.shape.fsdp": 128,
        "mesh.shape.tensor": 2,
        "model.remat": "offload",
    },
    "h100": {
        "mesh.topology": "h100:128",
    },
}


def get_config(variant=""):
    config = default_config()
    config.model.vocab_size = 32000
    config.model.num_layers = 80
    config.model.model_dim = 8192
    config.model.ffn_dim = 28672
    config.model.num_heads = 64
    config.model.num_kv_heads = 8
    config.model.max_sequence_length = 4096
    config.model.remat = "full"

    config.layer_dropout.p_max = 0.1
    config.layer_dropout.row_groups = 256

    config.early_exit.curriculum = "rotational"
    config.early_exit.rotation_interval = 79
    config.early_exit.e_scale = 0.1

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
