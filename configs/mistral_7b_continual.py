r"""Continual pretraining of Mistral 7B with LayerSkip.

    layerskip prepare --source=TEXT --output=data/mistral_7b_continual --sequence-length=8192 \
        --tokenizer=tokenizer.json
    layerskip train --config=configs/mistral_7b_continual.py --workdir=runs/mistral_7b_continual \
        --config.data.path=data/mistral_7b_continual

Nobody has published LayerSkip for this model: the settings are those of Llama 3 8B.
A token sees the 4,096 up to itself, as in version 0.1; later versions have no window: set 0.
Add `--config.init_from=FOLDER`, the Hugging Face folder of the published weights: without it the
weights are random.
"""

from common import like_llama3

from layerskip_jax.config import as_variant

TARGETS = {"h100": {"mesh.topology": "h100:64", "model.remat": "full"}}


def get_config(variant=""):
    config = like_llama3("Mistral 7B")
    model = config.model
    model.max_sequence_length = 8192
    model.sliding_window = 4096
    return as_variant(config, variant, TARGETS)
