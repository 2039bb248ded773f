"""Attention over packed sequences and over a cache, by named kernel."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def packed_attention(
    q: Float[Array, "B S H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    segment_ids: Int[Array, "B S"],
    *,
    kernel: str,
) -> Float[Array, "B S H h"]:
    """Causal attention in which no token sees another document of its window.

    Args:
      q: queries; query head i reads key/value head i // (H / K).
      k: keys.
      v: values.
      segment_ids: document of each token within its row.
      kernel: `xla`. Nothing is substituted silently: an unknown kernel raises.
    """
    if kernel != "xla":
        raise ValueError(f"attention kernel {kernel!r} does not exist; use 'xla'")
    length = q.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    same_document = segment_ids[:, :, None] == segment_ids[:, None, :]
    return _attend(q, k, v, same_document & causal)


def cached_attention(
    q: Float[Array, "B S H h"],
    k: Float[Array, "B T K h"],
    v: Float[Array, "B T K h"],
    q_positions: Int[Array, "B S"],
) -> Float[Array, "B S H h"]:
    """Attention of new tokens over a cache of T slots, slot j holding position j.

    A query at position p sees the slots 0..p; whatever lies beyond, such as the keys of
    rejected drafts, is masked.
    """
    visible = jnp.arange(k.shape[1])[None, None, :] <= q_positions[:, :, None]
    return _attend(q, k, v, visible)


def _attend(
    q: Float[Array, "B S H h"],
    k: Float[Array, "B T K h"],
    v: Float[Array, "B T K h"],
    mask: Bool[Array, "B S T"],
) -> Float[Array, "B S H h"]:
    """Softmax attention in float32, in the plain XLA operations that a CPU runs best.

    `jax.nn.dot_product_attention(implementation="xla")` gives the same numbers and took 1.6
    times as long forward and backward here (2 cores, B 8, S 256, H 4, K 2, h 32).
    """
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    # Heads in front make each product a plain batched matrix product.
    q = (q * width**-0.5).reshape(batch, length, kv_heads, heads // kv_heads, width)
    q, k, v = q.transpose(0, 2, 3, 1, 4), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    logits = jnp.einsum("bkgsh,bkth->bkgst", q, k, preferred_element_type=jnp.float32)
    logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    attended = jnp.einsum("bkgst,bkth->bkgsh", weights, v)
    return attended.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)
