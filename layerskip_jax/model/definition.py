"""Parameters as a nested dict of arrays, and the model that is made of them."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import PRNGKeyArray

from layerskip_jax.model.config import ModelConfig
from layerskip_jax.model.layers import no_constraint
from layerskip_jax.model.transformer import Transformer
from layerskip_jax.ops.attention import PackedAttention
from layerskip_jax.ops.linear import Product, contract

Parameters = dict[str, Any]


class ModelDefinition:
    """The structure of a model apart from its parameters.

    Attributes:
      config: the shapes.
      constrain: `constrain(x, *logical_axes)` pins the sharding of an activation.
      attend: attention over packed windows; plain operations unless given.
      product: activations times weights.
      shapes: nested dict of `ShapeDtypeStruct`s; the stacked layers have a leading axis L.
      logical_axes: the same nest, with the names of each parameter's dimensions.
    """

    def __init__(
        self,
        config: ModelConfig,
        constrain: Callable = no_constraint,
        attend: PackedAttention | None = None,
        product: Product = contract,
    ):
        self.config = config
        self.constrain = constrain
        self.attend = attend or PackedAttention(packing_mask=config.packing_mask)
        self.product = product
        self._make = lambda key: Transformer(config, key, constrain, self.attend, product)
        self._graph, state = nnx.split(jax.eval_shape(self._make, jax.random.key(0)))
        self.shapes: Parameters = nnx.to_pure_dict(state)
        self.logical_axes = jax.tree_util.tree_map_with_path(
            _logical_axes, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
        )
        self.logical_axes = nnx.to_pure_dict(self.logical_axes)

    @property
    def num_parameters(self) -> int:
        """The number of scalars in the parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.shapes))

    def init(self, key: PRNGKeyArray) -> Parameters:
        """Draws the parameters; under `jit`, each device makes only its own shard."""
        return nnx.to_pure_dict(nnx.state(self._make(key)))

    def model(self, parameters: Parameters) -> Transformer:
        """Returns the model that computes with `parameters`; cheap, meant for inside `jit`."""
        return nnx.merge(self._graph, nnx.State(parameters))


def _logical_axes(path, variable):
    names = variable.get_metadata("logical_axes")
    return ("layers", *names) if path[0].key == "layers" else names
