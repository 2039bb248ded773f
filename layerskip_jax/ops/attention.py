"""Attention over packed sequences and over a cache, by named kernel."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Slots of a cache that a step may read. A token reads at most twice what it needs, four times
# where that is much already, and few sizes are compiled.
CACHE_SIZES = (64, 128, 256, 512, 1024, 4096, 16384, 65536)


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
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)
    attended = _attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), same_document & causal)
    return attended.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)


def cached_attention(
    q: Float[Array, "B K G S h"],
    k: Float[Array, "B K T h"],
    v: Float[Array, "B K T h"],
    q_positions: Int[Array, "B S"],
) -> Float[Array, "B K G S h"]:
    """Attention of new tokens over a cache of T slots, slot j holding position j.

    A query at position p sees the slots 0..p; whatever lies beyond, such as the keys of
    rejected drafts, is masked. Only the first slots of the cache are read, as many as the
    furthest query needs, rounded up to one of a few sizes.
    """
    slots = k.shape[2]
    sizes = [size for size in CACHE_SIZES if size < slots] + [slots]

    def over(size: int):
        def attend(q, k, v, q_positions):
            visible = jnp.arange(size) <= q_positions[:, :, None]
            return _attend(q, k[:, :, :size], v[:, :, :size], visible)

        return attend

    if len(sizes) == 1:
        return over(slots)(q, k, v, q_positions)
    smallest = jnp.searchsorted(jnp.array(sizes), q_positions.max() + 1)
    return jax.lax.switch(smallest, [over(size) for size in sizes], q, k, v, q_positions)


def _attend(
    q: Float[Array, "B K G S h"],
    k: Float[Array, "B K T h"],
    v: Float[Array, "B K T h"],
    mask: Bool[Array, "B S T"],
) -> Float[Array, "B K G S h"]:
    """Softmax attention in float32, in the plain XLA operations that a CPU runs best.

    Heads in front make each product a plain batched matrix product.
    `jax.nn.dot_product_attention(implementation="xla")` gives the same numbers and took 1.6
    times as long forward and backward here (2 cores, B 8, S 256, H 4, K 2, h 32).
    """
    q = q * q.shape[-1] ** -0.5
    logits = jnp.einsum("bkgsh,bkth->bkgst", q, k, preferred_element_type=jnp.float32)
    logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgst,bkth->bkgsh", weights, v)
