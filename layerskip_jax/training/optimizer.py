"""Optimizers by name, with warm-up, a decay, and clipping by global norm."""

import functools
from collections.abc import Callable

import jax
import optax

from layerskip_jax.config import OptimizerConfig
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.model.definition import ModelDefinition, Parameters
from layerskip_jax.schema import require_choice
from layerskip_jax.training.muon import Matrices, muon
from layerskip_jax.training.trainable import ALL, trained
from layerskip_jax.training.width_transfer import WidthTransfer, is_vector, name_of

Transformation = optax.GradientTransformation
Mask = Callable[[Parameters], Parameters]


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the optimizer step."""
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    warmup = min(config.warmup_steps, total_steps)
    rest = max(total_steps - warmup, 1)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, config.final_fraction)
    elif config.schedule == "wsd":
        decay = max(round(total_steps * config.decay_fraction), 1)
        stay = max(rest - decay, 0)
        after = optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, final, decay)], [stay]
        )
    else:
        after = optax.constant_schedule(peak)
    if warmup == 0:
        return after
    # The first step already moves: step t of the warm-up uses (t + 1) / warmup of the peak.
    ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([ramp, after], [warmup])


def _adamw(
    config: OptimizerConfig,
    rate: optax.Schedule,
    decayed: Mask,
    matrices: Matrices,
    transfer: WidthTransfer,
) -> Transformation:
    # As `optax.adamw`, with what the width asks of a step between Adam and the decay.
    return optax.chain(
        transfer.of_adam(optax.scale_by_adam(config.beta1, config.beta2, config.eps)),
        optax.add_decayed_weights(config.weight_decay, decayed),
        optax.scale_by_learning_rate(rate),
    )


def _muon(
    config: OptimizerConfig,
    rate: optax.Schedule,
    decayed: Mask,
    matrices: Matrices,
    transfer: WidthTransfer,
) -> Transformation:
    ways = {
        "muon": muon(config, rate, matrices, transfer),
        "adamw": _adamw(config, rate, decayed, matrices, transfer),
    }
    return optax.partition(ways, matrices.labels)


# By name, what makes it of its settings, its learning rate, which parameters decay, which are
# matrices of the layers, and what the width asks of their steps. Its state is what its `init`
# makes: shardings, checkpoints and plans read no more than that.
OPTIMIZERS: dict[
    str,
    Callable[[OptimizerConfig, optax.Schedule, Mask, Matrices, WidthTransfer], Transformation],
]
OPTIMIZERS = {"adamw": _adamw, "muon": _muon}


def make_optimizer(
    config: OptimizerConfig, total_steps: int, matrices: Matrices, model: ModelConfig
) -> Transformation:
    """Returns clipping followed by the optimizer; decay skips the scales of norms and the biases.

    Args:
      config: which optimizer, and its settings.
      total_steps: T.
      matrices: which parameters are matrices of the layers, and the devices that hold them.
      model: whose parameters; its width counts where `width_transfer` is on.

    Raises:
      ConfigError: there is no optimizer of that name.
    """
    require_choice("config.optimizer.name", config.name, OPTIMIZERS)

    def decayed(parameters: Parameters) -> Parameters:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not is_vector(name_of(path)), parameters
        )

    rate = learning_rate_schedule(config, total_steps)
    transfer = WidthTransfer(config, model)
    optimizer = OPTIMIZERS[config.name](config, rate, decayed, matrices, transfer)
    if config.clip_norm == 0:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


@functools.cache
def state_share(config: OptimizerConfig, model: ModelConfig, trainable: str = ALL) -> float:
    """Returns the bytes of the optimizer's arrays as a multiple of those of what it trains.

    Kept, since a search asks it of every layout of one model.

    Args:
      config: which optimizer.
      model: whose parameters.
      trainable: which of them are trained.
    """
    definition = ModelDefinition(model)
    shapes = trained(definition.shapes, trainable)

    def size(tree) -> int:
        leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim]  # not the count of steps
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    optimizer = make_optimizer(config, 1, Matrices(definition.logical_axes), model)
    return size(jax.eval_shape(optimizer.init, shapes)) / size(shapes)
