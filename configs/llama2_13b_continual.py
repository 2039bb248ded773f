r"""Continual pretraining of Llama 2 13B with LayerSkip, 52B tokens.

    layerskip prepare --source=TEXT --output=data/llama2_13b_continual --sequence-length=4096 \
        --tokenizer=tokenizer.json
    layerskip train --config=configs/llama2_13b_continual.py --workdir=runs/llama2_13b_continual \
        --config.data.path=data/llama2_13b_continual

LayerSkip, section 5: as for the 7B, but e_scale .1, R = 39 (two neighbours that move up, 1.9
early exits a step on average) and 2e-5.
The paper starts from the published weights. Add
`--config.init_from=FOLDER`, their Hugging Face folder: without it the weights are random.
"""

from common import at_scale

from layerskip_jax.config import as_variant

TARGETS = {
    "v5p": {
        "mesh.topology": "v5p:4x4x4",
        "mesh.shape.data": 4,
        "mesh.shape.fsdp": 16,
        "model.remat": "full",
    },
    "h100": {"mesh.topology": "h100:32", "model.remat": "full"},
}


def get_config(variant=""):
    config = at_scale("Llama 2 13B")
    config.early_exit.rotation_interval = 39
    config.early_exit.e_scale = 0.1
    config.optimizer.learning_rate = 2e-5
    return as_variant(config, variant, TARGETS)
