r"""Continual pretraining of Qwen3 8B with LayerSkip.

    layerskip prepare --source=TEXT --output=data/qwen3_8b_continual --sequence-length=4096 \
        --tokenizer=tokenizer.json
    layerskip train --config=configs/qwen3_8b_continual.py --workdir=runs/qwen3_8b_continual \
        --config.data.path=data/qwen3_8b_continual

Nobody has published LayerSkip for this model: the settings are those of Llama 3 8B.
Queries and keys are normed head by head.
Add `--config.init_from=FOLDER`, the Hugging Face folder of the published weights: without it the
weights are random.
"""

from common import like_llama3

from layerskip_jax.config import as_variant

TARGETS = {"h100": {"mesh.topology": "h100:64", "model.remat": "full"}}


def get_config(variant=""):
    config = like_llama3("Qwen3 8B")
    model = config.model
    model.head_dim = 128
    model.qk_norm = "head"
    model.rope_theta = 1_000_000.0
    model.norm_eps = 1e-6
    return as_variant(config, variant, TARGETS)
