r"""Finetuning Llama 1 7B on code with LayerSkip, 5.2B tokens.

    layerskip prepare --source=TEXT --output=data/llama1_7b_code_finetune --sequence-length=4096 \
        --tokenizer=tokenizer.json
    layerskip train --config=configs/llama1_7b_code_finetune.py \
        --workdir=runs/llama1_7b_code_finetune --config.data.path=data/llama1_7b_code_finetune

LayerSkip, section 5: p_max .1 constant in time, rotating exits with R = 16, e_scale 1; 32 GPUs
with 4 sequences each, 10k steps at 1e-4. Self-speculative decoding ran at 1.83 times plain
decoding there (HumanEval, E = 8, G = 6).
The paper's code is plain text, all of it learned, and HumanEval's prompts are beginnings of such
text. Where a docstring or a question is to be read only, prepare pairs instead, of which the code
alone is learned:

    layerskip prepare --source=pairs.jsonl --prompt-field=prompt --completion-field=code \
        --output=data/llama1_7b_code_finetune --sequence-length=4096 --tokenizer=tokenizer.json

The paper starts from the published weights. Add
`--config.init_from=FOLDER`, their Hugging Face folder: without it the weights are random.
"""

from common import at_scale

from layerskip_jax.config import as_variant

TARGETS = {
    "v5e": {"mesh.topology": "v5e:8x8", "model.remat": "full"},
    "h100": {"mesh.topology": "h100:32", "model.remat": "full"},
}


def get_config(variant=""):
    config = at_scale("Llama 2 7B")
    config.early_exit.rotation_interval = 16
    config.early_exit.e_scale = 1.0
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 500
    config.training.steps = 10000
    config.training.batch_size = 128
    config.training.evaluate_every = 1000
    config.checkpoint.every_steps = 200
    return as_variant(config, variant, TARGETS)
