r"""Layer dropout that saves compute and costs no quality, at 1.5B parameters.

    layerskip prepare --source=TEXT --output=data/dont_drop --sequence-length=2048 \
        --tokenizer=tokenizer.json
    layerskip train --config=configs/dont_drop.py --workdir=runs/dont_drop \
        --config.data.path=data/dont_drop

Don't Drop Dropout (arXiv 2609.05275): drop probabilities linear in depth, falling linearly to 0
over the run, p_max .6, the residual branch scaled by 1 / (1 - p); no early exits. The mean
probability is .15, which is the share of the layers' FLOPs saved. What it reached there, at
1.8B: loss 1.836 against 1.849 of the dense model. The shape is that of the 1.5B recipe; the
learning rate is the plain twin's, which `inverse_keep` keeps right.
"""

from common import at_scale

from layerskip_jax.config import as_variant

TARGETS = {
    "v5e": {"mesh.topology": "v5e:4x8", "model.remat": "full"},
    "h100": {"mesh.topology": "h100:16", "model.remat": "full"},
}


def get_config(variant=""):
    config = at_scale("1.5B")
    config.model.max_sequence_length = 2048
    config.layer_dropout.p_max = 0.6
    config.layer_dropout.depth_schedule = "linear"
    config.layer_dropout.time_schedule = "decreasing"
    config.layer_dropout.residual_scale = "inverse_keep"
    config.early_exit.curriculum = "last"
    config.optimizer.learning_rate = 4e-4
    config.training.batch_size = 128
    return as_variant(config, variant, TARGETS)
