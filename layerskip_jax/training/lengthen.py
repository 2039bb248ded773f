"""Whether a run may end elsewhere than it was begun to: its steps so far must be those of both."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from layerskip_jax.config import RunConfig
from layerskip_jax.early_exit_loss import exit_weights
from layerskip_jax.layer_dropout import drop_probabilities
from layerskip_jax.training.optimizer import learning_rate_schedule

REMEDY = (
    "A run can be lengthened where its schedules do not know its end: with a constant learning "
    "rate or wsd before its decay, and dropout and exits that are constant in time. Set "
    "config.training.steps back, or take another --workdir"
)


def why_not(old: RunConfig, new: RunConfig, done: int) -> list[str]:
    """Returns what forbids a run to go on to another number of steps; nothing where it may.

    Args:
      old: the run.
      new: the same to another number of steps.
      done: steps of its newest checkpoint.
    """
    if new.training.steps < done:
        return [f"{done} steps are done"]
    reasons = []
    for name, schedule in _SCHEDULES:
        before, after = (
            jax.jit(jax.vmap(schedule(config)))(jnp.arange(done)) for config in (old, new)
        )
        same = np.asarray(before == after).reshape(done, -1 if done else 0).all(axis=1)
        if not same.all():
            reasons.append(f"{name(old)}, by which step {int(np.argmin(same)) + 1} was another")
    return reasons


def _learning_rate(config: RunConfig) -> Callable[[Array], Array]:
    return learning_rate_schedule(config.optimizer, config.training.steps)


def _learning_rate_name(config: RunConfig) -> str:
    optimizer = config.optimizer
    if optimizer.warmup_steps > config.training.steps:  # it ends with the run
        return f"config.optimizer.warmup_steps={optimizer.warmup_steps}"
    return f"config.optimizer.schedule={optimizer.schedule!r}"


def _dropout(config: RunConfig) -> Callable[[Array], Array]:
    layers, total = config.model.num_layers, config.training.steps
    return lambda step: drop_probabilities(config.layer_dropout, layers, step, total)


def _dropout_name(config: RunConfig) -> str:
    return f"config.layer_dropout.time_schedule={config.layer_dropout.time_schedule!r}"


def _exits(config: RunConfig) -> Callable[[Array], Array]:
    layers, total = config.model.num_layers, config.training.steps
    return lambda step: exit_weights(config.early_exit, layers, step, total)


def _exits_name(config: RunConfig) -> str:
    return f"config.early_exit.curriculum={config.early_exit.curriculum!r}"


# All that a step knows of how many there will be.
_SCHEDULES = (
    (_learning_rate_name, _learning_rate),
    (_dropout_name, _dropout),
    (_exits_name, _exits),
)
