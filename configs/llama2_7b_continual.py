r"""Continual pretraining of Llama 2 7B with LayerSkip, 52B tokens.

    layerskip prepare --source=TEXT --output=data/llama2_7b_continual --sequence-length=4096 \
        --tokenizer=tokenizer.json
    layerskip train --config=configs/llama2_7b_continual.py --workdir=runs/llama2_7b_continual \
        --config.data.path=data/llama2_7b_continual

LayerSkip, section 5: layer dropout constant in time with p_max .1, rotating exits with R = 8
and e_scale .2; 64 GPUs with 4 sequences each, 50k steps at 3e-5. What it reached there:
perplexity on Wikipedia 4.32 to 4.30 at the last layer, 1900 to 8.12 at the middle one.
The paper starts from the published weights. Add
`--config.init_from=FOLDER`, their Hugging Face folder: without it the weights are random.

`--config=configs/llama2_7b_continual.py:plain` is the plain
twin: the same without layer dropout and early exits. `:v5e` and `:h100` lay the
recipe out for the devices in TARGETS below, `:plain-v5e` its twin.
"""

from layerskip_jax.config import as_variant, default_config

# What the recipe is laid out for, chip by chip; `layerskip plan --all` compiles all of it.
TARGETS = {
    "v5e": {
        "mesh.topology": "v5e:8x8",
        "mesh.shape.slice": 2,
        "model.remat": "full",
        "layer_dropout.row_groups": 128,
    },
    "h100": {
        "mesh.topology": "h100:64",
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

    config.layer_dropout.p_max = 0.1
    config.layer_dropout.row_groups = 64

    config.early_exit.curriculum = "rotational"
    config.early_exit.rotation_interval = 8
    config.early_exit.e_scale = 0.2

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
