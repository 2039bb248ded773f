"""A run's pieces on a mesh: shardings, first state, and the compiled step."""

import dataclasses
import logging
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layerskip_jax import layer_dropout
from layerskip_jax.config import RunConfig
from layerskip_jax.data.batch_sizes import BatchSizes
from layerskip_jax.distributed.mesh import make_mesh, parts
from layerskip_jax.distributed.processes import BatchPlacement
from layerskip_jax.distributed.sharding import (
    ShardingRules,
    check_batch,
    check_sequence,
    least_accumulation,
    parameter_shardings,
)
from layerskip_jax.early_exit_loss import check_exits, scored_positions
from layerskip_jax.hardware.chips import chip_of
from layerskip_jax.hardware.compiler_options import Value, compiler_options
from layerskip_jax.model.definition import ModelDefinition, Parameters
from layerskip_jax.ops.attention import PackedAttention, choose_kernel
from layerskip_jax.ops.linear import contract, contract_tokens
from layerskip_jax.ops.linear_cross_entropy import Layout
from layerskip_jax.schema import LARGEST_INT32, ConfigError, require
from layerskip_jax.training.muon import Matrices
from layerskip_jax.training.optimizer import make_optimizer
from layerskip_jax.training.step import Batch, TrainState, make_train_step
from layerskip_jax.training.trainable import check_trainable, trained
from layerskip_jax.training.width_transfer import WidthTransfer

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainSetup:
    """What `train` and the tests need beside the data.

    Attributes:
      config: the run, its accumulation and its attention kernel resolved for these devices.
      mesh: the devices; set it with `jax.set_mesh` around every call below.
      definition: the model's structure.
      optimizer: the optax transformation.
      shardings: a `TrainState` of shardings.
      placement: puts rows of a batch onto the mesh.
    """

    config: RunConfig
    mesh: Mesh
    definition: ModelDefinition
    optimizer: optax.GradientTransformation
    shardings: TrainState
    placement: BatchPlacement

    @property
    def layout(self) -> Layout:
        """How the states of exits lie over the devices."""
        return scoring_layout(self.mesh, self.config.mesh.rules)

    @property
    def compiler_options(self) -> dict[str, Value]:
        """What the step is compiled with on these devices."""
        chip = chip_of(self.mesh.devices.flat[0])
        return compiler_options(chip, self.mesh.shape["slice"], self.config.compiler.options)

    def check_sequence(self, length: int, evaluated: bool = False) -> None:
        """Raises `ConfigError` unless the devices can share, and count, such windows.

        Args:
          length: their tokens.
          evaluated: whether they are only evaluated, all positions scored at every exit.
        """
        rows = self.config.training.batch_size
        require(
            rows * length <= LARGEST_INT32,
            f"config.training.batch_size={rows} windows of {length} tokens are more than the "
            f"{LARGEST_INT32} tokens that a step can count; take fewer",
        )
        scored = length if evaluated else scored_positions(self.config.early_exit, length)
        check_sequence(length, scored, self.mesh, self.config.mesh.rules)

    def _trained(self, parameters: Parameters) -> Parameters:
        return trained(parameters, self.config.training.trainable)

    def init(self) -> TrainState:
        """Draws the first state, each device making its own shard; any mesh gives the same."""

        def make():
            transfer = WidthTransfer(self.config.optimizer, self.config.model)
            parameters = self.definition.init(jax.random.key(self.config.seed))
            parameters = transfer.drawn(parameters)
            return TrainState(
                jnp.int32(0), parameters, self.optimizer.init(self._trained(parameters))
            )

        return jax.jit(make, out_shardings=self.shardings)()

    def start_from(self, parameters: Parameters) -> TrainState:
        """Returns the state before the first step with these parameters, sharded as they are."""
        optimizer = jax.jit(self.optimizer.init, out_shardings=self.shardings.optimizer)
        step = jax.device_put(jnp.int32(0), self.shardings.step)
        return TrainState(step, parameters, optimizer(self._trained(parameters)))

    def abstract_state(self) -> TrainState:
        """Returns shapes, dtypes and shardings of the state, as a template to restore into."""
        parameters = self.definition.shapes
        state = TrainState(
            jax.ShapeDtypeStruct((), jnp.int32),
            parameters,
            jax.eval_shape(self.optimizer.init, self._trained(parameters)),
        )
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state,
            self.shardings,
        )

    def abstract_batch(self, sequence_length: int) -> Batch:
        """Returns shapes, dtypes and shardings of the batches `placement` makes."""
        accumulation = self.config.training.gradient_accumulation
        shape = (accumulation, self.config.training.batch_size // accumulation, sequence_length)
        ints = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.placement.sharding)
        bools = jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=self.placement.sharding)
        return Batch(ints, ints, bools, ints, ints)

    def compile_step(self, sequence_length: int, guarded: bool = True) -> Callable:
        """Compiles the step, once and ahead of time, for windows of this length.

        The result takes and donates a `TrainState`, and refuses any other shape or sharding
        instead of compiling again. See `make_train_step` for `guarded`.
        """
        start = time.monotonic()
        compiled = self.lower_step(sequence_length, guarded).compile(self.compiler_options)
        logger.info(
            "compiled the train step for %d windows in %.1f s",
            self.config.training.batch_size, time.monotonic() - start,
        )  # fmt: skip
        return compiled

    def of_batch(self, size: int) -> "TrainSetup":
        """Returns the same for the steps of a batch ramp that have so many windows."""
        training, mesh, rules = self.config.training, self.mesh, self.config.mesh.rules
        if size == training.batch_size:
            return self
        count = _accumulation_of(self.config, size, parts(mesh, rules.batch))
        training = dataclasses.replace(
            training, batch_size=size, batch_ramp=(), gradient_accumulation=count
        )
        return dataclasses.replace(
            self,
            config=dataclasses.replace(self.config, training=training),
            placement=BatchPlacement(mesh, rules.batch, rules.sequence, size, count),
        )

    def lower_step(self, sequence_length: int, guarded: bool = True) -> jax.stages.Lowered:
        """Returns the step as `compile_step` compiles it, before the compiler has seen it."""

        def pin(gradients):
            return jax.lax.with_sharding_constraint(
                gradients, self._trained(self.shardings.parameters)
            )

        self.check_sequence(sequence_length)
        step = make_train_step(
            self.definition, self.config, self.optimizer, pin, self.layout, guarded
        )
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, None))
        return jitted.lower(self.abstract_state(), self.abstract_batch(sequence_length))


