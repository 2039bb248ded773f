"""Weights laid out for decoding: layers taken apart and their matrices joined, once, at load.

Slicing layer l out of the stacked arrays inside the loop would copy every weight for every
token. And one wide product reads the memory faster than three narrow ones.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from layerskip_jax.model.config import LayerKind
from layerskip_jax.model.layers import HeadsNorm, RMSNorm
from layerskip_jax.model.rope import apply_rope
from layerskip_jax.model.transformer import Transformer
from layerskip_jax.ops.elementwise import swiglu
from layerskip_jax.schema import UserError, require

# Outputs in a panel, the largest matrix that lies in panels, and the most rows that are multiplied
# by panels as they lie; for more rows the matrix is put together again.
PANEL, MOST_PANEL_BYTES, MOST_PANEL_ROWS = 32, 2 << 20, 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Matrix:
    """A matrix that multiplies rows, whole or in panels (see `pays_for_panels`).

    Attributes:
      values: `[O, I]`, or N panels of W outputs, `[N, I, W]`, the last one padded with zeros; in a
        tree of shapes or shardings, its own.
      outputs: O where the matrix lies in panels, else None.
    """

    values: Any
    outputs: int | None = dataclasses.field(default=None, metadata={"static": True})

    def __call__(
        self, x: Float[Array, "*batch I"], dtype: DTypeLike | None = None
    ) -> Float[Array, "*batch O"]:
        """Multiplies the rows of x, summed and returned in `dtype`."""
        rows = x.reshape(-1, x.shape[-1])
        product = functools.partial(jax.lax.dot_general, preferred_element_type=dtype)
        if self.outputs is None:
            y = product(rows, self.values, (((1,), (1,)), ((), ())))
        elif rows.shape[0] > MOST_PANEL_ROWS:
            y = product(rows, self._together(), (((1,), (0,)), ((), ())))
        else:
            for_each = jnp.broadcast_to(rows, (self.values.shape[0], *rows.shape))
            y = product(for_each, self.values, (((2,), (1,)), ((0,), (0,))))
            y = y.swapaxes(0, 1).reshape(rows.shape[0], -1)[:, : self.outputs]
        return y.reshape(*x.shape[:-1], -1)

    def of_outputs(self, index: Int[Array, "N"]) -> "Matrix":
        """Returns the part that makes these outputs only, in panels if the whole is."""
        if self.outputs is None:
            return Matrix(self.values[index])
        return in_panels(self._together()[:, index])

    def _together(self) -> Float[Array, "I O"]:
        """Returns the matrix that lies in panels."""
        panels = self.values.swapaxes(0, 1)
        return panels.reshape(panels.shape[0], -1)[:, : self.outputs]


def in_panels(matrix: Float[Array, "I O"]) -> Matrix:
    """Returns a matrix in panels of `PANEL` outputs, whose weights lie together input by input."""
    inputs, outputs = matrix.shape
    padded = jnp.pad(matrix, ((0, 0), (0, -outputs % PANEL)))
    return Matrix(padded.reshape(inputs, -1, PANEL).swapaxes(0, 1), outputs)


@functools.cache
def pays_for_panels(platform: str) -> bool:
    """Returns whether small matrices had best lie in panels, for products with few rows.

    Verifying takes a few rows through every matrix. On a CPU without AVX-512, XLA multiplies two
    rows and more by 16 or 32 outputs at a time and goes down all inputs with them, so that in a
    whole matrix every read is a jump. In panels it reads straight on: passes of two to seven tokens
    took 0.3 to 0.5 of the time, and of one 1.06 (two cores, AVX2, `benchmarks/decode.py
    --setting=rows`); matrices of more than `MOST_PANEL_BYTES` gained nothing. CPUs with AVX-512
    were not measured, and accelerators do not care. A rule, not a measurement at each start: the
    order of the sums, and so the tokens at near ties, stays the same from run to run.
    """
    if platform != "cpu" or not _CPU_FACTS.exists():
        return False
    facts = _CPU_FACTS.read_text(errors="replace")
    return "avx2" in facts and "avx512f" not in facts


_CPU_FACTS = Path("/proc/cpuinfo")


class DecoderLayer(NamedTuple):
    """One layer; K key/value heads, each with its G = H / K queries.

    Attributes:
      attention_norm: before the attention, or after it.
      qkv: for each key/value head its G queries, its key and its value, so that splitting the
        key/value heads over devices splits all of them.
      qkv_bias: in the same order; None where the model has none.
      output: from the heads, in the same order, back to the residual stream.
      mlp_norm: before the MLP, or after it.
      gate_up: a gate and an up projection for each hidden unit.
      down: back to the residual stream.
      kind: its window, whether it has rotary positions, and where its norms are.
      q_norm: of queries; None where the model has none.
      k_norm: of keys.
    """

    attention_norm: RMSNorm
    qkv: Matrix
    qkv_bias: Float[Array, "O"] | None
    output: Matrix
    mlp_norm: RMSNorm
    gate_up: Matrix
    down: Matrix
    kind: LayerKind = LayerKind()
    q_norm: HeadsNorm | None = None
    k_norm: HeadsNorm | None = None

    def project(
        self,
        x: Float[Array, "B S D"],
        cos: Float[Array, "B S h2"],
        sin: Float[Array, "B S h2"],
        kv_heads: int,
    ) -> tuple[Float[Array, "B K G S h"], Float[Array, "B K S h"], Float[Array, "B K S h"]]:
        """Returns queries and keys, normed and rotated where the model has that, and values.

        Heads come before positions.
        """
        batch, length = x.shape[:2]
        size = 2 * cos.shape[-1]
        y = self.qkv(x if self.kind.norm_after else self.attention_norm(x))
        if self.qkv_bias is not None:
            y = y + self.qkv_bias
        y = y.reshape(batch, length, kv_heads, -1, size)
        queries_and_key = y[..., :-1, :]
        if self.q_norm is not None:
            queries_and_key = self._normed(queries_and_key)
        if self.kind.rotary:
            flat = queries_and_key.reshape(batch, length, -1, size)
            queries_and_key = apply_rope(flat, cos, sin).reshape(queries_and_key.shape)
        q = queries_and_key[..., :-1, :].transpose(0, 2, 3, 1, 4)
        return q, queries_and_key[..., -1, :].swapaxes(1, 2), y[..., -1, :].swapaxes(1, 2)

    def _normed(self, heads: Float[Array, "B S K G1 h"]) -> Float[Array, "B S K G1 h"]:
        """Returns the queries, if there are any, and the key of each key/value head, normed."""
        queries, key = heads[..., :-1, :], heads[..., -1, :]
        if queries.size:
            flat = queries.reshape(*heads.shape[:2], -1, heads.shape[-1])
            queries = self.q_norm(flat).reshape(queries.shape)
        return jnp.concatenate([queries, self.k_norm(key)[..., None, :]], axis=-2)

    def without_queries(self, kv_heads: int, head_dim: int) -> "DecoderLayer":
        """Returns a layer that projects keys and values only, given K and h."""
        outputs = np.arange(self.qkv.outputs or self.qkv.values.shape[0])
        keys_and_values = outputs.reshape(kv_heads, -1, head_dim)[:, -2:].reshape(-1)
        bias = self.qkv_bias
        return self._replace(
            qkv=self.qkv.of_outputs(jnp.asarray(keys_and_values)),
            qkv_bias=None if bias is None else bias[keys_and_values],
        )

    def finish(
        self, x: Float[Array, "B S D"], attended: Float[Array, "B K G S h"]
    ) -> Float[Array, "B S D"]:
        """Adds both residual branches, given the attended values of the first."""
        heads = attended.transpose(0, 3, 1, 2, 4).reshape(*x.shape[:2], -1)
        attention = self.output(heads)
        after = self.kind.norm_after
        x = x + (self.attention_norm(attention) if after else attention)
        hidden = self.gate_up(x if after else self.mlp_norm(x))
        hidden = hidden.reshape(*x.shape[:2], -1, 2)
        mlp = self.down(swiglu(hidden[..., 0], hidden[..., 1]))
        return x + (self.mlp_norm(mlp) if after else mlp)


class DraftHead(NamedTuple):
    """A head over part of the vocabulary, for drafting only.

    Attributes:
      tokens: the ids it can draft, ascending.
      matrix: the part of the head for them.
    """

    tokens: Int[Array, "N"]
    matrix: Matrix


class ExitAdapter(NamedTuple):
    """What one exit puts before the shared head; z = norm(x), then z + (z A) B.

    Attributes:
      norm: its own, in place of the final norm.
      down: A, `[r, D]` as it multiplies rows.
      up: B, `[D, r]`.
    """

    norm: RMSNorm
    down: Matrix
    up: Matrix

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Returns what the head reads."""
        z = self.norm(x)
        return z + self.up(self.down(z))


