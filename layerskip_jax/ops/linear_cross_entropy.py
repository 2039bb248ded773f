"""Cross-entropy of a linear head, never holding the logits of all tokens at once.

The [tokens, V] logits of several exits would dwarf everything else in a training step. Here
the sequence is scored a chunk at a time, and since the weight of every token is known before
the backward pass, the gradients with respect to states and head are formed in the forward
pass, from the same logits, and only scaled in the backward one.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int


def linear_cross_entropy(
    states: Float[Array, "A B S D"],
    head: Float32[Array, "D V"],
    targets: Int[Array, "B S"],
    valid: Bool[Array, "B S"],
    weights: Float[Array, "A"],
    *,
    chunk: int,
    batch_shards: int = 1,
) -> tuple[Float[Array, ""], Float[Array, "A"]]:
    """Returns sum_a weights[a] NLL_a and the NLL_a themselves, summed over valid tokens.

    Args:
      states: inputs of the head, in the compute dtype.
      head: its float32 weights, cast to the dtype of the states for the products. Logits,
        sums and the head's gradient are float32.
      targets: token ids.
      valid: the tokens that count.
      weights: weight of each leading slot; one of weight 0 is skipped, its NLL given as 0.
      chunk: positions scored at once; need not divide S.
      batch_shards: parts that B is split into over the devices. Sums over the batch are kept
        apart by part until all chunks are done, so that devices add them up once, not with
        every chunk.

    Only the first result is differentiable, with respect to `states` and `head`.
    """
    chunk = min(chunk, states.shape[2])
    loss, sums = _weighted_nll(states, head, targets, valid, weights, chunk, batch_shards)
    return loss, jax.lax.stop_gradient(sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _weighted_nll(states, head, targets, valid, weights, chunk, shards):
    loss, sums, _ = _scan(
        states, head, targets, valid, weights, chunk, shards, with_gradients=False
    )
    return loss, sums


def _forward(states, head, targets, valid, weights, chunk, shards):
    loss, sums, gradients = _scan(
        states, head, targets, valid, weights, chunk, shards, with_gradients=True
    )
    return (loss, sums), gradients


def _backward(chunk, shards, gradients, cotangents):
    d_states, d_head = gradients
    d_loss = cotangents[0]
    return (
        (d_states * d_loss).astype(d_states.dtype),
        d_head * d_loss,
        None,
        None,
        None,
    )


_weighted_nll.defvjp(_forward, _backward)


def _scan(states, head, targets, valid, weights, chunk, shards, *, with_gradients):
    """Scores every (slot, chunk) in turn; the head's gradient is summed in float32.

    In the products n counts the shards of the batch and b the rows of one.
    """
    slots, batch, length, width = states.shape
    head = head.astype(states.dtype)
    padding = -length % chunk
    if padding:
        states = jnp.pad(states, ((0, 0), (0, 0), (0, padding), (0, 0)))
        targets = jnp.pad(targets, ((0, 0), (0, padding)))
        valid = jnp.pad(valid, ((0, 0), (0, padding)))
    chunks = (length + padding) // chunk
    rows = (shards, batch // shards)
    # Chunks are cut from the sequence, which is not sharded, so that no chunk leaves a device.
    states = states.reshape(slots, *rows, chunks, chunk, width).transpose(0, 3, 1, 2, 4, 5)
    states = states.reshape(slots * chunks, *rows, chunk, width)
    targets = targets.reshape(*rows, chunks, chunk).transpose(2, 0, 1, 3)
    valid = valid.reshape(*rows, chunks, chunk).transpose(2, 0, 1, 3)

    def score(x, y, mask, weight):
        logits = jnp.einsum("nbsd,dv->nbsv", x, head, preferred_element_type=jnp.float32)
        is_target = y[..., None] == jnp.arange(head.shape[1])
        log_z = jax.nn.logsumexp(logits, axis=-1)
        nll = log_z - jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
        total = jnp.sum(jnp.where(mask, nll, 0), axis=(1, 2))
        if not with_gradients:
            return total, None, None
        d_logits = jnp.exp(logits - log_z[..., None]) - is_target
        d_logits = (d_logits * jnp.where(mask, weight, 0)[..., None]).astype(x.dtype)
        d_x = jnp.einsum("nbsv,dv->nbsd", d_logits, head, preferred_element_type=jnp.float32)
        d_head = jnp.einsum("nbsd,nbsv->ndv", x, d_logits, preferred_element_type=jnp.float32)
        return total, d_x.astype(x.dtype), d_head

    def step(d_head, item):
        x, chunk_index, weight = item

        def run():
            total, d_x, d_head_here = score(x, targets[chunk_index], valid[chunk_index], weight)
            return total, d_x, d_head + d_head_here if with_gradients else None

        def skip():
            return jnp.zeros(shards), jnp.zeros_like(x) if with_gradients else None, d_head

        total, d_x, d_head = jax.lax.cond(weight != 0, run, skip)
        return d_head, (total, d_x)

    start = jnp.zeros((shards, *head.shape), jnp.float32) if with_gradients else None
    items = (states, jnp.tile(jnp.arange(chunks), slots), jnp.repeat(weights, chunks))
    d_head, (totals, d_states) = jax.lax.scan(step, start, items)
    sums = totals.reshape(slots, chunks * shards).sum(axis=1)
    loss = jnp.sum(weights * sums)
    if not with_gradients:
        return loss, sums, None
    d_states = d_states.reshape(slots, chunks, *rows, chunk, width).transpose(0, 2, 3, 1, 4, 5)
    d_states = d_states.reshape(slots, batch, chunks * chunk, width)[:, :, :length]
    return loss, sums, (d_states, d_head.sum(axis=0))
