"""Exit adapters and the learned exit, as parameters of a model (docs/method.md, sections 6 and 7).

At exit E the head reads z + (z A) B, z = norm_E(x_E). B starts at 0 and norm_E as the final norm,
so that a model with fresh adapters is the model as it was.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from layerskip_jax.model.exits import ExitsConfig
from layerskip_jax.model.layers import matrix
from layerskip_jax.ops.elementwise import rms_norm


class Exits(nnx.Module):
    """The adapters, stacked over their exits, and the one classifier of all exits.

    No axis is split over devices: all of it is small.

    Attributes:
      scale: of each exit's norm, `[N, D]`.
      down: A, `[N, D, r]`.
      up: B, `[N, r, D]`.
      weight: w of the classifier, `[D]`.
      score_bias: b of the classifier, `[1]`.
    """

    def __init__(self, config: ExitsConfig, dim: int, eps: float, key: PRNGKeyArray):
        """Draws A; B and the classifier start at 0."""
        self.config, self.eps = config, eps
        count, rank = len(config.adapters), config.rank

        def filled(value, *shape):
            return nnx.Param(
                jnp.full(shape, value, jnp.float32), logical_axes=("norm",) * len(shape)
            )

        if count:
            self.scale = filled(1.0, count, dim)
            self.down = matrix(key, (count, dim, rank), ("norm",) * 3, dim)
            self.up = filled(0.0, count, rank, dim)
        if config.learned:
            self.weight = filled(0.0, dim)
            self.score_bias = filled(0.0, 1)

    def adapt(self, x: Float[Array, "... D"], index: int) -> Float[Array, "... D"]:
        """Returns what the head reads of states at the exit `config.adapters[index]`."""
        return adapted(x, self.scale[index], self.down[index], self.up[index], self.eps)

    def score(self, z: Float[Array, "... D"]) -> Float[Array, "..."]:
        """Returns the probability that an exit's token is right; no gradient goes to z."""
        z = jax.lax.stop_gradient(z).astype(jnp.float32)
        return jax.nn.sigmoid(z @ self.weight[...] + self.score_bias[0])


def adapted(
    x: Float[Array, "... D"],
    scale: Float[Array, "D"],
    down: Float[Array, "D r"],
    up: Float[Array, "r D"],
    eps: float,
) -> Float[Array, "... D"]:
    """Returns z + (z A) B of z = norm(x), in the dtype of x."""
    z = rms_norm(x, scale, eps)
    return z + (z @ down.astype(z.dtype)) @ up.astype(z.dtype)
