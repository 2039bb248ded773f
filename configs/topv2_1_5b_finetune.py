r"""Finetuning the 1.5B model on TOPv2 task parsing with LayerSkip.

    layerskip prepare --source=train.jsonl --prompt-field=utterance \
        --completion-field=semantic_parse --output=data/topv2_1_5b_finetune \
        --sequence-length=1024 --tokenizer=tokenizer.json
    layerskip train --config=configs/topv2_1_5b_finetune.py --workdir=runs/topv2_1_5b_finetune \
        --config.data.path=data/topv2_1_5b_finetune
    layerskip evaluate --workdir=runs/topv2_1_5b_finetune --completions=test.jsonl \
        --prompt-field=utterance --completion-field=semantic_parse

A line has the columns of a row of TOPv2's tables: only the parse is learned, and exact match of it
is what the paper reports.
LayerSkip, section 5: p_max .2 constant in time, the gradual curriculum, e_scale 1; 8 GPUs with
32 samples each, 5.8k steps at 1e-4. Self-speculative decoding ran at 2.0 times plain decoding
there (E = 6).
The paper starts from its own 1.5B model. Add
`--config.init_from=RUN`, the folder of such a run: without it the weights are random.
"""

from common import at_scale

from layerskip_jax.config import as_variant

TARGETS = {
    "v6e": {"mesh.topology": "v6e:4x4", "model.remat": "full", "training.gradient_accumulation": 2},
    "h100": {"mesh.topology": "h100:8", "model.remat": "full", "training.gradient_accumulation": 8},
}


def get_config(variant=""):
    config = at_scale("1.5B")
    config.layer_dropout.p_max = 0.2
    config.early_exit.curriculum = "gradual"
    config.early_exit.e_scale = 1.0
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 200
    config.training.steps = 5800
    config.training.evaluate_every = 580
    config.checkpoint.every_steps = 116
    return as_variant(config, variant, TARGETS)
