"""Weights laid out for decoding: the stacked layers taken apart, once, at load.

Slicing layer l out of the stacked arrays inside the loop would copy every weight for every
token, which more than doubles the cost of a token.
"""

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from layerskip_jax.model.transformer import Block, RMSNorm, Transformer


class DecoderWeights(NamedTuple):
    """What decoding reads, in the compute dtype.

    Attributes:
      embedding: `[V, D]`.
      layers: one `Block` a layer.
      final_norm: shared by all exits.
      head: `[D, V]`, shared by all exits.
    """

    embedding: Float[Array, "V D"]
    layers: tuple[Any, ...]
    final_norm: RMSNorm
    head: Float[Array, "D V"]


def decoder_weights(model: Transformer) -> DecoderWeights:
    """Takes a model's stacked layers apart and casts everything to its compute dtype."""

    @jax.jit
    def take_apart(model):
        def cast(tree):
            return jax.tree.map(lambda w: w.astype(model.config.compute_dtype), tree)

        layers: list[Block] = [
            jax.tree.map(lambda w, layer=layer: w[layer], cast(model.layers))
            for layer in range(model.config.num_layers)
        ]
        return DecoderWeights(
            embedding=cast(model.embedding[...]),
            layers=tuple(layers),
            final_norm=cast(model.final_norm),
            head=cast(model.head_weight),
        )

    return take_apart(model)
