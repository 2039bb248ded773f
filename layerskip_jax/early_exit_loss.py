"""Early-exit loss: which exits learn at a step, and how much.

Exit E stands behind the first E layers: it reads x_E, what layer l = E - 1 puts out, through the
final norm and the one head that all exits share. Here, as in the paper, exits are counted by that
layer l, from 0; people name them by E, from 1. The loss of a step is

    J = sum_l w(t, l) CE_l,   w(t, l) = C(t, l) e(l) / sum_i C(t, i) e(i)     (LayerSkip, eq. 5)

with e growing with depth (quadratically in eq. 6) and C a curriculum that turns exits on and
off over the steps; the last layer is always on. All of it is a function of the step, with no
state. The early exits may be scored on a random share of the tokens, without bias: at V = 128k
the head of one exit costs as much as several layers.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, PRNGKeyArray

from layerskip_jax.ops.linear_cross_entropy import (
    NO_NORM,
    ONE_DEVICE,
    HeadInputs,
    Layout,
    linear_cross_entropy,
)
from layerskip_jax.schema import (
    SMALLEST_FLOAT32,
    renamed,
    require,
    require_choice,
    require_count,
    require_range,
)


@dataclasses.dataclass(frozen=True)
class EarlyExitConfig:
    """Which exits learn and how much.

    Attributes:
      curriculum: `last` (ordinary training), `all`, `rotational` (every `rotation_interval`-th
        exit, each step the next layer's) or `gradual` (one exit after the other, from the last
        layer's to the first's, over the first `gradual_fraction` of the steps) or `alternating`
        (the last layer alone at even steps, all exits at odd ones, as BERxiT fine-tunes).
      rotation_interval: R of the rotational curriculum, in layers, at least 1.
      gradual_fraction: f of the gradual curriculum, in (0, 1].
      e_scale: the weight of the early exits against the last layer, at least 0.
      layers: the exits that may learn beside the last layer's, by the index of the layer they read
        (exit E reads layer E - 1); empty means all. List those that will draft or be used alone.
      depth_weight: e(l), `quadratic` (LayerSkip), `uniform`, `linear`, `sqrt`, `inverse` or
        `inverse_sqrt`.
      exit_token_fraction: share of the positions that exits below the last layer are scored
        on, drawn anew every step, in (0, 1].
      z_loss: weight of the squared log-partition in every exit's loss, at least 0; 0 turns it off.
    """

    curriculum: str = "last"
    rotation_interval: int = renamed("interval", 4)
    gradual_fraction: float = 0.5
    e_scale: float = renamed("scale", 0.2)
    layers: tuple[int, ...] = ()
    depth_weight: str = "quadratic"
    exit_token_fraction: float = 1.0
    z_loss: float = 0.0

    def __post_init__(self):
        require_choice("curriculum", self.curriculum, CURRICULA)
        require_count("rotation_interval", self.rotation_interval, 1)
        for name in ("gradual_fraction", "exit_token_fraction"):
            require_range(name, getattr(self, name), "(0, 1]")
        for name in ("e_scale", "z_loss"):
            require_range(name, getattr(self, name), "[0, inf)")
        for layer in self.layers:
            require(layer >= 0, f"layers={self.layers} must hold layer indices from 0 on")
        require_choice("depth_weight", self.depth_weight, DEPTH_WEIGHTS)


class DepthWeight(NamedTuple):
    """How e(l) depends on the depth.

    Attributes:
      e: `e(num_layers, scale)` returns e(l) of every layer, not yet normalised, in float64.
      caption: what the report says of it.
    """

    e: Callable[[int, float], Float[np.ndarray, "L"]]
    caption: str


def _quadratic(num_layers: int, scale: float) -> Float[np.ndarray, "L"]:
    """LayerSkip, eq. 6."""
    last = num_layers - 1
    l = np.arange(num_layers, dtype=np.float64)
    weights = scale * l * (l + 1) / 2
    weights[last] = last + scale * (last - 1) * last / 2
    if num_layers == 1:
        weights[0] = 1.0  # eq. 6 gives the only exit no weight
    return weights


def _of_depth(function: Callable) -> Callable[[int, float], Float[np.ndarray, "L"]]:
    """Returns e(l) as a function of l + 1, times the scale below the last layer."""

    def e(num_layers, scale):
        weights = function(np.arange(1, num_layers + 1, dtype=np.float64))
        weights[: num_layers - 1] *= scale
        return weights

    return e


DEPTH_WEIGHTS = {
    "quadratic": DepthWeight(
        _quadratic,
        "They grow quadratically with depth (LayerSkip, eq. 6), and the first exit's is 0 by that "
        "formula.",
    ),
    "uniform": DepthWeight(_of_depth(np.ones_like), "All early exits that are on weigh the same."),
    "linear": DepthWeight(_of_depth(lambda depth: depth), "They grow in proportion to the depth."),
    "sqrt": DepthWeight(_of_depth(np.sqrt), "They grow with the square root of the depth."),
    "inverse": DepthWeight(
        _of_depth(lambda depth: 1 / depth), "They fall in inverse proportion to the depth."
    ),
    "inverse_sqrt": DepthWeight(
        _of_depth(lambda depth: 1 / np.sqrt(depth)),
        "They fall in inverse proportion to the square root of the depth.",
    ),
}


class Curriculum(NamedTuple):
    """Which exits are on at which steps. The last layer's always is, whatever is said of it here.

    Attributes:
      active: `active(config, num_layers, step, total_steps)` returns C(t, l) of every layer, for a
        step that is traced.
      sets: `sets(config, num_layers)` returns sets of exits, one in each row. Whatever is on at a
        step must be a subset of one of them: the largest decides how many slots a step has.
      drawn: how the report shows it: in `words` where it is the same at every step, else one
        `period` or the whole `run`.
      caption: what the report says of it.
    """

    active: Callable[..., Bool[Array, "L"]]
    sets: Callable[..., Bool[np.ndarray, "n L"]]
    drawn: str
    caption: str


def rotational_start(num_layers: int, interval: int) -> Bool[np.ndarray, "L"]:
    """Returns the exits that the rotational curriculum has on at step 0, the last one aside."""
    return np.arange(num_layers) % interval == 0


def _rotational(config, num_layers, step, total_steps):
    start = jnp.asarray(rotational_start(num_layers, config.rotation_interval))
    return start[(jnp.arange(num_layers) - step) % num_layers]


def _every_turn(config, num_layers):
    start = rotational_start(num_layers, config.rotation_interval)
    return np.stack([np.roll(start, turn) for turn in range(num_layers)])


def _gradual(config, num_layers, step, total_steps):
    above = num_layers - 1 - jnp.arange(num_layers)
    first = config.gradual_fraction * total_steps * above / num_layers
    return step >= first


def _every_exit(config, num_layers):
    return np.ones((1, num_layers), bool)


CURRICULA = {
    "last": Curriculum(
        lambda config, num_layers, step, total_steps: jnp.zeros(num_layers, bool),
        lambda config, num_layers: np.zeros((1, num_layers), bool),
        "words",
        "No early exit learns: the loss reads the last layer only.",
    ),
    "all": Curriculum(
        lambda config, num_layers, step, total_steps: jnp.ones(num_layers, bool),
        _every_exit,
        "words",
        "Every exit that may learn does so at every step.",
    ),
    "rotational": Curriculum(
        _rotational, _every_turn, "period", "The exits move up by one layer a step."
    ),
    "alternating": Curriculum(
        lambda config, num_layers, step, total_steps: jnp.full(num_layers, step % 2 == 1),
        _every_exit,
        "words",
        "The last layer learns alone at even steps, and every exit that may learn at odd ones.",
    ),
    "gradual": Curriculum(
        _gradual,
        _every_exit,
        "run",
        "The exits join one by one, from the last layer's to the first's.",
    ),
}


class ActiveExits(NamedTuple):
    """The exits scored at one step, in a static number A of slots.

    Attributes:
      layers: layer index l of each slot: the early exits, shallowest first, then slots that
        are not used, and in the last slot the last layer, which stands there too for those.
      weights: w(t, l) of each slot, 0 where the slot is not used; they sum to 1.
      slot_of_layer: the early slot that layer l's output is kept in, A - 1 for none.
    """

    layers: Int[Array, "A"]
    weights: Float[Array, "A"]
    slot_of_layer: Int[Array, "L"]


def depth_weights(num_layers: int, scale: float, name: str = "quadratic") -> Float[np.ndarray, "L"]:
    """Returns e(l), not yet normalised, in float64 (see `DEPTH_WEIGHTS`)."""
    return DEPTH_WEIGHTS[name].e(num_layers, scale)


def _relative_weights(config: EarlyExitConfig, num_layers: int) -> Float32[np.ndarray, "L"]:
    """Returns e(l) over a power of two, so that any e_scale leaves sums and shares in float32."""
    weights = depth_weights(num_layers, config.e_scale, config.depth_weight)
    weights = np.ldexp(weights, -np.frexp(weights.max())[1])
    weights[weights < SMALLEST_FLOAT32] = 0.0
    # The last layer is always on, and at some steps alone.
    weights[-1] = max(weights[-1], SMALLEST_FLOAT32)
    return weights.astype(np.float32)


def active_exits(
    config: EarlyExitConfig, num_layers: int, step: int | Int[Array, ""], total_steps: int
) -> Bool[Array, "L"]:
    """Returns C(t, l): which exits are on at `step` (LayerSkip, section 4.2).

    The curriculum's exits, but for those that `config.layers` does not let learn.
    """
    is_last = jnp.arange(num_layers) == num_layers - 1
    active = CURRICULA[config.curriculum].active(config, num_layers, step, total_steps)
    return (active & may_learn(config, num_layers)) | is_last


def may_learn(config: EarlyExitConfig, num_layers: int) -> Bool[np.ndarray, "L"]:
    """Returns which exits `config.layers` lets learn; what it says of the last has no meaning."""
    layers = np.arange(num_layers)
    return np.isin(layers, config.layers) if config.layers else np.ones(num_layers, bool)


def check_exits(config: EarlyExitConfig, num_layers: int) -> None:
    """Raises `ConfigError` where exits learn and a listed one is not the model's."""
    if config.curriculum == "last":
        return
    for layer in config.layers:
        require(
            layer < num_layers,
            f"config.early_exit.layers={config.layers} names layer {layer}, but the model's layers "
            f"are 0 to {num_layers - 1}; name others, or none with --config.early_exit.layers=()",
        )