class ExitClassifier(NamedTuple):
    """Whether an exit's token is right: sigmoid(w z + b), one w and b for all exits (BERxiT).

    Attributes:
      weight: w, in float32.
      bias: b, in float32.
    """

    weight: Float[Array, "D"]
    bias: Float[Array, ""]

    def __call__(self, z: Float[Array, "B S D"]) -> Float[Array, "B S"]:
        """Returns the probability that the exit is right, of states as the head reads them."""
        return jax.nn.sigmoid(z.astype(jnp.float32) @ self.weight + self.bias)


class DecoderWeights(NamedTuple):
    """What decoding reads; matrices in the compute dtype, scales of norms in float32.

    Attributes:
      embedding: `[V, D]`.
      layers: one `DecoderLayer` a layer.
      final_norm: shared by all exits.
      head: to V logits, shared by all exits; None where the embedding serves as it is.
      draft_head: None drafts with the whole head.
      padding: added to the logits, -inf for the rows that `place_weights` padded the vocabulary
        with; None where there are none.
      adapters: by E, of the exits that have one.
      classifier: None where none was trained.
    """

    embedding: Float[Array, "V D"]
    layers: tuple[DecoderLayer, ...]
    final_norm: RMSNorm
    head: Matrix | None
    draft_head: DraftHead | None = None
    padding: Float[Array, "V"] | None = None
    adapters: dict[int, ExitAdapter] | None = None
    classifier: ExitClassifier | None = None

    @property
    def any_head(self) -> Matrix:
        """The head, whichever array it is."""
        return Matrix(self.embedding) if self.head is None else self.head

    def before_head(self, x: Float[Array, "B S D"], exit_layer: int) -> Float[Array, "B S D"]:
        """Returns what the head reads of states after the first E layers."""
        adapter = (self.adapters or {}).get(exit_layer)
        return self.final_norm(x) if adapter is None else adapter(x)


