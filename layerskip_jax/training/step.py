"""One optimizer step: keep plan, layers, exits, gradient, update."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from layerskip_jax import layer_dropout
from layerskip_jax.config import RunConfig
from layerskip_jax.early_exit_loss import (
    early_exit_loss,
    max_active_exits,
    sample_positions,
    select_exits,
)
from layerskip_jax.model.definition import ModelDefinition, Parameters
from layerskip_jax.ops.checksum import checksum
from layerskip_jax.ops.linear_cross_entropy import ONE_DEVICE, Layout
from layerskip_jax.training.exits import classifier_error, equal_exits, exits_loss
from layerskip_jax.training.optimizer import learning_rate_schedule
from layerskip_jax.training.trainable import merged, trained


class TrainState(NamedTuple):
    """All that an optimizer step changes.

    Attributes:
      step: optimizer steps done; it alone fixes the next batch, keep plan and exits.
      parameters: nested dict of float32 arrays.
      optimizer: state of the optax transformation.
    """

    step: Int[Array, ""]
    parameters: Parameters
    optimizer: Any


class Batch(NamedTuple):
    """A global batch on the devices: N microbatches of B rows of S tokens."""

    tokens: Int[Array, "N B S"]
    targets: Int[Array, "N B S"]
    valid: Bool[Array, "N B S"]
    segment_ids: Int[Array, "N B S"]
    positions: Int[Array, "N B S"]


class StepMetrics(NamedTuple):
    """What a step reports; the loss is in nats per valid token.

    Attributes:
      loss: J of LayerSkip eq. 5.
      exit_layers: layer index of each exit slot.
      exit_losses: mean cross-entropy of each slot, before weighting.
      exit_weights: w(t, l) of each slot; 0 marks a slot that was not scored.
      gradient_norm: global norm before clipping.
      learning_rate: the learning rate of this step.
      layers_run: share of (layer, row) pairs that were not dropped.
      valid_tokens: targets that counted.
      left_out: rows without a token, in place of records that are damaged.
      batch: checksum of the tokens of the global batch, whatever the mesh.
      skipped: whether loss or gradient was not finite and the step changed nothing.
    """

    loss: Float[Array, ""]
    exit_layers: Int[Array, "A"]
    exit_losses: Float[Array, "A"]
    exit_weights: Float[Array, "A"]
    gradient_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    layers_run: Float[Array, ""]
    valid_tokens: Int[Array, ""]
    left_out: Int[Array, ""]
    batch: UInt32[Array, ""]
    skipped: Bool[Array, ""]


def make_train_step(
    definition: ModelDefinition,
    config: RunConfig,
    optimizer: optax.GradientTransformation,
    pin_gradients: Callable[[Parameters], Parameters] = lambda gradients: gradients,
    layout: Layout = ONE_DEVICE,
    guarded: bool = True,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Returns the function of one optimizer step, to be jitted.

    A step whose loss or gradient is not finite counts as a step, with its batch, and leaves
    parameters and optimizer state, its count included, bit for bit as they were.

    Args:
      definition: the model.
      config: the run; every schedule is evaluated from it and the step.
      optimizer: the optax transformation.
      pin_gradients: constrains the gradients to the shardings of the parameters.
      layout: how a microbatch lies over the devices.
      guarded: False leaves out the check for what is not finite and the checksum of the batch,
        to measure what they cost.
    """
    num_layers, total_steps = config.model.num_layers, config.training.steps
    trainable = config.training.trainable
    gradient = _batch_gradient(definition, config, layout)
    learning_rate = learning_rate_schedule(config.optimizer, total_steps)

    def train_step(state, batch):
        # Every host folds the same step into the same seed, so all draw the same.
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        plan, layers_run = _draw_plan(config, key, state.step)
        if trainable == "exits":
            exits = equal_exits(config.model)
        else:
            exits = select_exits(config.early_exit, num_layers, state.step, total_steps)
        positions = sample_positions(
            jax.random.fold_in(key, 1), config.early_exit, batch.tokens.shape[2]
        )
        # Normalising by the whole batch makes microbatches of uneven length add up exactly.
        valid_tokens = batch.valid.sum()
        (loss, exit_losses), gradients = gradient(
            state.parameters, batch, plan, exits, positions, valid_tokens
        )
        gradients = pin_gradients(gradients)
        part = trained(state.parameters, trainable)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, part)
        gradient_norm = optax.tree.norm(gradients)
        # One scalar decides on every device alike; no host takes part.
        finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
        metrics = StepMetrics(
            loss=loss,
            exit_layers=exits.layers,
            exit_losses=exit_losses,
            exit_weights=exits.weights,
            gradient_norm=gradient_norm,
            learning_rate=jnp.asarray(learning_rate(state.step), jnp.float32),
            layers_run=layers_run,
            valid_tokens=valid_tokens,
            left_out=_count_empty(batch.segment_ids),
            batch=checksum(batch.tokens) if guarded else jnp.uint32(0),
            skipped=~finite if guarded else jnp.bool_(False),
        )
        after = TrainState(
            state.step + 1,
            merged(state.parameters, optax.apply_updates(part, updates)),
            optimizer_state,
        )
        if guarded:
            before = state._replace(step=after.step)
            after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)
        return after, metrics

    return train_step


