"""The loss of exit adapters and of the learned exit, before a model that is left as it is."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from layerskip_jax.config import RunConfig
from layerskip_jax.early_exit_loss import ActiveExits
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.model.definition import ModelDefinition


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
        limit = min(config.training.loss_chunk, length)
        chunk = max(size for size in range(1, limit + 1) if length % size == 0)

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