def max_active_exits(config: EarlyExitConfig, num_layers: int) -> int:
    """Returns A, the most exits that are on and have a weight at any step."""
    has_weight = (_relative_weights(config, num_layers) > 0) & may_learn(config, num_layers)
    sets = CURRICULA[config.curriculum].sets(config, num_layers)
    return int((sets & has_weight)[:, :-1].sum(axis=1).max()) + 1


def exit_weights(
    config: EarlyExitConfig, num_layers: int, step: int | Int[Array, ""], total_steps: int
) -> Float[Array, "L"]:
    """Returns w(t, l), which sums to 1 over the layers (LayerSkip, eq. 5)."""
    active = active_exits(config, num_layers, step, total_steps)
    weights = jnp.where(active, _relative_weights(config, num_layers), 0.0)
    return weights / weights.sum()


def select_exits(
    config: EarlyExitConfig, num_layers: int, step: int | Int[Array, ""], total_steps: int
) -> ActiveExits:
    """Lays the exits that are on at `step` and have a weight out in A static slots."""
    weights = exit_weights(config, num_layers, step, total_steps)
    slots, last = max_active_exits(config, num_layers), num_layers - 1
    is_early = (weights > 0).at[last].set(False)
    (layers,) = jnp.nonzero(is_early, size=slots - 1, fill_value=last)
    used = jnp.arange(slots - 1) < is_early.sum()
    early_weights = jnp.where(used, weights[layers], 0.0)
    return ActiveExits(
        jnp.append(layers, last).astype(jnp.int32),
        jnp.append(early_weights, weights[last]),
        jnp.where(is_early, jnp.cumsum(is_early) - 1, slots - 1).astype(jnp.int32),
    )


