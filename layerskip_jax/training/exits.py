"""The loss of exit adapters and of the learned exit.

Before a model that is left as it is (`exits_loss`), or of the learned exit alone beside the loss of
a model that trains (`classifier_error`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from layerskip_jax.config import RunConfig
from layerskip_jax.early_exit_loss import ActiveExits
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.model.definition import ModelDefinition
from layerskip_jax.model.transformer import Transformer

# While the model trains, its classifier learns from one in so many of the scored positions: two
# parameters more than the width need few, and the head is read anew for them.
CLASSIFIER_STRIDE = 8


def equal_exits(config: ModelConfig) -> ActiveExits:
    """Returns the exits that are trained, all at every step and with the same weight."""
    exits = np.asarray(config.exits.trained(config.num_layers))
    slots = np.full(config.num_layers, len(exits), np.int32)
    slots[exits - 1] = np.arange(len(exits))
    weights = jnp.full(len(exits), 1 / len(exits), jnp.float32)
    return ActiveExits(jnp.asarray(exits - 1, jnp.int32), weights, jnp.asarray(slots))


def exits_loss(definition: ModelDefinition, config: RunConfig) -> Callable:
    """Returns the loss of a microbatch and of its exits, as the train step takes it.

    The mean over the exits of the cross-entropy against `config.model.exits.target`, plus that of
    the squared error of the learned exit (BERxiT) whose target is 1 where the exit's likeliest
    token is the target's. An exit without adapter reads through the final norm.
    """
    settings = config.model.exits
    exits = settings.trained(config.model.num_layers)

    def loss(parameters, batch, plan, active, positions, valid_tokens):
        model = definition.model(parameters)
        states, last = model.exit_states(
            model.embed(batch.tokens),
            model.row_inputs(batch.positions, batch.segment_ids),
            active.slot_of_layer,
            len(exits),
        )
        head = model.head_weight[:, : model.config.vocab_size].astype(last.dtype)

        def logits(z):
            return jnp.einsum("bsd,dv->bsv", z, head, preferred_element_type=jnp.float32)

        # Logits are made again in the backward pass: no more than a chunk of them is ever kept.
        @jax.checkpoint
        def score(model_exits, states, last, targets, valid):
            if settings.target == "last":
                whole = logits(model.final_norm(last))
                p, best = jax.nn.softmax(whole), jnp.argmax(whole, axis=-1)
            entropies, errors = [], []
            for index in range(len(exits)):
                x = states[index]
                z = model_exits.adapt(x, index) if settings.adapters else model.final_norm(x)
                found = logits(z)
                log_p = jax.nn.log_softmax(found)
                if settings.target == "last":
                    right, nll = best, -jnp.sum(p * log_p, axis=-1)
                else:
                    right = targets
                    nll = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
                entropies.append(jnp.sum(jnp.where(valid, nll, 0)))
                if settings.learned:
                    is_right = (jnp.argmax(found, axis=-1) == right).astype(jnp.float32)
                    error = jnp.square(model_exits.score(z) - is_right)
                    errors.append(jnp.sum(jnp.where(valid, error, 0)))
            return jnp.stack(entropies), jnp.sum(jnp.asarray(errors, jnp.float32))

        length = batch.tokens.shape[1]
        chunk = _chunk(length, config.training.loss_chunk)

        def add(totals, start):
            def cut(array, axis):
                return jax.lax.dynamic_slice_in_dim(array, start, chunk, axis)

            parts = score(
                model.exits, cut(states, 2), cut(last, 1), cut(batch.targets, 1),
                cut(batch.valid, 1),
            )  # fmt: skip
            return jax.tree.map(jnp.add, totals, parts), None

        zeros = (jnp.zeros(len(exits)), jnp.float32(0))
        (entropies, error), _ = jax.lax.scan(add, zeros, jnp.arange(0, length, chunk))
        count = jnp.maximum(valid_tokens, 1).astype(jnp.float32)
        means = entropies / count
        return jnp.mean(means) + error / (len(exits) * count), means

    return loss


def _chunk(length: int, most: int) -> int:
    """Returns the largest chunk of positions, `most` at most, that `length` is a multiple of."""
    return max(size for size in range(1, min(most, length) + 1) if length % size == 0)


def classifier_positions(scored: int) -> int:
    """Returns how many of the positions that exits are scored on the classifier learns from."""
    return -(-scored // CLASSIFIER_STRIDE)


def classifier_error(
    model: Transformer,
    early: Float[Array, "slots B M D"],
    last: Float[Array, "B S D"],
    targets: Int[Array, "B S"],
    valid: Bool[Array, "B S"],
    on: Bool[Array, "slots"],
    valid_tokens: Int[Array, ""],
    *,
    positions: Int[Array, "M"] | None,
    chunk: int,
) -> Float[Array, ""]:
    """Returns the mean squared error of the learned exit (BERxiT), on a share of the positions.

    Its gradient goes to the classifier alone: what trains beside it trains as without it.

    Args:
      model: whose `exits` hold the classifier.
      early: outputs of the early exits' layers, by slot, at `positions`.
      last: output of the last layer.
      targets: next tokens.
      valid: which targets count.
      on: which slots are scored at this step.
      valid_tokens: valid targets of the whole global batch, as in `early_exit_loss`.
      positions: those that `early` holds; None: all.
      chunk: positions whose logits are held at once, of one exit.
    """
    early, last = jax.lax.stop_gradient((early, last))
    length = targets.shape[1]
    if positions is None:
        positions = jnp.arange(length)
    positions, early = positions[::CLASSIFIER_STRIDE], early[:, :, ::CLASSIFIER_STRIDE]
    of_last = model.config.exits.target == "last"
    last, right, valid = (jnp.take(a, positions, axis=1) for a in (last, targets, valid))
    z = model.final_norm(jnp.concatenate([early, last[None]]) if of_last else early)
    read = jnp.append(on, on.any()) if of_last else on
    head = jax.lax.stop_gradient(model.head_weight[:, : model.config.vocab_size]).astype(z.dtype)
    size = _chunk(len(positions), chunk)

    def likeliest(slot):
        z, read = slot

        def of_chunk(z):
            logits = jnp.einsum("bsd,dv->bsv", z, head, preferred_element_type=jnp.float32)
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)

        def of_row(z):
            parts = z.reshape(z.shape[0], -1, size, z.shape[-1]).swapaxes(0, 1)
            return jax.lax.map(of_chunk, parts).swapaxes(0, 1).reshape(z.shape[:2])

        return jax.lax.cond(read, of_row, lambda z: jnp.zeros(z.shape[:2], jnp.int32), z)

    choices = jax.lax.map(likeliest, (jax.lax.stop_gradient(z), read))
    if of_last:
        choices, right, z = choices[:-1], choices[-1], z[:-1]
    errors = jnp.square(model.exits.score(z) - (choices == right).astype(jnp.float32))
    total = jnp.sum(jnp.where(on[:, None, None] & valid, errors, 0))
    counted = jnp.maximum(valid_tokens, 1) * (len(positions) / length) * jnp.maximum(on.sum(), 1)
    return total / counted
