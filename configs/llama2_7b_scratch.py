r"""LayerSkip from scratch at the shape of Llama 2 7B, 26B tokens.

    layerskip prepare --source=TEXT --output=data/llama2_7b_scratch --sequence-length=4096 \
        --tokenizer=tokenizer.json
    layerskip train --config=configs/llama2_7b_scratch.py --workdir=runs/llama2_7b_scratch \
        --config.data.path=data/llama2_7b_scratch

LayerSkip, section 5: layer dropout exponential in time with p_max .2, rotating exits with R = 31
(two neighbours that move up, 1.9 early exits a step on average), e_scale .2; 32 GPUs with 4
sequences each, 50k steps. With layer dropout the paper doubles the learning rate, to 8e-4; the
plain twin goes back to 4e-4.
Self-speculative decoding of the result ran at 2.16 times plain decoding there (CNN/DM, E = 8).
"""

from common import at_scale

from layerskip_jax.config import as_variant

TARGETS = {
    "v5e": {"mesh.topology": "v5e:8x8", "model.remat": "full"},
    "v5p": {"mesh.topology": "v5p:4x4x4", "mesh.shape.data": 4, "mesh.shape.fsdp": 16},
    "v6e": {"mesh.topology": "v6e:8x8", "model.remat": "full"},
    "h100": {"mesh.topology": "h100:32", "model.remat": "full"},
}


def get_config(variant=""):
    config = at_scale("Llama 2 7B")
    config.layer_dropout.p_max = 0.2
    config.layer_dropout.time_schedule = "exp"
    config.early_exit.rotation_interval = 31
    config.early_exit.e_scale = 0.2
    config.optimizer.learning_rate = 8e-4 if "plain" not in variant else 4e-4
    config.training.batch_size = 128
    return as_variant(config, variant, TARGETS)
