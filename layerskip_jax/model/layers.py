"""One layer: norms, attention and MLP, as plain pytrees of parameters.

Modules hold `nnx.Param`s and static configuration, no state and no keys. Each parameter carries
`logical_axes`, one name a dimension, which `distributed` maps to the axes of a mesh. Parameters are
float32; they are cast where they are used. `decoding.weights` lays the same layer out for few rows.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from layerskip_jax.model.config import ModelConfig
from layerskip_jax.model.rope import apply_rope
from layerskip_jax.ops.attention import PLAIN_ATTENTION, PackedAttention
from layerskip_jax.ops.elementwise import rms_norm, swiglu
from layerskip_jax.ops.linear import Product, contract


def no_constraint(x: Array, *logical_axes: str) -> Array:
    """Returns x, leaving its sharding to the compiler."""
    return x


def matrix(key, shape, logical_axes, fan_in, scale=1.0, padding=None):
    """A truncated-normal parameter of standard deviation scale / sqrt(fan_in).

    It has as many zeros more at the end of each dimension as `padding` says.
    """
    init = jax.nn.initializers.truncated_normal(stddev=scale * fan_in**-0.5)
    value = init(key, shape, jnp.float32)
    if padding is not None:
        value = jnp.pad(value, [(0, count) for count in padding])
    return nnx.Param(value, logical_axes=logical_axes)


def _bias(shape, logical_axes):
    return nnx.Param(jnp.zeros(shape, jnp.float32), logical_axes=logical_axes)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, computed in float32."""

    def __init__(self, dim: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(dim, jnp.float32), logical_axes=("norm",))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Returns the normed x in its own dtype."""
        return rms_norm(x, self.scale[...], self.eps)


class Attention(nnx.Module):
    """Projections of grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig, key: PRNGKeyArray, product: Product = contract):
        self.product = product
        dim, heads, kv_heads = config.model_dim, config.num_heads, config.num_kv_heads
        h = config.head_dim
        self.has_bias = config.qkv_bias
        kq, kk, kv, ko = jax.random.split(key, 4)
        kv_axes = ("embed", "kv_heads", "head_dim")
        self.q = matrix(kq, (dim, heads, h), ("embed", "heads", "head_dim"), dim)
        self.k = matrix(kk, (dim, kv_heads, h), kv_axes, dim)
        self.v = matrix(kv, (dim, kv_heads, h), kv_axes, dim)
        # Residual branches start smaller with depth, so that their sum keeps its variance.
        self.o = matrix(
            ko,
            (heads, h, dim),
            ("heads", "head_dim", "embed"),
            heads * h,
            (2 * config.num_layers) ** -0.5,
        )
        if config.qkv_bias:
            self.q_bias = _bias((heads, h), ("heads", "head_dim"))
            self.k_bias = _bias((kv_heads, h), kv_axes[1:])
            self.v_bias = _bias((kv_heads, h), kv_axes[1:])

    def project(
        self,
        x: Float[Array, "B S D"],
        cos: Float[Array, "B S h2"],
        sin: Float[Array, "B S h2"],
    ) -> tuple[Float[Array, "B S H h"], Float[Array, "B S K h"], Float[Array, "B S K h"]]:
        """Returns rotated queries, rotated keys, and values."""
        q, k, v = (self.product(x, w[...].astype(x.dtype), 1) for w in (self.q, self.k, self.v))
        if self.has_bias:
            q = q + self.q_bias[...].astype(x.dtype)
            k = k + self.k_bias[...].astype(x.dtype)
            v = v + self.v_bias[...].astype(x.dtype)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v

    def output(self, attended: Float[Array, "B S H h"]) -> Float[Array, "B S D"]:
        """Projects the attended values back to the residual stream."""
        return self.product(attended, self.o[...].astype(attended.dtype), 2)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, key: PRNGKeyArray, product: Product = contract):
        self.product = product
        dim, hidden = config.model_dim, config.ffn_dim
        kg, ku, kd = jax.random.split(key, 3)
        self.gate = matrix(kg, (dim, hidden), ("embed", "mlp"), dim)
        self.up = matrix(ku, (dim, hidden), ("embed", "mlp"), dim)
        scale = (2 * config.num_layers) ** -0.5
        self.down = matrix(kd, (hidden, dim), ("mlp", "embed"), hidden, scale)

    def __call__(
        self, x: Float[Array, "B S D"], constrain: Callable[..., Array] = no_constraint
    ) -> Float[Array, "B S D"]:
        """Returns the branch's contribution to the residual stream."""
        gate, up = (self.product(x, w[...].astype(x.dtype), 1) for w in (self.gate, self.up))
        hidden = swiglu(gate, up)
        # Left to itself the compiler may gather the weights over `tensor` instead.
        hidden = constrain(hidden, "batch", "sequence", "mlp")
        return self.product(hidden, self.down[...].astype(x.dtype), 1)


class Block(nnx.Module):
    """One decoder layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        config: ModelConfig,
        key: PRNGKeyArray,
        constrain: Callable[..., Array] = no_constraint,
        attend: PackedAttention = PLAIN_ATTENTION,
        product: Product = contract,
    ):
        self.attend = attend
        self.constrain = constrain
        attention_key, mlp_key = jax.random.split(key)
        self.attention_norm = RMSNorm(config.model_dim, config.norm_eps)
        self.attention = Attention(config, attention_key, product)
        self.mlp_norm = RMSNorm(config.model_dim, config.norm_eps)
        self.mlp = MLP(config, mlp_key, product)

    def project(self, x: Float[Array, "B S D"], cos: Array, sin: Array):
        """Returns q, k, v of the normed input; a cache goes between this and `finish`."""
        normed = self.constrain(self.attention_norm(x), "batch", "sequence", "activation")
        return self.attention.project(normed, cos, sin)

    def finish(
        self,
        x: Float[Array, "B S D"],
        attended: Float[Array, "B S H h"],
        residual_scale: Float[Array, ""] | None = None,
    ) -> Float[Array, "B S D"]:
        """Adds both residual branches, given the attended values of the first.

        `residual_scale` multiplies what the whole layer adds; None stands for 1.
        """
        residual = ("batch", "residual", "activation")
        attention = self.constrain(self.attention.output(attended), *residual)
        middle = x + attention
        normed = self.constrain(self.mlp_norm(middle), "batch", "sequence", "activation")
        mlp = self.constrain(self.mlp(normed, self.constrain), *residual)
        if residual_scale is None:
            return middle + mlp
        # A constant of the schedule. Asking for its gradient would have the backward pass
        # compute both branches' outputs again, which nothing else there needs.
        scale = jax.lax.stop_gradient(residual_scale).astype(x.dtype)
        return x + scale * (attention + mlp)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        cos: Array,
        sin: Array,
        segment_ids: Int[Array, "B S"],
        residual_scale: Float[Array, ""] | None = None,
    ) -> Float[Array, "B S D"]:
        """Runs the layer over whole packed windows."""
        q, k, v = self.project(x, cos, sin)
        q = self.constrain(q, "batch", "sequence", "heads", "head_dim")
        k = self.constrain(k, "batch", "key_sequence", "kv_heads", "head_dim")
        v = self.constrain(v, "batch", "key_sequence", "kv_heads", "head_dim")
        attended = self.attend(q, k, v, segment_ids)
        attended = self.constrain(attended, "batch", "sequence", "heads", "head_dim")
        return self.finish(x, attended, residual_scale)