def _count_empty(segment_ids: Int[Array, "N B S"]) -> Int[Array, ""]:
    """Counts the rows that begin with padding; reduced as the valid targets are, and with them."""
    first = jnp.arange(segment_ids.shape[-1]) == 0
    return ((segment_ids == 0) & first).sum()


def _menu(config: RunConfig) -> tuple[int, ...]:
    """Returns the numbers of rows of a group that a layer may run."""
    dropout = config.layer_dropout
    return dropout.menu(config.training.batch_size // dropout.row_groups)


def _draw_plan(
    config: RunConfig, key: PRNGKeyArray, step: Int[Array, ""]
) -> tuple[layer_dropout.KeepPlan | None, Float[Array, ""]]:
    """Returns which layers each row runs, None for all, and the share of them all that do."""
    dropout = config.layer_dropout
    if dropout.p_max == 0:
        return None, jnp.float32(1)
    p = layer_dropout.drop_probabilities(
        dropout, config.model.num_layers, step, config.training.steps
    )
    plan = layer_dropout.draw_keep_plan(
        key,
        p,
        batch_size=config.training.batch_size,
        groups=dropout.row_groups,
        menu=_menu(config),
    )._replace(residual_scale=layer_dropout.residual_scales(dropout, p))
    return plan, plan.keep.mean(dtype=jnp.float32)


def _microbatch_loss(definition: ModelDefinition, config: RunConfig, layout: Layout) -> Callable:
    """Returns the loss of a microbatch and the losses of its exits, as a function of its parts."""
    dropout, constrain = config.layer_dropout, definition.constrain
    execution = layer_dropout.Execution(
        dropout.execution,
        max(dropout.row_groups // config.training.gradient_accumulation, 1),
        _menu(config),
        lambda x: constrain(x, "batch", "residual", "activation"),
    )
    slots = max_active_exits(config.early_exit, config.model.num_layers) - 1

    def loss(parameters, batch, plan, exits, positions, valid_tokens):
        model = definition.model(parameters)
        scored = None if positions is None else positions.reshape(-1)
        early, last = model.exit_states(
            model.embed(batch.tokens),
            model.row_inputs(batch.positions, batch.segment_ids),
            exits.slot_of_layer,
            slots,
            positions=positions,
            plan=plan,
            execution=execution,
        )
        value, means = early_exit_loss(
            early,
            last,
            model.head_weight,
            batch.targets,
            batch.valid,
            exits.weights,
            valid_tokens,
            positions=scored,
            norm=model.final_norm,
            chunk=config.training.loss_chunk,
            z_loss=config.early_exit.z_loss,
            vocab_size=model.config.vocab_size,
            layout=layout,
        )
        if config.model.exits.learned and slots:
            error = classifier_error(
                model, early, last, batch.targets, batch.valid, exits.weights[:-1] > 0,
                valid_tokens, positions=scored, chunk=config.training.loss_chunk,
            )  # fmt: skip
            value += error - jax.lax.stop_gradient(error)  # J stays what is reported
        return value, means

    return loss


def _batch_gradient(definition: ModelDefinition, config: RunConfig, layout: Layout) -> Callable:
    """Returns the loss of a batch and its gradient, added up over its microbatches."""
    accumulation = config.training.gradient_accumulation
    rows = config.training.batch_size // accumulation
    if config.training.trainable == "exits":
        loss = exits_loss(definition, config)
    else:
        loss = _microbatch_loss(definition, config, layout)

    def of_trained(part, parameters, *rest):
        return loss(merged(parameters, part), *rest)

    # Of what is trained alone: nothing goes back through a model that is left as it is.
    differentiated = jax.value_and_grad(of_trained, has_aux=True)

    def function(parameters, *rest):
        part = trained(parameters, config.training.trainable)
        return differentiated(part, parameters, *rest)

    def gradient(parameters, batch, plan, *rest):
        def one(index):
            micro = jax.tree.map(lambda array: array[index], batch)
            micro_plan = None if plan is None else plan.rows(index * rows, rows)
            return function(parameters, micro, micro_plan, *rest)

        if accumulation == 1:
            return one(0)

        def add(total, index):
            return jax.tree.map(jnp.add, total, one(index)), None

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(one, 0))
        total, _ = jax.lax.scan(add, zeros, jnp.arange(accumulation))
        return total

    return gradient
