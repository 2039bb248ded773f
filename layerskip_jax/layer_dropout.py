"""Layer dropout: when a layer is skipped, and how skipping it saves compute.

Block l computes x_{l+1} = x_l + r M f_l(x_l). M is 0 with probability

    p(l, t) = p_max D(l) S(t)                       (LayerSkip, section 4.1)

drawn per sequence, and always 1 at evaluation. D is a schedule over depth, S one over time.

A step's whole *keep plan* is drawn before the layers run, from a key that every host shares.
In each of `groups` equal groups of rows the same number of rows is kept, which is what lets
an execution have static shapes and every shard of the batch do the same work. The number is
drawn between the two neighbours, in a short menu of capacities, of its mean g (1 - p), and
then that many rows at random: each row's marginal probability of being skipped is exactly p.

One plan, two executions with the same result:

* `mask` computes every row and selects;
* `gather` takes the kept rows out of the batch before the block and puts them back after
  it, so that what is skipped is not computed.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from layerskip_jax.schema import require, require_choice

# D(l) as a function of the layer index l and the depth L; L = 1 gives 1 (see `depth_schedule`).
DEPTH_SCHEDULES: dict[str, Callable] = {
    "exp": lambda l, L: 2 ** (l / (L - 1)) - 1,
    "linear": lambda l, L: l / (L - 1),
    "uniform": lambda l, L: jnp.ones_like(l),
    "alternating": lambda l, L: l % 2,
    "log": lambda l, L: jnp.log(l + 1) / jnp.log(L),
    "sin": lambda l, L: jnp.sin(jnp.pi / 2 * l / (L - 1)),
    "sigmoid": lambda l, L: 1 / (1 + jnp.exp(-10 * (l / (L - 1) - 0.5))),
}

# S(t) as a function of the progress t / (T - 1); T = 1 gives 1 (see `time_schedule`).
TIME_SCHEDULES: dict[str, Callable] = {
    "constant": lambda progress: jnp.ones_like(progress),
    "exp": lambda progress: 2**progress - 1,
    "increasing": lambda progress: progress,
    "decreasing": lambda progress: 1 - progress,
}

EXECUTIONS = ("mask", "gather")
MAX_BRANCHES = 5  # capacities compiled for `gather`: compile time grows with each


@dataclasses.dataclass(frozen=True)
class LayerDropoutConfig:
    """When layers are skipped.

    Attributes:
      p_max: the largest drop probability, reached by the last layer; 0 turns dropout off.
      depth: schedule D(l) over the layers.
      time: schedule S(t) over the steps.
      execution: `mask` or `gather`; the result is the same, `gather` saves the compute.
      groups: equal groups of consecutive rows of the global batch that keep the same number
        of rows. `gather` needs a multiple of (batch shards x accumulation steps). It belongs
        to the recipe, not to the machine: the same value draws the same plans on any mesh.
    """

    p_max: float = 0.0
    depth: str = "exp"
    time: str = "constant"
    execution: str = "gather"
    groups: int = 1

    def __post_init__(self):
        require(0 <= self.p_max < 1, f"p_max={self.p_max} must be in [0, 1)")
        require_choice("depth", self.depth, DEPTH_SCHEDULES)
        require_choice("time", self.time, TIME_SCHEDULES)
        require_choice("execution", self.execution, EXECUTIONS)
        require(self.groups >= 1, f"groups={self.groups} must be at least 1")


class KeepPlan(NamedTuple):
    """Which rows run each layer at one step.

    Inside the scan over layers it holds one layer's part, without the leading axis.

    Attributes:
      keep: whether layer l runs on row b.
      capacity_index: for each layer, the index into the menu of the rows kept per group.
    """

    keep: Bool[Array, "*L B"]
    capacity_index: Int[Array, "*L"]

    def rows(self, start: int | Int[Array, ""], size: int) -> "KeepPlan":
        """Returns the plan of `size` consecutive rows, whole groups, from `start`."""
        return KeepPlan(
            jax.lax.dynamic_slice_in_dim(self.keep, start, size, axis=1), self.capacity_index
        )


def depth_schedule(name: str, num_layers: int) -> Float[Array, "L"]:
    """Returns D(l) for every layer (METHOD: LayerSkip section 4.1, Don't Drop Dropout)."""
    if num_layers == 1:
        return jnp.ones(1)
    layers = jnp.arange(num_layers, dtype=jnp.float32)
    return DEPTH_SCHEDULES[name](layers, num_layers).astype(jnp.float32)


def time_schedule(name: str, step: int | Int[Array, ""], total_steps: int) -> Float[Array, ""]:
    """Returns S(t) at step t of T; past the end it stays at S(T-1)."""
    if total_steps == 1:
        return jnp.float32(1)
    progress = jnp.clip(jnp.asarray(step, jnp.float32) / (total_steps - 1), 0, 1)
    return TIME_SCHEDULES[name](progress)


def drop_probabilities(
    config: LayerDropoutConfig, num_layers: int, step: int | Int[Array, ""], total_steps: int
) -> Float[Array, "L"]:
    """Returns p(l, t) = p_max D(l) S(t) for every layer."""
    time = time_schedule(config.time, step, total_steps)
    return config.p_max * depth_schedule(config.depth, num_layers) * time


def capacity_menu(p_max: float, group_size: int) -> tuple[int, ...]:
    """Returns the numbers of rows per group that a plan may keep, ascending.

    At most `MAX_BRANCHES` of them, evenly spaced from the smallest mean g (1 - p_max),
    rounded down, to g: the mean of every p in [0, p_max] lies between two of them.
    """
    least = int(np.floor(group_size * (1 - p_max) + 1e-9))
    count = min(MAX_BRANCHES, group_size - least + 1)
    return tuple(int(c) for c in np.unique(np.round(np.linspace(least, group_size, count))))


def draw_keep_plan(
    key: PRNGKeyArray,
    probabilities: Float[Array, "L"],
    *,
    batch_size: int,
    groups: int,
    menu: tuple[int, ...],
) -> KeepPlan:
    """Draws which of `batch_size` rows run each layer.

    Each group keeps the same count, and each row is kept with probability exactly 1 - p(l).
    The mean g (1 - p) of every layer must lie within `menu` (see `capacity_menu`).
    """
    num_layers = probabilities.shape[0]
    group_size = batch_size // groups
    capacities = jnp.asarray(menu, jnp.float32)
    mean = group_size * (1 - probabilities)
    upper = jnp.clip(jnp.searchsorted(capacities, mean), 0, len(menu) - 1)
    lower = jnp.maximum(upper - 1, 0)
    gap = jnp.maximum(capacities[upper] - capacities[lower], 1)
    take_upper = jnp.where(upper > lower, (mean - capacities[lower]) / gap, 1.0)
    count_key, row_key = jax.random.split(key)
    draw = jax.random.uniform(count_key, (num_layers,))
    capacity_index = jnp.where(draw < take_upper, upper, lower).astype(jnp.int32)
    ranks = jnp.argsort(jax.random.uniform(row_key, (num_layers, groups, group_size)), axis=-1)
    keep = ranks < jnp.asarray(menu)[capacity_index][:, None, None]
    return KeepPlan(keep.reshape(num_layers, batch_size), capacity_index)


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a keep plan is carried out on the rows at hand.

    Attributes:
      name: `mask` or `gather`.
      groups: equal groups of consecutive rows among the rows at hand. `gather` stays within
        a group, so where each batch shard holds whole groups no row leaves its device.
      menu: static row counts per group, one compiled branch each (see `capacity_menu`).
    """

    name: str
    groups: int
    menu: tuple[int, ...]

    def run(
        self,
        block: Callable,
        x: Float[Array, "B S D"],
        rows: tuple,
        plan: KeepPlan,
        remat: Callable[[Callable], Callable],
    ) -> Float[Array, "B S D"]:
        """Runs one layer on the rows its plan keeps and returns the others unchanged.

        Args:
          block: `block(x, *rows)`, acting on each row alone.
          x: the residual stream.
          rows: arrays with the batch as leading axis that the block reads beside x.
          plan: this layer's keep `[B]` and capacity index.
          remat: wraps what the backward pass is to compute again.
        """
        if self.name == "mask":
            y = remat(lambda block, x, *rows: block(x, *rows))(block, x, *rows)
            return jnp.where(plan.keep[:, None, None], y, x)
        return self._gather(block, x, rows, plan, remat)

    def _gather(self, block, x, rows, plan, remat):
        group_size = x.shape[0] // self.groups

        def grouped(array):
            return array.reshape(self.groups, group_size, *array.shape[1:])

        # A stable sort puts the kept rows of each group first, in their own order.
        order = jnp.argsort(~grouped(plan.keep), axis=1, stable=True)

        def branch(capacity):
            def run(block, order, x, *rows):
                if capacity == 0:
                    return x
                if capacity == group_size:
                    return block(x, *rows)
                index = order[:, :capacity]
                take = jax.vmap(lambda array, i: array[i])
                kept = [take(grouped(array), index) for array in (x, *rows)]
                flat = [a.reshape(self.groups * capacity, *a.shape[2:]) for a in kept]
                y = block(*flat).reshape(kept[0].shape)
                put = jax.vmap(lambda array, i, value: array.at[i].set(value))
                return put(grouped(x), index, y).reshape(x.shape)

            # Rematerialised inside the switch: around it, the residuals of every branch
            # would be kept alive beside those of the one that ran.
            return remat(run)

        branches = [branch(capacity) for capacity in self.menu]
        return jax.lax.switch(plan.capacity_index, branches, block, order, x, *rows)


def check_groups(
    config: LayerDropoutConfig, *, batch_size: int, batch_shards: int, accumulation: int
) -> None:
    """Raises `ConfigError` unless `config.groups` fits the batch and the machine."""
    if config.p_max == 0:
        return
    require(
        batch_size % config.groups == 0,
        f"config.layer_dropout.groups={config.groups} must divide the batch of {batch_size} rows",
    )
    pieces = batch_shards * accumulation
    require(
        config.execution != "gather" or config.groups % pieces == 0,
        f"config.layer_dropout.groups={config.groups} must be a multiple of {pieces} "
        f"({batch_shards} batch shards x {accumulation} accumulation steps) for "
        f"execution='gather'; set --config.layer_dropout.groups={pieces}, "
        "or --config.layer_dropout.execution=mask",
    )