def decoder_weights(model: Transformer, *, panels: bool = False) -> DecoderWeights:
    """Takes a model's stacked layers apart, joins their matrices and casts to its dtype.

    Args:
      model: its parameters.
      panels: whether matrices of up to `MOST_PANEL_BYTES` lie in panels (see `pays_for_panels`). A
        head that does is kept beside the embedding even where it is the embedding, which lies by
        tokens.

    Raises:
      UserError: a parameter holds a number that is not finite in the model's dtype.
    """
    weights, finite = _laid_out(model, panels=panels)
    for name, of_layers in jax.device_get(finite).items():
        if not of_layers.all():
            which = f" of layer {int(np.argmin(of_layers))}" if of_layers.ndim else ""
            raise UserError(
                f"the parameter {name}{which} holds a number that is not finite in "
                f"{model.config.dtype}, so no token or loss of this model means anything; take "
                "another checkpoint (--step), or weights that are whole"
            )
    return weights


def _finite(model: Transformer) -> dict[str, Bool[Array, "..."]]:
    """Returns by parameter whether all its numbers are finite in the model's dtype.

    One answer for each layer of a stacked parameter.
    """

    def of(leaf, stacked):
        finite = jnp.isfinite(leaf.astype(model.config.compute_dtype))
        return finite.all(axis=tuple(range(1, leaf.ndim))) if stacked else finite.all()

    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        found[name] = of(leaf, stacked=name.startswith("layers."))
    return found


