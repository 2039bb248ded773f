r"""Continual pretraining of Llama 3.2 1B with LayerSkip.

    layerskip prepare --source=TEXT --output=data/llama32_1b_continual --sequence-length=8192 \
        --tokenizer=tokenizer.json
    layerskip train --config=configs/llama32_1b_continual.py --workdir=runs/llama32_1b_continual \
        --config.data.path=data/llama32_1b_continual

The settings published with the LayerSkip checkpoints: p_max .1 constant in time, R = 8, e_scale
.1. Batch, steps and learning rate were not; those of the Llama 2 7B are taken. The head is a
fifth of this model, so the early exits are scored on a quarter of the tokens, without bias. The
published model also scales its rotary frequencies, which matters beyond 8k tokens.
The paper starts from the published weights. Add
`--config.init_from=FOLDER`, their Hugging Face folder: without it the weights are random.
"""

from common import at_scale

from layerskip_jax.config import as_variant

TARGETS = {
    "v6e": {"mesh.topology": "v6e:4x8", "model.remat": "full"},
    "h100": {"mesh.topology": "h100:32", "model.remat": "full"},
}


def get_config(variant=""):
    config = at_scale("Llama 3.2 1B")
    config.model.tie_embeddings = True
    config.early_exit.rotation_interval = 8
    config.early_exit.e_scale = 0.1
    config.early_exit.exit_token_fraction = 0.25
    config.optimizer.learning_rate = 3e-5
    return as_variant(config, variant, TARGETS)
