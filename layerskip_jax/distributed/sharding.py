"""From logical axis names to the axes of the mesh.

Every parameter and activation names its dimensions ("embed", "heads", ...). `ShardingRules`
says on which mesh axes each name lies, and everything else follows from that table.
"""

import dataclasses
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from layerskip_jax.distributed.mesh import AXES, parts
from layerskip_jax.schema import ConfigError, require

BATCH = "batch"


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """The mesh axes that each logical axis is split over; () keeps it whole.

    An axis is one of `slice`, `data`, `fsdp`, `context` and `tensor`.

    Attributes:
      batch: rows of the batch.
      sequence: positions, inside attention and MLP.
      residual: positions of the residual stream outside them, where only norms and sums read
        it and `tensor` would otherwise hold copies (sequence parallelism).
      key_sequence: positions of keys and values; every device attends to all of them.
      activation: the width of the residual stream.
      exits: slots of the early-exit buffer.
      layers: the stacked layers.
      embed: the width of the residual stream, in parameters.
      mlp: hidden width of the MLP.
      heads: query heads.
      kv_heads: key/value heads.
      head_dim: width of a head.
      vocab: vocabulary.
      norm: scales of the norms.
    """

    batch: tuple[str, ...] = ("slice", "data", "fsdp")
    sequence: tuple[str, ...] = ("context",)
    residual: tuple[str, ...] = ("context", "tensor")
    key_sequence: tuple[str, ...] = ()
    activation: tuple[str, ...] = ()
    exits: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    embed: tuple[str, ...] = ("fsdp",)
    mlp: tuple[str, ...] = ("tensor",)
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    head_dim: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ("tensor",)
    norm: tuple[str, ...] = ()

    def __post_init__(self):
        for field in dataclasses.fields(self):
            for axis in getattr(self, field.name):
                require(axis in AXES, f"{field.name}: {axis!r} is no mesh axis; use {AXES}")
        split = self.residual[: len(self.sequence)]
        require(
            split == self.sequence,
            f"residual={self.residual} must begin with sequence={self.sequence}: the residual "
            "stream is split further, not otherwise",
        )

    def spec(self, logical_axes: tuple[str, ...]) -> PartitionSpec:
        """Returns the partition of an array whose dimensions bear these names."""
        return PartitionSpec(*(getattr(self, name) or None for name in logical_axes))

    def constrain(self, x: jax.Array, *logical_axes: str) -> jax.Array:
        """Pins an activation's sharding on the mesh set by `jax.set_mesh`."""
        return jax.lax.with_sharding_constraint(x, self.spec(logical_axes))


def parameter_shardings(
    shapes: Any, logical_axes: Any, mesh: jax.sharding.Mesh, rules: ShardingRules
) -> Any:
    """Returns a pytree of `NamedSharding` for a pytree of parameter shapes.

    Args:
      shapes: nested dict of arrays or `ShapeDtypeStruct`s.
      logical_axes: the same nest, with a tuple of names for each parameter.
      mesh: the device mesh.
      rules: from names to mesh axes.

    Raises:
      ConfigError: naming the parameter, when two of its dimensions want the same mesh axis
        or a dimension is not divisible by the axes it is split over.
    """

    def one(path, leaf, names):
        name = ".".join(str(getattr(p, "key", p)) for p in path)
        used = [axis for logical in names for axis in getattr(rules, logical)]
        if len(used) != len(set(used)):
            raise ConfigError(
                f"config.mesh.rules: parameter {name} {names} would use a mesh axis twice: {used}"
            )
        for size, logical in zip(leaf.shape, names, strict=True):
            count = parts(mesh, getattr(rules, logical))
            if size % count:
                # Of all axes only the vocabulary can be padded without changing the model.
                pad = f"pad it with config.model.pad_vocab_to_multiple_of={count}, or "
                raise ConfigError(
                    f"parameter {name}: its axis {logical!r} of size {size} is not divisible "
                    f"by the {count} devices of mesh axes {getattr(rules, logical)}; "
                    f"{pad if logical == 'vocab' else ''}change config.mesh, config.model, or "
                    f"config.mesh.rules.{logical}"
                )
        return NamedSharding(mesh, rules.spec(names))

    return jax.tree_util.tree_map_with_path(one, shapes, logical_axes)


def least_accumulation(batch_size: int, rows: int, shards: int) -> int:
    """Returns the fewest microbatches of which each shard of the batch holds at most `rows` rows.

    Raises:
      ConfigError: the batch does not divide into `shards`.
    """
    require(
        batch_size % shards == 0,
        f"config.training.batch_size={batch_size} is not divisible by the {shards} batch shards of "
        f"the mesh; make it a multiple of {shards}",
    )
    each = batch_size // shards
    return next(count for count in range(1, each + 1) if each % count == 0 and each <= rows * count)


def check_batch(batch_size: int, accumulation: int, mesh: jax.sharding.Mesh, rules) -> int:
    """Returns the number of batch shards, or raises unless it divides each microbatch."""
    shards = parts(mesh, rules.batch)
    require(
        batch_size % accumulation == 0,
        f"config.training.gradient_accumulation={accumulation} must divide "
        f"config.training.batch_size={batch_size}",
    )
    require(
        (batch_size // accumulation) % shards == 0,
        f"config.training.batch_size={batch_size} in {accumulation} accumulation step(s) "
        f"is not divisible by the {shards} batch shards of the mesh {dict(mesh.shape)}; "
        f"make it a multiple of {accumulation * shards}",
    )
    return shards


def check_sequence(length: int, scored: int, mesh: jax.sharding.Mesh, rules: ShardingRules) -> None:
    """Raises `ConfigError` unless the devices can share the positions.

    Args:
      length: the windows' length.
      scored: positions of a window that early exits are scored on.
      mesh: the device mesh.
      rules: from names to mesh axes.
    """
    count = parts(mesh, rules.residual)
    require(
        length % count == 0,
        f"windows of {length} tokens are not divisible by the {count} devices of mesh axes "
        f"{rules.residual}; prepare windows of a multiple of {count}, or change config.mesh.shape "
        "or config.mesh.rules.residual",
    )
    require(
        scored % count == 0,
        f"config.early_exit.exit_token_fraction scores {scored} of {length} positions, which is "
        f"not divisible by the {count} devices of mesh axes {rules.residual}; choose "
        f"{max(scored // count, 1) * count / length:g}",
    )
