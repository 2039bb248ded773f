r"""LayerSkip from scratch at 1.5B parameters, 26B tokens.

    layerskip prepare --source=TEXT --output=data/scratch_1_5b --sequence-length=4096 \
        --tokenizer=tokenizer.json
    layerskip train --config=configs/scratch_1_5b.py --workdir=runs/scratch_1_5b \
        --config.data.path=data/scratch_1_5b

LayerSkip, section 5: 24 layers of width 2048, layer dropout exponential in time with p_max .1,
rotating exits with R = 23 (two neighbours that move up, 1.8 early exits a step on average), e_scale
.2; 32 GPUs with 4 sequences each, 50k steps. With layer dropout the paper doubles the learning
rate, to 8e-4; the plain twin goes back to 4e-4.
"""

from common import at_scale

from layerskip_jax.config import as_variant

TARGETS = {
    "v5e": {"mesh.topology": "v5e:4x8", "model.remat": "full"},
    "h100": {"mesh.topology": "h100:32", "model.remat": "full"},
}


def get_config(variant=""):
    config = at_scale("1.5B")
    config.layer_dropout.time_schedule = "exp"
    config.early_exit.rotation_interval = 23
    config.early_exit.e_scale = 0.2
    config.optimizer.learning_rate = 8e-4 if "plain" not in variant else 4e-4
    config.training.batch_size = 128
    return as_variant(config, variant, TARGETS)
