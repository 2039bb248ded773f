"""Shape and numerics of the decoder."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from layerskip_jax.model.exits import ExitsConfig
from layerskip_jax.ops.attention import KERNELS
from layerskip_jax.ops.remat import REMAT_POLICIES
from layerskip_jax.schema import (
    as_float32,
    changeable,
    renamed,
    require,
    require_choice,
    require_count,
    require_range,
)

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
ROPE_SCALINGS = ("none", "linear", "llama3")
QK_NORMS = ("none", "head", "all")
NORM_POSITIONS = ("before", "after")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than a model was trained on.

    Attributes:
      kind: `none`; `linear` (positions divided by `factor`); `llama3` (Llama 3.1: long wavelengths
        divided by `factor`, short ones left alone, those between interpolated).
      factor: how much longer the context becomes, at least 1.
      low_freq_factor: `llama3` divides wavelengths above `original_length` over this, which is
        above 0 and below `high_freq_factor`.
      high_freq_factor: `llama3` leaves wavelengths below `original_length` over this alone; above
        `low_freq_factor`.
      original_length: the context before, in tokens, at least 1.
    """

    kind: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self):
        require_choice("kind", self.kind, ROPE_SCALINGS)
        require_range("factor", self.factor, "[1, inf)", "it stretches the rotary frequencies")
        low, high = self.low_freq_factor, self.high_freq_factor
        for name in ("low_freq_factor", "high_freq_factor"):
            require_range(name, getattr(self, name), "(0, inf)")
        require(
            as_float32(low) < as_float32(high) and as_float32(high - low) > 0,
            f"low_freq_factor={low} must be above 0 and below high_freq_factor={high}",
        )
        require_count("original_length", self.original_length, 1)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class LayerKind:
    """How a layer is put together, apart from its shapes; layers of one model may differ in it.

    Attributes:
      window: tokens that a token sees, itself among them; 0 for all before it.
      rotary: whether queries and keys are rotated by their positions.
      norm_after: whether its norms come after attention and MLP, as in all layers of a model.
    """

    window: int = 0
    rotary: bool = True
    norm_after: bool = False


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama family, or of one of its relatives; none has experts yet.

    Attributes:
      vocab_size: V, at least 0; 0 takes it from the prepared data's tokenizer.
      pad_vocab_to_multiple_of: embedding and head have V rounded up to a multiple of this, at least
        1, so that devices can share them. What is added is never a target, drawn or exported.
      num_layers: L, at least 1.
      model_dim: D, the width of the residual stream, at least 1.
      ffn_dim: F, the hidden width of the SwiGLU MLP, at least 1.
      num_heads: H, query heads, at least 1.
      num_kv_heads: K, key/value heads, at least 1; H must be a multiple of it (grouped-query
        attention).
      head_dim: h, the width of a head, even and at least 0; 0 means D / H.
      max_sequence_length: longest context the model is meant for, in tokens, at least 1.
      rope_theta: base of the rotary position embedding, above 1.
      rope_scaling: how its frequencies are stretched.
      no_rope_every: every n-th layer, n, 2n and so on, is without rotary positions, as in SmolLM3;
        at least 0, which leaves none without.
      qkv_bias: whether queries, keys and values have biases, as in Qwen2.
      qk_norm: RMSNorm of queries and keys before they are rotated: `none`; `head`, of each head, by
        one scale for all (Qwen3); `all`, over all heads at once (OLMo 2).
      norm_position: where the norms of a layer are: `before` attention and MLP, or `after` them, in
        front of the sum (OLMo 2).
      sliding_window: how many tokens a token sees, itself among them, as in Mistral; at least 0,
        which lets it see all before it.
      full_attention_every: with a window, every n-th layer, n, 2n and so on, sees all; at least 0,
        which leaves none that does, and not 1.
      norm_eps: epsilon of RMSNorm, above 0.
      tie_embeddings: whether the head is the transposed embedding.
      dtype: `float32` or `bfloat16`, of activations and matrix products; parameters stay float32.
      remat: what the backward pass computes again: `none`; `dots` (all but the matrix products);
        `save_attention` (everything inside a block but attention, which the kernel `splash` then
        does not run again); `full` (everything inside a block); or `offload` (the same, and what
        enters each block waits in the host's memory).
      attention: attention kernel: `splash` on TPU, `triton` or `cudnn` on GPU, `xla` everywhere;
        `auto` takes the fastest that can do what is asked, and says which.
      packing_mask: keeps documents that share a window apart; False lets a token see the earlier
        ones too, which is where `cudnn` is fastest.
      exits: exit adapters and the learned exit.
    """

    vocab_size: int = 0
    pad_vocab_to_multiple_of: int = renamed("vocab_multiple", 1)
    num_layers: int = 12
    model_dim: int = 768
    ffn_dim: int = 2048
    num_heads: int = 12
    num_kv_heads: int = 12
    head_dim: int = 0
    max_sequence_length: int = 2048
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = RopeScaling()
    no_rope_every: int = 0
    qkv_bias: bool = False
    qk_norm: str = "none"
    norm_position: str = "before"
    sliding_window: int = 0
    full_attention_every: int = 0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    dtype: str = "bfloat16"
    remat: str = changeable("dots")
    attention: str = changeable("auto")
    packing_mask: bool = True
    exits: ExitsConfig = ExitsConfig()

    def __post_init__(self):
        sizes = (
            "pad_vocab_to_multiple_of num_layers model_dim ffn_dim num_heads num_kv_heads "
            "max_sequence_length"
        ).split()
        for name in sizes:
            require_count(name, getattr(self, name), 1)
        require_count("vocab_size", self.vocab_size, 0)
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}",
        )
        if self.head_dim == 0:
            require(
                self.model_dim % self.num_heads == 0,
                f"num_heads={self.num_heads} must divide model_dim={self.model_dim}; "
                "or set head_dim",
            )
            object.__setattr__(self, "head_dim", self.model_dim // self.num_heads)
        require(
            self.head_dim > 0 and self.head_dim % 2 == 0,
            f"head_dim={self.head_dim} must be positive and even, since RoPE rotates pairs",
        )
        require_range("rope_theta", self.rope_theta, "(1, inf)")
        require_range("norm_eps", self.norm_eps, "(0, inf)")
        require_choice("qk_norm", self.qk_norm, QK_NORMS)
        require_choice("norm_position", self.norm_position, NORM_POSITIONS)
        for name in ("no_rope_every", "sliding_window", "full_attention_every"):
            require_count(name, getattr(self, name), 0)
        every = self.full_attention_every
        require(
            every != 1 and (every == 0 or self.sliding_window > 0),
            f"full_attention_every={every} lets every n-th layer, n from 2 on, see beyond "
            f"sliding_window={self.sliding_window}; for attention to all tokens in all layers set "
            "both to 0",
        )
        require_choice("dtype", self.dtype, DTYPES)
        require_choice("remat", self.remat, REMAT_POLICIES)
        require_choice("attention", self.attention, KERNELS)

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """How every layer is put together."""
        return _layer_kinds(
            self.num_layers, self.sliding_window, self.full_attention_every, self.no_rope_every,
            self.norm_position == "after",
        )  # fmt: skip

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding and the head: V and what it is padded with."""
        multiple = self.pad_vocab_to_multiple_of
        return -(-self.vocab_size // multiple) * multiple

    @property
    def compute_dtype(self) -> jnp.dtype:
        """The dtype of activations and matrix products."""
        return jnp.dtype(DTYPES[self.dtype])


@functools.cache
def _layer_kinds(
    num_layers: int, window: int, full_every: int, no_rope_every: int, norm_after: bool
) -> tuple[LayerKind, ...]:
    """Kept, since a search for a layout asks it of every candidate."""

    def is_nth(layer: int, every: int) -> bool:
        return every > 0 and (layer + 1) % every == 0

    return tuple(
        LayerKind(
            0 if is_nth(layer, full_every) else window,
            not is_nth(layer, no_rope_every),
            norm_after,
        )
        for layer in range(num_layers)
    )
