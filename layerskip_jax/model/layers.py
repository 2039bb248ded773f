"""One layer: norms, attention and MLP, as plain pytrees of parameters.

Modules hold `nnx.Param`s and static configuration, no state and no keys. Each parameter carries
`logical_axes`, one name a dimension, which `distributed` maps to the axes of a mesh. Parameters are
float32; they are cast where they are used. `decoding.weights` lays the same layer out for few rows.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from layerskip_jax.model.config import LayerKind, ModelConfig
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


class HeadsNorm(nnx.Module):
    """RMSNorm of queries or keys: of each head by one scale, or of all heads at once.

    Attributes:
      scale: `[h]`, or `[H, h]`.
    """

    def __init__(self, shape: tuple[int, ...], logical_axes: tuple[str, ...], eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(shape, jnp.float32), logical_axes=logical_axes)

    def __call__(self, x: Float[Array, "B S H h"]) -> Float[Array, "B S H h"]:
        """Returns the normed heads in the dtype of x."""
        scale = self.scale[...]
        flat = x.reshape(*x.shape[: x.ndim - scale.ndim], scale.size)
        return rms_norm(flat, scale.reshape(-1), self.eps).reshape(x.shape)


class Attention(nnx.Module):
    """Projections of grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig, key: PRNGKeyArray, product: Product = contract):
        self.product = product
        dim, heads, kv_heads = config.model_dim, config.num_heads, config.num_kv_heads
        h = config.head_dim
        self.has_bias, self.has_norm = config.qkv_bias, config.qk_norm != "none"
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
        if config.qk_norm == "head":
            self.q_norm = HeadsNorm((h,), ("head_dim",), config.norm_eps)
            self.k_norm = HeadsNorm((h,), ("head_dim",), config.norm_eps)
        elif config.qk_norm == "all":
            self.q_norm = HeadsNorm((heads, h), ("heads", "head_dim"), config.norm_eps)
            self.k_norm = HeadsNorm((kv_heads, h), kv_axes[1:], config.norm_eps)

    def project(
        self,
        x: Float[Array, "B S D"],
        cos: Float[Array, "B S h2"],
        sin: Float[Array, "B S h2"],
        *,
        rotary: bool = True,
    ) -> tuple[Float[Array, "B S H h"], Float[Array, "B S K h"], Float[Array, "B S K h"]]:
        """Returns queries and keys, normed and rotated where the model has that, and values."""
        q, k, v = (self.product(x, w[...].astype(x.dtype), 1) for w in (self.q, self.k, self.v))
        if self.has_bias:
            q = q + self.q_bias[...].astype(x.dtype)
            k = k + self.k_bias[...].astype(x.dtype)
            v = v + self.v_bias[...].astype(x.dtype)
        if self.has_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary:
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        return q, k, v

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TracedKind:
    """`LayerKind` of one layer among layers that differ: what is scanned over is no Python value.

    Numbers, since they stand beside parameters, which have gradients.

    Attributes:
      sees_all: 1 in a layer without the window, else 0; `[L]` before the scan. In a tree of
        shapes or shardings, its own.
      rotary: 1 in a layer with rotary positions, else 0; `[L]` before the scan.
      window: of those that have one, 0 where none does.
    """

    sees_all: Any
    rotary: Any
    window: int = dataclasses.field(metadata={"static": True})


def stacked_kinds(config: ModelConfig) -> LayerKind | TracedKind:
    """Returns the kinds of all layers as they are scanned: one, where all are alike."""
    kinds = config.layer_kinds
    if len(set(kinds)) == 1:
        return kinds[0]
    sees_all = [kind.window == 0 for kind in kinds]
    rotary = [kind.rotary for kind in kinds]
    return TracedKind(
        *(jnp.asarray(flags, jnp.float32) for flags in (sees_all, rotary)), config.sliding_window
    )


class Block(nnx.Module):
    """One decoder layer: x + attention(norm(x)), then x + mlp(norm(x)).

    With `norm_position="after"` x + norm(attention(x)), then x + norm(mlp(x)).
    """

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
        self.norm_after = config.layer_kinds[0].norm_after
        attention_key, mlp_key = jax.random.split(key)
        self.attention_norm = RMSNorm(config.model_dim, config.norm_eps)
        self.attention = Attention(config, attention_key, product)
        self.mlp_norm = RMSNorm(config.model_dim, config.norm_eps)
        self.mlp = MLP(config, mlp_key, product)

    def project(self, x: Float[Array, "B S D"], cos: Array, sin: Array, *, rotary: bool = True):
        """Returns q, k, v; a cache goes between this and `finish`."""
        read = x if self.norm_after else self.attention_norm(x)
        read = self.constrain(read, "batch", "sequence", "activation")
        return self.attention.project(read, cos, sin, rotary=rotary)

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
        if self.norm_after:
            attention = self.attention_norm(attention)
        middle = x + attention
        read = middle if self.norm_after else self.mlp_norm(middle)
        read = self.constrain(read, "batch", "sequence", "activation")
        mlp = self.constrain(self.mlp(read, self.constrain), *residual)
        if self.norm_after:
            mlp = self.mlp_norm(mlp)
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
        kind: LayerKind | TracedKind = LayerKind(),  # noqa: B008, which it does not change
    ) -> Float[Array, "B S D"]:
        """Runs the layer over whole packed windows."""
        if isinstance(kind, TracedKind):
            # Turned by no angle, queries and keys stay what they are.
            cos, sin = jnp.where(kind.rotary > 0, cos, 1), jnp.where(kind.rotary > 0, sin, 0)
        rotary = isinstance(kind, TracedKind) or kind.rotary
        q, k, v = self.project(x, cos, sin, rotary=rotary)
        q = self.constrain(q, "batch", "sequence", "heads", "head_dim")
        k = self.constrain(k, "batch", "key_sequence", "kv_heads", "head_dim")
        v = self.constrain(v, "batch", "key_sequence", "kv_heads", "head_dim")
        attended = self._attend(kind, q, k, v, segment_ids)
        attended = self.constrain(attended, "batch", "sequence", "heads", "head_dim")
        return self.finish(x, attended, residual_scale)

    def _attend(self, kind: LayerKind | TracedKind, *inputs: Array) -> Float[Array, "B S H h"]:
        if isinstance(kind, LayerKind):
            return dataclasses.replace(self.attend, window=kind.window)(*inputs)
        if not kind.window:
            return self.attend(*inputs)
        windowed = dataclasses.replace(self.attend, window=kind.window)
        return jax.lax.cond(kind.sees_all > 0, self.attend, windowed, *inputs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KindedBlock:
    """A block that knows its kind, called as a block; or all of them, stacked for a scan.

    Attributes:
      block: a `Block`.
      kind: a `LayerKind` or a `TracedKind`.
    """

    block: Any
    kind: Any

    def __call__(self, x, cos, sin, segment_ids, residual_scale=None):
        """Runs the block; arguments as there."""
        return self.block(x, cos, sin, segment_ids, residual_scale, self.kind)
