r"""LayerSkip from scratch at the shape of Llama 2 7B, 26B tokens.

    layerskip prepare --source=TEXT --output=data/llama2_7b_scratch --sequence-length=4096 \
        --tokenizer=tokenizer.json
    layerskip train --config=configs/llama2_7b_scratch.py --workdir=runs/llama2_7b_scratch \
        --config.data.path=data/llama2_7b_scratch

LayerSkip, section 5: layer dropout exponential in time with p_max .2, rotating exits with R = 31
(one early exit a step), e_scale .2; 32 GPUs with 4 sequences each, 50k steps. With layer
dropout the paper doubles the learning rate, to 8e-4; the plain twin goes back to 4e-4.
Self-speculative decoding of the result ran at 2.16 times plain decoding there (CNN/DM, E = 8).

`--config=configs/llama2_7b_scratch.py:plain` is the plain
twin: the same without layer dropout and early exits. `:v5e`, `:v5p`, `:v6e` and `:h100` lay the
recipe out for the devices in TARGETS below, `:plain-v5e` its twin.
"""

from layerskip_jax.config import as_variant, default_config

# What the recipe is laid out for, chip by chip; `layerskip plan --all` compiles all of it.
TARGETS = {
    "v5e": {
        "mesh.topology": "v5e:8x8",
        "model.remat": "full",
    },
    "v5p": {
        "mesh.topology": "v5p:4x4x4",
        "mesh.shape.data": 4,
        "mesh.shape.fsdp": 16,
    },
    "v6e": {
        "mesh.topology": "v6e:8x8",
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
    config.model.num_layers = 32
    config.model.model_dim = 4096
    config.model.ffn_dim = 11008
    config.model.num_heads = 32
    config.model.num_kv_heads = 32
    config.model.max_sequence_length = 4096

    config.layer_dropout.p_max = 0.2
    config.layer_dropout.time_schedule = "exp"
    config.layer_dropout.row_groups = 64

    config.early_exit.curriculum = "rotational"
    config.early_exit.rotation_interval = 31
    config.early_exit.e_scale = 0.2

    config.optimizer.learning_rate = 8e-4 if "plain" not in variant else 4e-4
    config.optimizer.warmup_steps = 2000

    config.training.steps = 50000
    config.training.batch_size = 128
    config.training.evaluate_every = 5000
    config.training.evaluate_batches = 16
    config.checkpoint.every_steps = 1000
    config.mesh.shape.data = 1
    config.mesh.shape.fsdp = -1
    return as_variant(config, variant, TARGETS)
