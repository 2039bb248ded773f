r"""Continual pretraining of SmolLM3 3B with LayerSkip.

    layerskip prepare --source=TEXT --output=data/smollm3_3b_continual --sequence-length=4096 \
        --tokenizer=tokenizer.json
    layerskip train --config=configs/smollm3_3b_continual.py --workdir=runs/smollm3_3b_continual \
        --config.data.path=data/smollm3_3b_continual

Nobody has published LayerSkip for this model: the settings are those of Llama 3 8B.
Every fourth layer is without rotary positions.
Add `--config.init_from=FOLDER`, the Hugging Face folder of the published weights: without it the
weights are random.
"""

from common import like_llama3

from layerskip_jax.config import as_variant

TARGETS = {"h100": {"mesh.topology": "h100:64", "model.remat": "full"}}


def get_config(variant=""):
    config = like_llama3("SmolLM3 3B")
    model = config.model
    model.no_rope_every = 4
    model.rope_theta = 5_000_000.0
    model.norm_eps = 1e-6
    model.tie_embeddings = True
    return as_variant(config, variant, TARGETS)
