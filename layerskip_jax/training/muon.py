"""Muon: momentum, made orthogonal, for the matrices of the layers (Jordan et al. 2024).

Each hidden matrix W of m inputs and n outputs takes the step

    M_t = beta M_{t-1} + (1 - beta) G_t         momentum, as Nesterov's: G_t counts once more
    O_t = newton_schulz(M_t / |M_t|_F)          five turns of a quintic: about U V^T of M = U S V^T
    W  -= rate (c O_t + weight_decay W)         c = rms sqrt(max(m, n)),  or sqrt(max(1, n / m))

where all heads of a projection are one matrix. The first c gives an update the root mean square of
AdamW's, so that both take the same rates and decay (Liu et al. 2025, arXiv:2502.16982); the second
is the first publication's. What is no matrix of a layer, embedding, head, norms, biases and what
exits add, is AdamW's. The arithmetic is `optax.contrib`'s.

On a mesh one device makes a matrix orthogonal, whole: those of one shape are put together over
layers and kinds and dealt out, one axis of the mesh after the other, so that a matrix is exchanged
once each way and never gathered by all.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from layerskip_jax.config import OptimizerConfig
from layerskip_jax.distributed.mesh import parts
from layerskip_jax.distributed.sharding import ShardingRules
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.model.definition import ModelDefinition, Parameters
from layerskip_jax.training.trainable import ALL, trained
from layerskip_jax.training.width_transfer import WidthTransfer

TURNS = 5  # of the Newton-Schulz iteration, as published
# Devices that hold copies take their share too; slices, a slower network apart, each do it all.
DEALT_OVER = ("data", "fsdp", "context", "tensor")

Names = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Matrices:
    """Which parameters are matrices of the layers, and how they lie on the devices.

    Attributes:
      logical_axes: the nest of parameters, with the names of each one's dimensions.
      mesh: the devices; None for one.
      rules: the axes of the mesh that each name is split over.
      dtype: that Newton-Schulz computes in.
    """

    logical_axes: Parameters
    mesh: Mesh | None = None
    rules: ShardingRules = ShardingRules()
    dtype: str = "float32"

    def labels(self, parameters: Any) -> Any:
        """Returns `muon` for each matrix of a layer, and `adamw` for every other parameter.

        Of parameters, or of what optax puts in their place where it asks for the state's shape.
        """
        names = self._names()
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "muon" if is_matrix(names[path]) else "adamw", parameters
        )

    def each(self, updates: Parameters) -> Iterator[tuple[Array, Names]]:
        """Yields the leaves of a nest like the parameters, with the names of their dimensions."""
        names = self._names()
        for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
            yield leaf, names[path]

    def _names(self) -> dict[tuple, Names]:
        axes, found = self.logical_axes, jax.tree_util.tree_leaves_with_path
        return dict(found(axes, is_leaf=lambda value: isinstance(value, tuple)))


def is_matrix(names: Names) -> bool:
    """Whether a parameter with such dimensions holds a matrix of each layer."""
    return len(names) > 2 and names[0] == "layers" and "embed" in (names[1], names[-1])


def muon(
    config: OptimizerConfig, rate: optax.Schedule, matrices: Matrices, transfer: WidthTransfer
) -> optax.GradientTransformation:
    """Returns Muon for parameters that are all matrices of the layers.

    Args:
      config: `muon_learning_rate`, `muon_momentum` and `muon_rms` are Muon's own.
      rate: of the other parameters; Muon's has the same shape.
      matrices: how they lie on the devices.
      transfer: what the width asks of their steps.
    """
    factor = config.muon_learning_rate / config.learning_rate or 1.0
    return optax.chain(
        _momentum(config.muon_momentum),
        transfer.of_muon(_orthogonalise(config.muon_rms, matrices)),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(lambda step: factor * rate(step)),
    )


def _momentum(beta: float) -> optax.GradientTransformation:
    """Returns Muon's momentum alone: no turn of the iteration, and no scaling before it."""

    def any_two_axes(updates):
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), updates)

    return optax.contrib.scale_by_muon(
        ns_steps=0, beta=beta, preconditioning="aol", weight_dimension_numbers=any_two_axes
    )


class Stack(NamedTuple):
    """Matrices of one shape, over the layers and the kinds of parameters.

    Attributes:
      m: rows, the fewer.
      n: columns.
      count: matrices.
      dealt: with what is added so that every device gets as many.
    """

    m: int
    n: int
    count: int
    dealt: int

    @property
    def flops(self) -> float:
        """What the devices compute that it is dealt to: three products a turn."""
        return self.dealt * TURNS * (4.0 * self.m**2 * self.n + 2.0 * self.m**3)


