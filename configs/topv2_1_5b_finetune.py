r"""Finetuning the 1.5B model on TOPv2 task parsing with LayerSkip.

    layerskip prepare --source=TEXT --output=data/topv2_1_5b_finetune --sequence-length=1024 \
        --tokenizer=tokenizer.json
    layerskip train --config=configs/topv2_1_5b_finetune.py --workdir=runs/topv2_1_5b_finetune \
        --config.data.path=data/topv2_1_5b_finetune

LayerSkip, section 5: p_max .2 constant in time, the gradual curriculum, e_scale 1; 8 GPUs with
32 samples each, 5.8k steps at 1e-4. Self-speculative decoding ran at 2.0 times plain decoding
there (E = 6).
The paper starts from its own 1.5B model. Add
`--config.init_from=RUN`, the folder of such a run: without it the weights are random.

`--config=configs/topv2_1_5b_finetune.py:plain` is the plain
twin: the same without layer dropout and early exits. `:v6e` and `:h100` lay the
recipe out for the devices in TARGETS below, `:plain-v6e` its twin.
"""

from layerskip_jax.config import as_variant, default_config

# What the recipe is laid out for, chip by chip; `layerskip plan --all` compiles all of it.
TARGETS = {
    "v6e": {
        "mesh.topology": "v6e:4x4",
        "model.remat": "full",
        "training.gradient_accumulation": 2,
    },
    "h100": {
        "mesh.topology": "h100:8",
        "model.remat": "full",
        "training.gradient_accumulation": 8,
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
    config.model.max_sequence_length = 4096

    config.layer_dropout.p_max = 0.2
    config.layer_dropout.row_groups = 64

    config.early_exit.curriculum = "gradual"
    config.early_exit.e_scale = 1.0

    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 200

    config.training.steps = 5800
    config.training.batch_size = 256
    config.training.evaluate_every = 580
    config.training.evaluate_batches = 16
    config.checkpoint.every_steps = 116
    config.mesh.shape.data = 1
    config.mesh.shape.fsdp = -1
    return as_variant(config, variant, TARGETS)
