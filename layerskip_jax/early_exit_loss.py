"""Early-exit loss: which exits learn at a step, and how much.

Exit l reads x_{l+1}, the output of layer l, through the final norm and the one head that all
exits share. The loss of a step is

    J = sum_l w(t, l) CE_l,   w(t, l) = C(t, l) e(l) / sum_i C(t, i) e(i)     (LayerSkip, eq. 5)

with e quadratic in depth (eq. 6) and C a curriculum that turns exits on and off over the
steps; the last layer is always on. All of it is a function of the step, with no state.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from layerskip_jax.ops.linear_cross_entropy import linear_cross_entropy
from layerskip_jax.schema import require, require_choice

CURRICULA = ("last", "all", "rotational", "gradual")


@dataclasses.dataclass(frozen=True)
class EarlyExitConfig:
    """Which exits learn and how much.

    Attributes:
      curriculum: `last` (ordinary training), `all`, `rotational` (every `interval`-th exit,
        moving down by one layer a step) or `gradual` (from the top down over the first
        `gradual_fraction` of the steps).
      interval: R of the rotational curriculum, in layers.
      gradual_fraction: f of the gradual curriculum.
      scale: e_scale, the weight of the early exits against the last layer.
    """

    curriculum: str = "last"
    interval: int = 4
    gradual_fraction: float = 0.5
    scale: float = 0.2

    def __post_init__(self):
        require_choice("curriculum", self.curriculum, CURRICULA)
        require(self.interval >= 1, f"interval={self.interval} must be at least 1")
        require(
            0 < self.gradual_fraction <= 1,
            f"gradual_fraction={self.gradual_fraction} must be in (0, 1]",
        )
        require(self.scale >= 0, f"scale={self.scale} must not be negative")


class ActiveExits(NamedTuple):
    """The exits scored at one step, in a static number A of slots, shallowest first.

    Attributes:
      layers: layer index l of each slot; slots past the active ones repeat the last layer.
      weights: w(t, l) of each slot, 0 where the slot is not used; they sum to 1.
      slot_of_layer: the slot that layer l's output is written to. A layer that is no exit
        shares the slot of the next exit above it, which overwrites it.
    """

    layers: Int[Array, "A"]
    weights: Float[Array, "A"]
    slot_of_layer: Int[Array, "L"]


def depth_weights(num_layers: int, scale: float) -> Float[np.ndarray, "L"]:
    """Returns e(l), quadratic in depth and not yet normalised (LayerSkip, eq. 6)."""
    l = np.arange(num_layers, dtype=np.float32)
    weights = scale * l * (l + 1) / 2
    last = num_layers - 1
    weights[last] = last + scale * (last - 1) * last / 2
    if num_layers == 1:
        weights[0] = 1.0  # eq. 6 gives the only exit no weight
    return weights


def rotational_start(num_layers: int, interval: int) -> Bool[np.ndarray, "L"]:
    """Returns the exits that the rotational curriculum has on at step 0, the last one aside."""
    return np.arange(num_layers) % interval == 0


def active_exits(
    config: EarlyExitConfig, num_layers: int, step: int | Int[Array, ""], total_steps: int
) -> Bool[Array, "L"]:
    """Returns C(t, l): which exits are on at `step` (LayerSkip, section 4.2)."""
    layers = jnp.arange(num_layers)
    is_last = layers == num_layers - 1
    if config.curriculum == "last":
        return is_last
    if config.curriculum == "all":
        return jnp.ones(num_layers, bool)
    if config.curriculum == "rotational":
        start = jnp.asarray(rotational_start(num_layers, config.interval))
        return start[(layers - step) % num_layers] | is_last
    first_step = config.gradual_fraction * total_steps * (num_layers - 1 - layers) / num_layers
    return (step >= first_step) | is_last


def max_active_exits(config: EarlyExitConfig, num_layers: int) -> int:
    """Returns A, the most exits that can be on at any step."""
    if config.curriculum == "last":
        return 1
    if config.curriculum == "rotational":
        start = rotational_start(num_layers, config.interval)
        turns = [np.roll(start, turn) for turn in range(num_layers)]
        return max(int(turn[:-1].sum()) + 1 for turn in turns)
    return num_layers


def exit_weights(
    config: EarlyExitConfig, num_layers: int, step: int | Int[Array, ""], total_steps: int
) -> Float[Array, "L"]:
    """Returns w(t, l), which sums to 1 over the layers (LayerSkip, eq. 5)."""
    active = active_exits(config, num_layers, step, total_steps)
    weights = jnp.where(active, depth_weights(num_layers, config.scale), 0.0)
    return weights / weights.sum()


def select_exits(
    config: EarlyExitConfig, num_layers: int, step: int | Int[Array, ""], total_steps: int
) -> ActiveExits:
    """Lays the exits that are on at `step` out in A static slots."""
    active = active_exits(config, num_layers, step, total_steps)
    weights = exit_weights(config, num_layers, step, total_steps)
    slots = max_active_exits(config, num_layers)
    (layers,) = jnp.nonzero(active, size=slots, fill_value=num_layers - 1)
    used = jnp.arange(slots) < active.sum()
    # Counting only the exits below a layer makes it share the slot of the next exit above.
    slot_of_layer = jnp.cumsum(active) - active
    return ActiveExits(
        layers.astype(jnp.int32),
        jnp.where(used, weights[layers], 0.0),
        slot_of_layer.astype(jnp.int32),
    )


def early_exit_loss(
    states: Float[Array, "A B S D"],
    head: Float32[Array, "D V"],
    targets: Int[Array, "B S"],
    valid: Bool[Array, "B S"],
    weights: Float[Array, "A"],
    valid_tokens: Int[Array, ""] | Float[Array, ""],
    *,
    chunk: int,
    batch_shards: int = 1,
) -> tuple[Float[Array, ""], Float[Array, "A"]]:
    """Scores the normed states of the active exits with the shared head.

    Args:
      states: output of each active exit's layer, through the final norm.
      head: the shared head, float32.
      targets: next tokens.
      valid: which targets count.
      weights: w(t, l) by slot. An exit of weight 0 is not computed.
      valid_tokens: valid targets of the whole global batch, whatever part of it is here.
        None at all gives a loss of 0.
      chunk: positions of the sequence scored at once.
      batch_shards: parts that B is split into over the devices.

    Returns:
      J, in nats, and each slot's mean cross-entropy before weighting (0 if not computed);
      over the parts of a batch both add up.
    """
    per_token = 1.0 / jnp.maximum(valid_tokens, 1).astype(jnp.float32)
    loss, sums = linear_cross_entropy(
        states,
        head,
        targets,
        valid,
        weights * per_token,
        chunk=chunk,
        batch_shards=batch_shards,
    )
    return loss, sums * per_token
