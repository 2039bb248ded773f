r"""Continual pretraining of OLMo 2 7B with LayerSkip.

    layerskip prepare --source=TEXT --output=data/olmo2_7b_continual --sequence-length=4096 \
        --tokenizer=tokenizer.json
    layerskip train --config=configs/olmo2_7b_continual.py --workdir=runs/olmo2_7b_continual \
        --config.data.path=data/olmo2_7b_continual

Nobody has published LayerSkip for this model: the settings are those of Llama 3 8B.
Norms come after attention and MLP, and over all heads of the queries and the keys.
Add `--config.init_from=FOLDER`, the Hugging Face folder of the published weights: without it the
weights are random.
"""

from common import like_llama3

from layerskip_jax.config import as_variant

TARGETS = {"h100": {"mesh.topology": "h100:64", "model.remat": "full"}}


def get_config(variant=""):
    config = like_llama3("OLMo 2 7B")
    model = config.model
    model.qk_norm = "all"
    model.norm_position = "after"
    model.rope_theta = 500_000.0
    model.norm_eps = 1e-6
    return as_variant(config, variant, TARGETS)
