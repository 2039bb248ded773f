"""The decoder: Llama family, layers stacked on a leading axis and scanned."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from layerskip_jax.layer_dropout import Execution, KeepPlan
from layerskip_jax.model.adapters import Exits
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.model.layers import (
    Block,
    KindedBlock,
    RMSNorm,
    matrix,
    no_constraint,
    stacked_kinds,
)
from layerskip_jax.model.rope import rope_tables
from layerskip_jax.ops.attention import PLAIN_ATTENTION, PackedAttention
from layerskip_jax.ops.exit_buffer import keep_exit
from layerskip_jax.ops.linear import Product, contract
from layerskip_jax.ops.remat import LAYER_INPUT, rematerialised, run_block

# Cosines, sines and segment ids: what a block reads of each row beside the residual stream.
RowInputs = tuple[Float[Array, "B S h2"], Float[Array, "B S h2"], Int[Array, "B S"]]


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
        self.embedding = matrix(
            embed_key, shape, ("vocab", "embed"), config.model_dim, padding=padding
        )
        layer_keys = jax.random.split(layer_key, config.num_layers)
        self.layers = jax.vmap(lambda k: Block(config, k, constrain, attend, product))(layer_keys)
        self.final_norm = RMSNorm(config.model_dim, config.norm_eps)
        if not config.tie_embeddings:
            self.head = matrix(
                head_key, shape[::-1], ("embed", "vocab"), config.model_dim, padding=padding[::-1]
            )
        if config.exits:
            exits_key = jax.random.fold_in(key, 3)
            self.exits = Exits(config.exits, config.model_dim, config.norm_eps, exits_key)

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

    @property
    def blocks(self) -> KindedBlock:
        """The stacked layers, of which one is called as `block(x, *row_inputs)`."""
        return KindedBlock(self.layers, stacked_kinds(self.config))

    def row_inputs(self, positions: Int[Array, "B S"], segment_ids: Int[Array, "B S"]) -> RowInputs:
        """Returns what the blocks read of each row beside the residual stream."""
        cos, sin = rope_tables(positions, self.config)
        return cos, sin, segment_ids

    def scan_layers(
        self,
        x: Float[Array, "B S D"],
        rows: RowInputs,
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
          rows: what `row_inputs` returned.
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

        (_, carry), outputs = jax.lax.scan(layer, (x, carry), (self.blocks, plan, per_layer))
        return carry, outputs

    def exit_states(
        self,
        x: Float[Array, "B S D"],
        rows: RowInputs,
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
          rows: what `row_inputs` returned.
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
        x, _ = self.scan_layers(x, self.row_inputs(positions, segment_ids), last, x)
        head = self.head_weight[:, : self.config.vocab_size].astype(x.dtype)
        return jnp.einsum(
            "bsd,dv->bsv", self.final_norm(x), head, preferred_element_type=jnp.float32
        )
