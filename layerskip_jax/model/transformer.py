"""The decoder: Llama family, layers stacked on a leading axis and scanned.

Modules are plain pytrees: they hold `nnx.Param`s and static configuration, no state and no
keys. Each parameter carries `logical_axes`, one name a dimension, which `distributed` maps to
the axes of a mesh. Parameters are float32; they are cast where they are used.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from layerskip_jax.layer_dropout import Execution, KeepPlan
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.model.rope import apply_rope, rope_tables
from layerskip_jax.ops.attention import PLAIN_ATTENTION, PackedAttention
from layerskip_jax.ops.elementwise import rms_norm, swiglu
from layerskip_jax.ops.exit_buffer import keep_exit
from layerskip_jax.ops.linear import Product, contract
from layerskip_jax.ops.remat import LAYER_INPUT, rematerialised, run_block

# Cosines, sines and segment ids: what a block reads of each row beside the residual stream.
Rows = tuple[Float[Array, "B S h2"], Float[Array, "B S h2"], Int[Array, "B S"]]


def no_constraint(x: Array, *logical_axes: str) -> Array:
    """Returns x, leaving its sharding to the compiler."""
    return x


def _matrix(key, shape, logical_axes, fan_in, scale=1.0, padding=None):
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
        self.q = _matrix(kq, (dim, heads, h), ("embed", "heads", "head_dim"), dim)
        self.k = _matrix(kk, (dim, kv_heads, h), kv_axes, dim)
        self.v = _matrix(kv, (dim, kv_heads, h), kv_axes, dim)
        # Residual branches start smaller with depth, so that their sum keeps its variance.
        self.o = _matrix(
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
        self.gate = _matrix(kg, (dim, hidden), ("embed", "mlp"), dim)
        self.up = _matrix(ku, (dim, hidden), ("embed", "mlp"), dim)
        scale = (2 * config.num_layers) ** -0.5
        self.down = _matrix(kd, (hidden, dim), ("mlp", "embed"), hidden, scale)

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


def _run_layer(execution, remat, block, x, rows, plan):
    x = checkpoint_name(x, LAYER_INPUT)
    if plan is None:
        return rematerialised(run_block, remat)(block, x, rows, None)
    return execution.run(block, x, rows, plan, remat)


class Transformer(nnx.Module):
    """Embedding, scanned blocks, final norm, and the one head that every exit shares."""

    def __init__(
        self,
        config: ModelConfig,
        key: PRNGKeyArray,
        constrain: Callable[..., Array] = no_constraint,
        attend: PackedAttention = PLAIN_ATTENTION,
        product: Product = contract,
    ):
        """Draws the parameters.

        Args:
          config: shapes; `vocab_size` must be known.
          key: for the parameters.
          constrain: `constrain(x, *logical_axes)` pins the sharding of an activation.
          attend: attention over packed windows.
          product: activations times weights (see `ops.linear`).
        """
        self.config = config
        self.constrain = constrain
        embed_key, layer_key, head_key = jax.random.split(key, 3)
        shape = (config.vocab_size, config.model_dim)
        # Zeros beside what is drawn, so that padding changes nothing else.
        padding = (config.vocab_rows - config.vocab_size, 0)
        self.embedding = _matrix(
            embed_key, shape, ("vocab", "embed"), config.model_dim, padding=padding
        )
        layer_keys = jax.random.split(layer_key, config.num_layers)
        self.layers = jax.vmap(lambda k: Block(config, k, constrain, attend, product))(layer_keys)
        self.final_norm = RMSNorm(config.model_dim, config.norm_eps)
        if not config.tie_embeddings:
            self.head = _matrix(
                head_key, shape[::-1], ("embed", "vocab"), config.model_dim, padding=padding[::-1]
            )

    @property
    def head_weight(self) -> Float[Array, "D V"]:
        """The shared head, float32; columns beyond the vocabulary are padding."""
        return self.embedding[...].T if self.config.tie_embeddings else self.head[...]

    def embed(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Returns the states before the first layer."""
        table = self.embedding[...].astype(self.config.compute_dtype)
        # Gathered whole along D, as any layer's weights are: looking tokens up in rows cut
        # along D would leave each device with a piece of every token.
        x = self.constrain(table, "vocab", "activation")[tokens]
        return self.constrain(x, "batch", "residual", "activation")

    def rows(self, positions: Int[Array, "B S"], segment_ids: Int[Array, "B S"]) -> Rows:
        """Returns what the blocks read of each row beside the residual stream."""
        cos, sin = rope_tables(positions, self.config)
        return cos, sin, segment_ids

    def scan_layers(
        self,
        x: Float[Array, "B S D"],
        rows: Rows,
        visit: Callable[[Any, Any, Float[Array, "B S D"]], tuple[Any, Any]],
        carry: Any,
        per_layer: Any = None,
        *,
        plan: KeepPlan | None = None,
        execution: Execution | None = None,
    ) -> tuple[Any, Any]:
        """Runs all layers, showing the output of each to `visit`.

        Args:
          x: states before the first layer.
          rows: what `rows` returned.
          visit: `visit(carry, item, x_{l+1}) -> (carry, output)`, called after each layer,
            outside of what is rematerialised.
          carry: its first carry.
          per_layer: pytree with leading axis L; `visit` gets layer l's item.
          plan: the rows each layer runs on; None runs all.
          execution: how the plan is carried out.

        Returns:
          The last carry, and the outputs stacked over the layers.
        """
        remat = self.config.remat
        if remat == "offload":
            # Without a remat of its own inside, a switch over capacities would hand all residuals
            # of a layer from its forward to its backward pass. What both compute again is left out.
            run = functools.partial(_run_layer, execution, "none" if plan is None else "full")
            run = rematerialised(run, "offload")
        else:
            run = functools.partial(_run_layer, execution, remat)

        def layer(state, inputs):
            x, carry = state
            block, layer_plan, item = inputs
            x = run(block, x, rows, layer_plan)
            x = self.constrain(x, "batch", "residual", "activation")
            carry, output = visit(carry, item, x)
            return (x, carry), output

        (_, carry), outputs = jax.lax.scan(layer, (x, carry), (self.layers, plan, per_layer))
        return carry, outputs

    def exit_states(
        self,
        x: Float[Array, "B S D"],
        rows: Rows,
        slot_of_layer: Int[Array, "L"],
        slots: int,
        *,
        positions: Int[Array, "G m"] | None = None,
        plan: KeepPlan | None = None,
        execution: Execution | None = None,
    ) -> tuple[Float[Array, "slots B M D"], Float[Array, "B S D"]]:
        """Runs all layers and returns the outputs of the early exits, by slot, and of the last.

        Args:
          x: states before the first layer.
          rows: what `rows` returned.
          slot_of_layer: where each layer's output is kept; `slots` for nowhere.
          slots: number of early exits kept, A - 1.
          positions: the positions that are kept of them; None keeps all.
          plan: the rows each layer runs on; None runs all.
          execution: how the plan is carried out.
        """
        kept = x.shape[1] if positions is None else positions.size
        buffer = jnp.zeros((slots, x.shape[0], kept, x.shape[2]), x.dtype)
        buffer = self.constrain(buffer, "exits", "batch", "residual", "activation")

        def visit(carry, slot, x):
            _, buffer = carry
            if slots:
                x, buffer = keep_exit(x, buffer, slot, positions)
            return (x, buffer), None

        (last, buffer), _ = self.scan_layers(
            x, rows, visit, (x, buffer), slot_of_layer, plan=plan, execution=execution
        )
        return buffer, last

    def logits(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
    ) -> Float[Array, "B S V"]:
        """Returns the float32 logits of the last exit; for tests and small inputs."""

        def last(_, __, x):
            return x, None

        x = self.embed(tokens)
        x, _ = self.scan_layers(x, self.rows(positions, segment_ids), last, x)
        head = self.head_weight[:, : self.config.vocab_size].astype(x.dtype)
        return jnp.einsum(
            "bsd,dv->bsv", self.final_norm(x), head, preferred_element_type=jnp.float32
        )
