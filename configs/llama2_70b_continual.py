r"""Continual pretraining of Llama 2 70B with LayerSkip.

    layerskip prepare --source=TEXT --output=data/llama2_70b_continual --sequence-length=4096 \
        --tokenizer=tokenizer.json
    layerskip train --config=configs/llama2_70b_continual.py:v5e \
        --workdir=runs/llama2_70b_continual --config.data.path=data/llama2_70b_continual \
        --config.init_from=FOLDER

LayerSkip published a checkpoint of Llama 2 70B without its settings: those of its 13B are taken,
with a lower learning rate and a batch of two million tokens. Keys and values have 8 heads.
FOLDER is the Hugging Face folder of the published weights; without it they are random.
"""

from common import at_scale

from layerskip_jax.config import as_variant

TARGETS = {
    "v5e": {
        "mesh.topology": "v5e:16x16",
        "mesh.shape.slice": 2,
        "mesh.shape.fsdp": 128,
        "mesh.shape.tensor": 2,
        "model.remat": "offload",
    },
    "h100": {"mesh.topology": "h100:128"},
}


def get_config(variant=""):
    config = at_scale("Llama 2 70B")
    config.model.remat = "full"
    config.layer_dropout.row_groups = 256
    config.early_exit.rotation_interval = 79
    config.early_exit.e_scale = 0.1
    config.optimizer.learning_rate = 1e-5
    config.training.batch_size = 512
    config.checkpoint.every_steps = 500
    return as_variant(config, variant, TARGETS)
