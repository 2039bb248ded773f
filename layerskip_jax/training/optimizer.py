"""AdamW with warm-up, a decay, and clipping by global norm."""

import dataclasses
from typing import Any

import jax
import optax

from layerskip_jax.schema import require, require_choice

SCHEDULES = ("cosine", "wsd", "constant")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate.

    Attributes:
      learning_rate: the peak, above 0.
      schedule: `cosine` (to `final_fraction` of the peak), `wsd` (warm up, stay, then decay
        linearly over the last `decay_fraction` of the steps) or `constant`.
      warmup_steps: optimizer steps of linear warm-up from 0, at least 0.
      decay_fraction: share of the steps that `wsd` decays over, in [0, 1].
      final_fraction: the last learning rate as a share of the peak, in [0, 1].
      beta1: decay of the first moment, in [0, 1].
      beta2: decay of the second moment, in [0, 1].
      eps: AdamW epsilon, above 0.
      weight_decay: decoupled decay of matrices and embeddings, at least 0; norms and biases are
        left alone.
      clip_norm: largest global gradient norm, at least 0; 0 turns clipping off.
    """

    learning_rate: float = 3e-4
    schedule: str = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self):
        require_choice("schedule", self.schedule, SCHEDULES)
        require(self.learning_rate > 0, f"learning_rate={self.learning_rate} must be positive")
        for name in ("warmup_steps", "weight_decay", "clip_norm"):
            value = getattr(self, name)
            require(value >= 0, f"{name}={value} must not be negative")
        for name in ("beta1", "beta2", "final_fraction", "decay_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name}={value} must be in [0, 1]")
        require(self.eps > 0, f"eps={self.eps} must be positive")


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


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Returns clipping followed by AdamW; the decay skips the scales of norms and the biases."""

    def is_matrix(path, _) -> bool:
        return not (path[-1].key == "scale" or path[-1].key.endswith("_bias"))

    def decayed(parameters: Any) -> Any:
        return jax.tree_util.tree_map_with_path(is_matrix, parameters)

    adamw = optax.adamw(
        learning_rate_schedule(config, total_steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    if config.clip_norm == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
