"""Weights laid out for decoding: the stacked layers taken apart, once, at load.

Slicing layer l out of the stacked arrays inside the loop would copy every weight for every
token, which more than doubles the cost of a token.
"""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from layerskip_jax.model.transformer import Block, RMSNorm, Transformer


class DecoderWeights(NamedTuple):
    """What decoding reads; matrices in the compute dtype, scales of norms in float32.

    Attributes:
      embedding: `[V, D]`.
      layers: one `Block` a layer.
      final_norm: shared by all exits.
      head: `[D, V]`, shared by all exits; None where the embedding serves as the head.
    """

    embedding: Float[Array, "V D"]
    layers: tuple[Block, ...]
    final_norm: RMSNorm
    head: Float[Array, "D V"] | None


@jax.jit
def decoder_weights(model: Transformer) -> DecoderWeights:
    """Takes a model's stacked layers apart and casts its matrices to its compute dtype."""
    dtype = model.config.compute_dtype

    def cast(leaf):
        return leaf.astype(dtype) if leaf.ndim > 1 else leaf

    def take(layer):
        return jax.tree.map(lambda stacked: cast(stacked[layer]), model.layers)

    return DecoderWeights(
        embedding=cast(model.embedding[...]),
        layers=tuple(take(layer) for layer in range(model.config.num_layers)),
        final_norm=model.final_norm,
        head=None if model.config.tie_embeddings else cast(model.head[...]),
    )