@functools.partial(jax.jit, static_argnames="panels")
def _laid_out(
    model: Transformer, *, panels: bool
) -> tuple[DecoderWeights, dict[str, Bool[Array, "..."]]]:
    """Returns the weights, and what `_finite` says of the parameters."""
    config = model.config
    dtype = config.compute_dtype
    queries = config.num_heads // config.num_kv_heads

    def matrix(x, inputs):
        x = x.reshape(inputs, -1).astype(dtype)
        return in_panels(x) if panels and x.nbytes <= MOST_PANEL_BYTES else Matrix(x.T)

    def layer(index: int) -> DecoderLayer:
        block = jax.tree.map(lambda stacked: stacked[index], model.layers)
        q, k, v, o = (getattr(block.attention, name)[...] for name in "qkvo")
        split = (config.num_kv_heads, queries, config.head_dim)
        joined = [q.reshape(config.model_dim, *split), k[:, :, None], v[:, :, None]]

        def bias(attention):
            q, k, v = (getattr(attention, f"{name}_bias")[...] for name in "qkv")
            q = q.reshape(config.num_kv_heads, queries, config.head_dim)
            return jnp.concatenate([q, k[:, None], v[:, None]], axis=1).reshape(-1).astype(dtype)

        return DecoderLayer(
            attention_norm=block.attention_norm,
            qkv=matrix(jnp.concatenate(joined, axis=2), config.model_dim),
            qkv_bias=bias(block.attention) if config.qkv_bias else None,
            output=matrix(o, config.num_heads * config.head_dim),
            mlp_norm=block.mlp_norm,
            gate_up=matrix(
                jnp.stack([block.mlp.gate[...], block.mlp.up[...]], -1), config.model_dim
            ),
            down=matrix(block.mlp.down[...], config.ffn_dim),
            kind=config.layer_kinds[index],
            q_norm=block.attention.q_norm if block.attention.has_norm else None,
            k_norm=block.attention.k_norm if block.attention.has_norm else None,
        )

    head = matrix(model.head_weight[:, : config.vocab_size], config.model_dim)
    shared = config.tie_embeddings and head.outputs is None
    weights = DecoderWeights(
        embedding=model.embedding[: config.vocab_size].astype(dtype),
        layers=tuple(map(layer, range(config.num_layers))),
        final_norm=model.final_norm,
        head=None if shared else head,
        adapters=_adapters(model, matrix),
        classifier=ExitClassifier(model.exits.weight[...], model.exits.score_bias[0])
        if config.exits.learned
        else None,
    )
    return weights, _finite(model)


def _adapters(model: Transformer, matrix) -> dict[int, ExitAdapter] | None:
    """Returns the exit adapters by E, `matrix` laying theirs out as it does the layers'."""
    config = model.config.exits
    if not config.adapters:
        return None

    def one(index: int) -> ExitAdapter:
        norm = jax.tree.map(lambda _: model.exits.scale[index], model.final_norm)
        down = matrix(model.exits.down[index], model.config.model_dim)
        return ExitAdapter(norm, down, matrix(model.exits.up[index], config.rank))

    return {exit_layer: one(index) for index, exit_layer in enumerate(config.adapters)}


def reduced_head(weights: DecoderWeights, tokens: Int[Array, "N"]) -> DraftHead:
    """Returns a head that drafts these tokens only; verification keeps the output exact."""
    return DraftHead(tokens, weights.any_head.of_outputs(tokens))


def place_weights(weights: DecoderWeights, mesh: Mesh, kv_heads: int) -> DecoderWeights:
    """Splits heads, MLP and vocabulary over the mesh axis `tensor`.

    A vocabulary that cannot be split evenly is padded with tokens that have probability 0.
    No matrix may lie in panels.

    Raises:
      ConfigError: one of them is not divisible by the axis.
    """
    parts = mesh.shape["tensor"]
    sizes = {
        "num_kv_heads": kv_heads,
        "ffn_dim": weights.layers[0].down.values.shape[1],
    }
    for name, size in sizes.items():
        require(
            size % parts == 0,
            f"{name}={size} is not divisible by the {parts} devices of mesh axis 'tensor'; "
            "decode on a mesh with fewer along it",
        )

    weights = _with_padding(weights, -weights.embedding.shape[0] % parts)

    def on(*axes):
        return NamedSharding(mesh, PartitionSpec(*axes))

    outputs, inputs = on("tensor"), on(None, "tensor")

    def of_layer(layer: DecoderLayer) -> DecoderLayer:
        whole = jax.tree.map(lambda _: on(), layer)
        bias = None if layer.qkv_bias is None else outputs
        return whole._replace(
            qkv=outputs, qkv_bias=bias, output=inputs, gate_up=outputs, down=inputs
        )

    shardings = jax.tree.map(lambda _: on(), weights)._replace(
        embedding=outputs, layers=tuple(map(of_layer, weights.layers))
    )
    if weights.head is not None:
        shardings = shardings._replace(head=outputs)
    if weights.padding is not None:
        shardings = shardings._replace(padding=outputs)
    return jax.device_put(weights, shardings)


def _with_padding(weights: DecoderWeights, rows: int) -> DecoderWeights:
    """Returns the weights with so many rows more in the embedding and the head."""
    if not rows:
        return weights

    def padded(matrix):
        return jax.tree.map(lambda values: jnp.pad(values, ((0, rows), (0, 0))), matrix)

    tokens = jnp.zeros(weights.embedding.shape[0])
    return weights._replace(
        embedding=padded(weights.embedding),
        head=padded(weights.head),
        padding=jnp.pad(tokens, (0, rows), constant_values=-jnp.inf),
    )