def scored_positions(config: EarlyExitConfig, length: int) -> int:
    """Returns M, how many of `length` positions an early exit is scored on."""
    return max(round(config.exit_token_fraction * length), 1)


MAX_STRATA = 64  # parts of a window that sampled positions are drawn from alike


def sample_positions(
    key: PRNGKeyArray, config: EarlyExitConfig, length: int
) -> Int[Array, "G m"] | None:
    """Draws the positions that early exits are scored on, ascending; None takes all of them.

    Every position is drawn with the same probability M / S, whether its target counts or not: the
    loss is right on average, but varies more where few targets count. Rows and exits share the
    draw, so that taking it is a slice of the sequence for the whole batch. The window is cut into G
    equal strata with M / G positions drawn in each, so that devices which share the window among
    them have as many of their own: G is the largest divisor of both M and S up to `MAX_STRATA`.
    """
    count = scored_positions(config, length)
    if count == length:
        return None
    common = math.gcd(count, length)
    strata = max(n for n in range(1, MAX_STRATA + 1) if common % n == 0)
    size = length // strata
    keys = jax.random.split(key, strata)
    order = jax.vmap(lambda key: jax.random.permutation(key, size))(keys)
    chosen = jnp.sort(order[:, : count // strata], axis=1)
    return chosen + size * jnp.arange(strata)[:, None]


def early_exit_loss(
    early: Float[Array, "slots B M D"],
    last: Float[Array, "B S D"],
    head: Float32[Array, "D V"],
    targets: Int[Array, "B S"],
    valid: Bool[Array, "B S"],
    weights: Float[Array, "A"],
    valid_tokens: Int[Array, ""] | Float[Array, ""],
    *,
    positions: Int[Array, "M"] | None = None,
    norm: Callable[[Array], Array] = NO_NORM,
    chunk: int,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
    layout: Layout = ONE_DEVICE,
) -> tuple[Float[Array, ""], Float[Array, "A"]]:
    """Scores the active exits with the shared norm and head.

    Args:
      early: outputs of the early exits' layers, by slot, at `positions`.
      last: output of the last layer.
      head: the shared head, float32.
      targets: next tokens.
      valid: which targets count.
      weights: w(t, l) by slot, the last layer's last. An exit of weight 0 is not computed.
      valid_tokens: valid targets of the whole global batch, whatever part of it is here.
        None at all gives a loss of 0.
      positions: the positions that `early` holds (see `sample_positions`). What is summed
        over them counts S / M times, so that value and gradient are right on average.
      norm: applied to the states before the head; a pytree.
      chunk: positions of the sequence scored at once.
      z_loss: weight of the squared log-partition.
      vocab_size: V without padding, as in `linear_cross_entropy`.
      layout: how the states lie over the devices.

    Returns:
      J, in nats, and each slot's mean cross-entropy before weighting (0 if not computed);
      over the parts of a batch both add up.
    """
    per_token = 1.0 / jnp.maximum(valid_tokens, 1).astype(jnp.float32)
    parts, early_per_token = (), per_token
    if early.shape[0]:
        early_targets, early_valid = targets, valid
        if positions is not None:
            early_targets, early_valid = (
                jnp.take(array, positions, axis=1) for array in (targets, valid)
            )
            early_per_token = per_token * (targets.shape[1] / positions.shape[0])
        parts = (HeadInputs(early, early_targets, early_valid, weights[:-1] * early_per_token),)
    parts += (HeadInputs(last[None], targets, valid, weights[-1:] * per_token),)
    loss, sums = linear_cross_entropy(
        parts,
        head,
        norm=norm,
        chunk=chunk,
        z_loss=z_loss,
        vocab_size=vocab_size,
        layout=layout,
    )
    means = [*(part * early_per_token for part in sums[:-1]), sums[-1] * per_token]
    return loss, jnp.concatenate(means)
