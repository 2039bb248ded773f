r"""Continual pretraining of Llama 3 70B with LayerSkip.

    layerskip prepare --source=TEXT --output=data/llama3_70b_continual --sequence-length=8192 \
        --tokenizer=tokenizer.json
    layerskip train --config=configs/llama3_70b_continual.py:v6e \
        --workdir=runs/llama3_70b_continual --config.data.path=data/llama3_70b_continual \
        --config.init_from=FOLDER

No settings of this size are published: those of the Llama 2 13B are taken, with a lower learning
rate. Early exits are scored on a quarter of the tokens, without bias.
FOLDER is the Hugging Face folder of the published weights; without it they are random.
"""

from common import at_scale

from layerskip_jax.config import as_variant

TARGETS = {
    "v6e": {
        "mesh.topology": "v6e:16x16",
        "mesh.shape.fsdp": 64,
        "mesh.shape.tensor": 4,
        "training.gradient_accumulation": 4,
    },
    "h100": {"mesh.topology": "h100:512", "mesh.shape.fsdp": 256, "mesh.shape.tensor": 2},
}


def get_config(variant=""):
    config = at_scale("Llama 3 70B")
    config.model.remat = "full"
    config.layer_dropout.row_groups = 256
    config.early_exit.rotation_interval = 79
    config.early_exit.e_scale = 0.1
    config.early_exit.exit_token_fraction = 0.25
    config.optimizer.learning_rate = 1e-5
    config.training.batch_size = 512
    config.checkpoint.every_steps = 500
    return as_variant(config, variant, TARGETS)