@functools.lru_cache(maxsize=8)
def stacks(model: ModelConfig, devices: int, trainable: str = ALL) -> tuple[Stack, ...]:
    """Returns what is made orthogonal together.

    Kept, since the cost of every step asks for it.

    Args:
      model: whose layers.
      devices: that they are dealt to.
      trainable: which of the parameters are trained.
    """
    definition = ModelDefinition(model)
    shapes = trained(definition.shapes, trainable)
    counts: dict[tuple[int, ...], int] = {}
    for leaf, names in Matrices(definition.logical_axes).each(shapes):
        if is_matrix(names):
            embed = leaf.shape[names.index("embed")]
            sides = sorted((embed, leaf.size // leaf.shape[0] // embed))
            counts[tuple(sides)] = counts.get(tuple(sides), 0) + leaf.shape[0]
    return tuple(
        Stack(m, n, count, -(-count // devices) * devices) for (m, n), count in counts.items()
    )


def _orthogonalise(rms: float, matrices: Matrices) -> optax.GradientTransformation:
    """Returns what makes each matrix orthogonal, and scales it by its shape."""

    def update(updates, state, parameters=None):
        del parameters
        leaves = list(matrices.each(updates))
        groups: dict[tuple, list[int]] = {}
        # With `embed` in front, as half of them lie anyway, `o` is one with `q`, and `down` with
        # `gate`: the iteration of a transpose is the transpose of the iteration.
        for index, (leaf, names) in enumerate(leaves):
            front = _embed_in_front(names)
            shape = tuple(leaf.shape[names.index(name)] for name in front)
            groups.setdefault((front, shape), []).append(index)
        made: list = [None] * len(leaves)
        for (front, shape), members in groups.items():
            embed, rest = shape[1], math.prod(shape[2:])
            turned = [_turned(*leaves[index]) for index in members]
            values = _newton_schulz(turned, front, matrices)
            for index, value in zip(members, values, strict=True):
                names = leaves[index][1]
                inputs, outputs = (embed, rest) if names == front else (rest, embed)
                scale = rms * max(inputs, outputs) ** 0.5 or max(1.0, outputs / inputs) ** 0.5
                made[index] = scale * (value if names == front else jnp.moveaxis(value, 1, -1))
        return jax.tree.structure(updates).unflatten(made), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def _embed_in_front(names: Names) -> Names:
    return names if names[1] == "embed" else (names[0], names[-1], *names[1:-1])


def _turned(leaf: Array, names: Names) -> Array:
    return leaf if names[1] == "embed" else jnp.moveaxis(leaf, -1, 1)


def _newton_schulz(
    kinds: list[Float[Array, "L D *rest"]], names: Names, matrices: Matrices
) -> list[Float[Array, "L D *rest"]]:
    """Makes matrices of one shape orthogonal, dealt out to the devices of each slice.

    Args:
      kinds: of one shape.
      names: of their dimensions.
      matrices: how they lie on the devices.
    """
    mesh, dtype = matrices.mesh, kinds[0].dtype
    together = jnp.concatenate(kinds).astype(matrices.dtype)
    count = len(together)
    ways = [] if mesh is None else _ways_to_deal(matrices.rules.spec(names), mesh)
    if ways:
        devices = parts(mesh, ways[-1][0])
        together = jnp.pad(together, [(0, -count % devices)] + [(0, 0)] * (together.ndim - 1))
    for way in ways:
        together = _laid_out(together, way, mesh)
    whole = _iterated(together.reshape(*together.shape[:2], -1))
    together = whole.reshape(together.shape)
    for way in reversed(ways):
        together = _laid_out(together, way, mesh)
    return jnp.split(together[:count].astype(dtype), len(kinds))


def _laid_out(x: Array, way: list[Names], mesh: Mesh) -> Array:
    spec = PartitionSpec(*(axes or None for axes in way))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def _ways_to_deal(spec: PartitionSpec, mesh: Mesh) -> list[list[Names]]:
    """Returns the axes of each dimension, from a parameter's to those of matrices dealt out whole.

    Each hands the axes of one dimension to the first, which is an all-to-all over those axes; the
    last adds the axes that hold copies, which only leaves some out. Empty for one device.
    """
    dims = [() if axes is None else (axes,) if isinstance(axes, str) else axes for axes in spec]
    dims = [tuple(axis for axis in axes if mesh.shape[axis] > 1) for axes in dims]
    copies = [a for a in DEALT_OVER if mesh.shape[a] > 1 and not any(a in axes for axes in dims)]
    ways = [list(dims)]
    for index in range(1, len(dims)):
        if dims[index]:
            now = list(ways[-1])
            now[0], now[index] = now[0] + now[index], ()
            ways.append(now)
    if copies:
        ways.append([ways[-1][0] + tuple(copies), *ways[-1][1:]])
    return ways if ways[-1][0] else []


def _iterated(x: Float[Array, "N D M"]) -> Float[Array, "N D M"]:
    """Returns optax's iteration alone: Muon without momentum."""
    alone = optax.contrib.scale_by_muon(
        ns_steps=TURNS, beta=0.0, nesterov=False,
        weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(1, 2),
    )  # fmt: skip
    return alone.update(x, alone.init(x))[0]
