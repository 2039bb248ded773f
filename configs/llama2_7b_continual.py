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
"""

from common import at_scale

from layerskip_jax.config import as_variant

TARGETS = {
    "v5e": {
        "mesh.topology": "v5e:8x8",
        "mesh.shape.slice": 2,
        "model.remat": "full",
        "layer_dropout.row_groups": 128,
    },
    "h100": {"mesh.topology": "h100:64", "model.remat": "full"},
}


def get_config(variant=""):
    config = at_scale("Llama 2 7B")
    config.early_exit.rotation_interval = 8
    config.early_exit.e_scale = 0.2
    config.optimizer.learning_rate = 3e-5
    return as_variant(config, variant, TARGETS)
