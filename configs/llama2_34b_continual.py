r"""Continual pretraining at the shape of Llama 2 34B (CodeLlama 34B) with LayerSkip.

    layerskip prepare --source=TEXT --output=data/llama2_34b_continual --sequence-length=4096 \
        --tokenizer=tokenizer.json
    layerskip train --config=configs/llama2_34b_continual.py:v5p \
        --workdir=runs/llama2_34b_continual --config.data.path=data/llama2_34b_continual \
        --config.init_from=FOLDER

LayerSkip published a checkpoint of CodeLlama 34B without its settings: those of its 13B are taken,
and a learning rate a little lower. Keys and values have 8 heads.
FOLDER is the Hugging Face folder of the published weights; without it they are random.
"""

from common import at_scale

from layerskip_jax.config import as_variant

TARGETS = {
    "v5p": {"mesh.topology": "v5p:4x4x8", "mesh.shape.data": 2, "mesh.shape.fsdp": 64},
    "h100": {"mesh.topology": "h100:32"},
}


def get_config(variant=""):
    config = at_scale("Llama 2 34B")
    config.model.remat = "full"
    config.layer_dropout.row_groups = 128
    config.early_exit.rotation_interval = 47
    config.early_exit.e_scale = 0.1
    config.optimizer.learning_rate = 1.5e-5
    config.checkpoint.every_steps = 500
    return as_variant(config, variant, TARGETS)
