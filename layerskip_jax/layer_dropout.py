"""Layer dropout: when a layer is skipped, and how skipping it saves compute.

Block l computes x_{l+1} = x_l + r M f_l(x_l). M is 0 with probability

    p(l, t) = p_max D(l) S(t)                       (LayerSkip, section 4.1)

drawn per sequence, and always 1 at evaluation. D is a schedule over depth, S one over time.

A step's whole *keep plan* is drawn before the layers run, from a key that every host shares.
In each of `row_groups` equal groups of rows the same number of rows is kept, which is what lets
an execution have static shapes and every shard of the batch do the same work. The number is
drawn between the two neighbours, in a short menu of capacities, of its mean g (1 - p), and
then that many rows at random: each row's marginal probability of being skipped is exactly p.

One plan, three executions with the same result:

* `mask` computes every row and selects;
* `gather` takes the kept rows out of the batch before the block and puts them back after
  it, so that what is skipped is not computed;
* `cond` keeps all rows or none, so that a layer is run or skipped as a whole.

r is 1 (`none`: LayerSkip), or 1 / (1 - p) at training and 1 at evaluation (`inverse_keep`:
Don't Drop Dropout, whose best learning rate then does not move with p).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from layerskip_jax.ops.capacity_switch import (
    permute_rows,
    switch_with_shared_residuals,
    take_rows,
)
from layerskip_jax.ops.remat import rematerialised, run_block
from layerskip_jax.schema import (
    renamed,
    require,
    require_choice,
    require_count,
    require_range,
)

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
    "trapezoid": lambda u: jnp.minimum(jnp.minimum(u / 0.1, (1 - u) / 0.2), 1),
    "late_off": lambda u: (u < 0.8).astype(u.dtype),
}

EXECUTIONS = ("mask", "gather", "cond")
RESIDUAL_SCALES = ("none", "inverse_keep")
MAX_BRANCHES = 5  # capacities compiled for `gather`: compile time grows with each


@dataclasses.dataclass(frozen=True)
class LayerDropoutConfig:
    """When layers are skipped.

    Attributes:
      p_max: what the schedules are multiplied by, the largest drop probability there can be, in
        [0, 1); 0 turns dropout off.
      depth_schedule: D(l) over the layers: `exp` (LayerSkip), `linear`, `uniform`, `alternating`
        (every second layer), `log`, `sin` or `sigmoid`.
      time_schedule: S(t) over the steps: `constant`, `exp` (LayerSkip from scratch), `increasing`,
        `decreasing`, `trapezoid` (up over the first tenth, down over the last fifth) or `late_off`
        (none in the last fifth).
      residual_scale: r, `none` (1) or `inverse_keep` (1 / (1 - p) at training).
      layers: the layer indices that may be skipped, each at least 0; empty means all.
      execution: `mask` or `gather`, which draw and do the same, and `gather` saves the
        compute; or `cond`, which draws a layer for the whole batch of a step.
      row_groups: equal groups, at least 1, of consecutive rows of the global batch that keep the
        same number of rows. `gather` needs a multiple of (batch shards x accumulation steps). It
        belongs to the recipe, not to the machine: the same value draws the same plans on any mesh.
    """

    p_max: float = 0.0
    depth_schedule: str = renamed("depth", "exp")
    time_schedule: str = renamed("time", "constant")
    residual_scale: str = "none"
    layers: tuple[int, ...] = ()
    execution: str = "gather"
    row_groups: int = renamed("groups", 1)

    def __post_init__(self):
        require_range("p_max", self.p_max, "[0, 1)")
        require_choice("depth_schedule", self.depth_schedule, DEPTH_SCHEDULES)
        require_choice("time_schedule", self.time_schedule, TIME_SCHEDULES)
        require_choice("residual_scale", self.residual_scale, RESIDUAL_SCALES)
        require_choice("execution", self.execution, EXECUTIONS)
        for layer in self.layers:
            require(layer >= 0, f"layers={self.layers} must hold layer indices from 0 on")
        require_count("row_groups", self.row_groups, 1)

    def menu(self, group_size: int) -> tuple[int, ...]:
        """Returns the numbers of rows that a group of `group_size` may keep, ascending."""
        if self.p_max > 0 and self.execution == "cond":
            return (0, group_size)
        return capacity_menu(self.p_max, group_size)


class KeepPlan(NamedTuple):
    """Which rows run each layer at one step.

    Inside the scan over layers it holds one layer's part, without the leading axis.

    Attributes:
      keep: whether layer l runs on row b.
      capacity_index: for each layer, the index into the menu of the rows kept per group.
      residual_scale: r of each layer; None stands for 1.
    """

    keep: Bool[Array, "*L B"]
    capacity_index: Int[Array, "*L"]
    residual_scale: Float[Array, "*L"] | None = None

    def rows(self, start: int | Int[Array, ""], size: int) -> "KeepPlan":
        """Returns the plan of `size` consecutive rows, whole groups, from `start`."""
        return self._replace(keep=jax.lax.dynamic_slice_in_dim(self.keep, start, size, axis=1))


def depth_schedule(name: str, num_layers: int) -> Float[Array, "L"]:
    """Returns D(l) for every layer (docs/method.md, section 1)."""
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
    """Returns p(l, t) = p_max D(l) S(t) for every layer, 0 for those that are not listed."""
    time = time_schedule(config.time_schedule, step, total_steps)
    depth = depth_schedule(config.depth_schedule, num_layers)
    if config.layers:
        depth = jnp.where(np.isin(np.arange(num_layers), config.layers), depth, 0.0)
    return config.p_max * depth * time


def residual_scales(
    config: LayerDropoutConfig, probabilities: Float[Array, "L"]
) -> Float[Array, "L"] | None:
    """Returns r for every layer that runs, None for 1 (Don't Drop Dropout, inverse keep)."""
    return None if config.residual_scale == "none" else 1 / (1 - probabilities)


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
      name: `mask`, `gather` or `cond`.
      groups: equal groups of consecutive rows among the rows at hand. `gather` stays within
        a group, so where each batch shard holds whole groups no row leaves its device.
      menu: static row counts per group, one compiled branch each (`LayerDropoutConfig.menu`).
      constrain: pins the sharding of rows taken out of the batch, which are fewer.
    """

    name: str
    groups: int
    menu: tuple[int, ...]
    constrain: Callable[[Array], Array] = lambda rows: rows

    def run(
        self,
        block: Callable,
        x: Float[Array, "B S D"],
        rows: tuple,
        plan: KeepPlan,
        remat: str,
    ) -> Float[Array, "B S D"]:
        """Runs one layer on the rows its plan keeps and returns the others unchanged.

        Args:
          block: a pytree called as `block(x, *rows, residual_scale)`; acts on each row alone.
          x: the residual stream.
          rows: arrays with the batch as leading axis that the block reads beside x. Gradients
            flow to `block` and `x` only.
          plan: this layer's keep `[B]`, capacity index and residual scale.
          remat: what the backward pass computes again (see `rematerialised`).
        """
        if self.name == "mask":
            y = rematerialised(run_block, remat)(block, x, rows, plan.residual_scale)
            return jnp.where(plan.keep[:, None, None], y, x)
        grouped = (self.groups, x.shape[0] // self.groups)
        # A stable sort puts the kept rows of each group first, in their own order.
        order = jnp.argsort(~plan.keep.reshape(grouped), axis=1, stable=True)
        inverse = jnp.argsort(order, axis=1)

        # Rows are reordered in the branches, where they need not be saved for each layer.
        fixed = (jax.lax.stop_gradient(rows), order, plan.residual_scale)
        branches = [functools.partial(self._run_first, count) for count in self.menu]
        switch = switch_with_shared_residuals(branches, remat, self.groups)
        y = permute_rows(x.reshape(*grouped, *x.shape[1:]), order, inverse)
        y = switch(plan.capacity_index, (block, y), fixed)
        return permute_rows(y, inverse, order).reshape(x.shape)

    def _run_first(self, count, differentiable, fixed):
        """Runs a block on the first `count` rows of each group; the others stay as they are."""
        (block, x), (rows, order, scale) = differentiable, fixed
        if count == 0:
            return x

        def kept(array):
            array = array.reshape(*order.shape, *array.shape[1:])
            return take_rows(array, order[:, :count]).reshape(-1, *array.shape[2:])

        y = self.constrain(x[:, :count].reshape(-1, *x.shape[2:]))
        y = self.constrain(block(y, *map(kept, rows), scale))
        return jnp.concatenate([y.reshape(-1, count, *y.shape[1:]), x[:, count:]], axis=1)


def check_layers(config: LayerDropoutConfig, num_layers: int) -> None:
    """Raises `ConfigError` unless every listed layer is one of the model's."""
    for layer in config.layers:
        require(
            layer < num_layers,
            f"config.layer_dropout.layers={config.layers} names layer {layer}, but the model's "
            f"layers are 0 to {num_layers - 1}",
        )


def check_groups(
    config: LayerDropoutConfig, *, batch_size: int, batch_shards: int, accumulation: int
) -> None:
    """Raises `ConfigError` unless `config.row_groups` fits the batch and the machine."""
    if config.p_max == 0:
        return
    require(
        batch_size % config.row_groups == 0,
        f"config.layer_dropout.row_groups={config.row_groups} must divide the batch of "
        f"{batch_size} rows",
    )
    pieces = batch_shards * accumulation
    require(
        config.execution != "gather" or config.row_groups % pieces == 0,
        f"config.layer_dropout.row_groups={config.row_groups} must be a multiple of {pieces} "
        f"({batch_shards} batch shards x {accumulation} accumulation steps) for "
        f"execution='gather'; set --config.layer_dropout.row_groups={pieces}, "
        "or --config.layer_dropout.execution=mask",
    )