def make_setup(config: RunConfig, devices: list | None = None) -> TrainSetup:
    """Checks a resolved config against the devices and lays the run out on them.

    Raises:
      ConfigError: the batch, a parameter's axis or the dropout groups do not fit the mesh.
    """
    rules, training = config.mesh.rules, config.training
    mesh = make_mesh(config.mesh.shape, devices)
    if training.gradient_accumulation == 0:
        count = least_accumulation(
            training.batch_size, training.rows_per_device, parts(mesh, rules.batch)
        )
        training = dataclasses.replace(training, gradient_accumulation=count, rows_per_device=0)
        config = dataclasses.replace(config, training=training)
    shards = check_batch(training.batch_size, training.gradient_accumulation, mesh, rules)
    for _, size in BatchSizes.of(training).stages:
        _check_size(config, size, shards)
    layer_dropout.check_layers(config.layer_dropout, config.model.num_layers)
    check_exits(config.early_exit, config.model.num_layers)
    config.model.exits.check_layers(config.model.num_layers)
    context = parts(mesh, rules.sequence)
    platform = mesh.devices.flat[0].platform
    kernel = choose_kernel(
        config.model.attention,
        platform,
        packing_mask=config.model.packing_mask,
        context=context,
        window=config.model.sliding_window,
        dtype=config.model.dtype,
        head_dim=config.model.head_dim,
    )
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention=kernel))
    attend = PackedAttention(
        kernel, config.model.packing_mask, rules.batch, rules.sequence, rules.heads
    )
    whole_rows = parts(mesh, rules.batch) == mesh.size
    product = contract_tokens if platform == "cpu" and whole_rows else contract
    definition = ModelDefinition(config.model, rules.constrain, attend, product)
    check_trainable(definition.shapes, training.trainable)
    matrices = Matrices(definition.logical_axes, mesh, rules, config.model.dtype)
    optimizer = make_optimizer(config.optimizer, training.steps, matrices, config.model)
    parameters = parameter_shardings(definition.shapes, definition.logical_axes, mesh, rules)
    everywhere = NamedSharding(mesh, PartitionSpec())
    # The moments of each parameter are laid out like the parameter itself.
    optimizer_state = optax.tree_map_params(
        optimizer,
        lambda leaf, sharding: leaf if _is_masked(leaf) else sharding,
        jax.eval_shape(optimizer.init, trained(definition.shapes, training.trainable)),
        trained(parameters, training.trainable),
        transform_non_params=lambda _: everywhere,
        is_leaf=_is_masked,
    )
    return TrainSetup(
        config=config,
        mesh=mesh,
        definition=definition,
        optimizer=optimizer,
        shardings=TrainState(everywhere, parameters, optimizer_state),
        placement=BatchPlacement(
            mesh, rules.batch, rules.sequence, training.batch_size, training.gradient_accumulation
        ),
    )


def _accumulation_of(config: RunConfig, size: int, shards: int) -> int:
    """Returns the fewest microbatches of a ramp's batch that are no larger than the full one's.

    Args:
      config: the run, its accumulation resolved.
      size: windows of the batch.
      shards: of a batch.
    """
    training = config.training
    rows = training.batch_size // training.gradient_accumulation // shards
    return least_accumulation(size, rows, shards)


def _check_size(config: RunConfig, size: int, shards: int) -> None:
    """Raises `ConfigError` unless a batch of this size fits the devices and the dropout groups."""
    try:
        layer_dropout.check_groups(
            config.layer_dropout,
            batch_size=size,
            batch_shards=shards,
            accumulation=_accumulation_of(config, size, shards),
        )
    except ConfigError as error:
        ramp = config.training.batch_ramp
        if size == config.training.batch_size:
            raise
        raise ConfigError(
            f"config.training.batch_ramp={ramp} has batches of {size} windows: {error}; or take "
            "fewer doublings"
        ) from error


def _is_masked(leaf) -> bool:
    """Whether a part of an optimizer's state stands for a parameter that another part has."""
    return isinstance(leaf, optax.MaskedNode)


def scoring_layout(mesh: Mesh, rules: ShardingRules) -> Layout:
    """Returns how the states of exits lie on the mesh, as the head's loss wants to know it."""
    tokens = PartitionSpec((*rules.batch, *rules.sequence) or None)
    return Layout(
        rows=parts(mesh, rules.batch),
        positions=parts(mesh, rules.sequence),
        inner=parts(mesh, rules.residual[len(rules.sequence) :]),
        constrain=lambda chunk: jax.lax.with_sharding_constraint(chunk, tokens),
        # Gathered along D once a step, not with every part that is scored.
        constrain_head=lambda head: rules.constrain(head, "activation", "vocab"),
    )
