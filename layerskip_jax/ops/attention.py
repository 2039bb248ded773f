"""Attention over packed sequences and over a cache, by named kernel."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from layerskip_jax.schema import ConfigError, require_choice

# What may be asked for, and the kind of device that has it.
KERNELS = {"auto": "", "xla": "", "splash": "tpu", "cudnn": "gpu", "triton": "gpu"}
# The name of what a checkpoint policy may save of attention: its result, and with `splash` the
# normaliser as well, so that the backward pass need not run the kernel again.
RESIDUAL = "attention"

# Slots of a cache that a step may read. A token reads at most twice what it needs, four times
# where that is much already, and few sizes are compiled.
CACHE_SIZES = (256, 512, 1024, 4096, 16384, 65536)

LANES = 128  # what a kernel's sequence is padded to a multiple of
MAX_BLOCK = 512  # rows and columns of the logits that a TPU core works on at a time

# Widest heads that `cudnn` takes: on a Hopper GPU or a later one, and on every one.
CUDNN_WIDEST, CUDNN_WIDTH = 256, 128
# Before, jax had cuDNN compute the gradient of a mask as well, which nothing asks for.
CUDNN_MASKS_FREELY = jax.__version_info__ >= (0, 11, 2)
# Rows and columns of a block in the backward pass of `triton`, instead of its own 32, on GPUs of
# this compute capability, where that was measured (docs/benchmarks.md), and for rows of a head no
# longer than this, which fit the memory of a core.
HOPPER, HOPPER_BLOCK, HOPPER_ROW_BYTES = "9.0", 64, 256


def choose_kernel(
    name: str,
    platform: str,
    *,
    packing_mask: bool,
    context: int,
    window: int = 0,
    dtype: str = "bfloat16",
    head_dim: int = CUDNN_WIDTH,
) -> str:
    """Returns the kernel to use on these devices; `auto` takes the fastest that can do it.

    Args:
      name: one of `KERNELS`.
      platform: `cpu`, `gpu` or `tpu`.
      packing_mask: whether documents that share a window are kept apart.
      context: parts that each sequence is split into.
      window: tokens that a token sees, itself among them; 0 for all before it.
      dtype: of queries, keys and values.
      head_dim: width of a head.

    Raises:
      ConfigError: the kernel cannot do that here; with what can.
    """
    require_choice("attention", name, KERNELS)
    if name == "auto":
        if platform == "tpu":
            return "splash"
        if platform == "gpu" and context == 1:
            # With a mask `cudnn` is behind `triton`, which has no windows.
            wanted = (CUDNN_MASKS_FREELY and window > 0) if packing_mask else True
            if wanted and _cudnn_takes(dtype, head_dim, CUDNN_WIDTH):
                return "cudnn"
            return "xla" if window else "triton"
        return "xla"
    needed = KERNELS[name]
    if needed not in ("", platform):
        raise ConfigError(
            f"config.model.attention={name!r} needs a {needed.upper()}, and the devices here are "
            f"of platform {platform!r}; set 'auto', or 'xla', which runs everywhere"
        )
    if name == "cudnn" and not _cudnn_takes(dtype, head_dim, CUDNN_WIDEST):
        raise ConfigError(
            f"config.model.attention='cudnn' takes bfloat16 and heads whose width is a multiple of "
            f"8 up to {CUDNN_WIDEST}, and config.model.dtype={dtype!r}, head_dim={head_dim}; set "
            f"{'xla' if window else 'triton'!r}"
        )
    if name == "triton" and window:
        raise ConfigError(
            f"config.model.attention='triton' has no sliding window, and config.model."
            f"sliding_window={window}; set 'auto', or 'xla', which runs everywhere"
        )
    if needed == "gpu" and context > 1:
        raise ConfigError(
            f"config.model.attention={name!r} cannot split sequences, and "
            f"config.mesh.shape.context={context}; set 'xla', or context=1"
        )
    return name


def _cudnn_takes(dtype: str, head_dim: int, widest: int) -> bool:
    return dtype == "bfloat16" and head_dim % 8 == 0 and head_dim <= widest


@dataclasses.dataclass(frozen=True)
class PackedAttention:
    """Causal attention in which no token sees another document of its row.

    Attributes:
      kernel: `xla`, plain operations that run everywhere; `splash` (TPU); `triton` (GPU); or
        `cudnn` (GPU; keeps documents apart by a mask of S x S). Nothing is substituted silently.
      packing_mask: False lets a token see the earlier documents of its row too.
      rows: mesh axes that the batch is split over, for the kernels: the compiler splits what is
        made of plain operations, but not a kernel.
      positions: mesh axes that queries are split over; each device reads all keys and values.
      heads: mesh axes that query heads and key/value heads are split over.
      window: how many tokens each sees, itself among them; 0 for all before it. Not `triton`.
      interpret: runs a kernel's mathematics without its hardware, slowly.
    """

    kernel: str = "xla"
    packing_mask: bool = True
    rows: tuple[str, ...] = ()
    positions: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    window: int = 0
    interpret: bool = False

    def __call__(
        self,
        q: Float[Array, "B S H h"],
        k: Float[Array, "B S K h"],
        v: Float[Array, "B S K h"],
        segment_ids: Int[Array, "B S"],
    ) -> Float[Array, "B S H h"]:
        """Attends.

        Args:
          q: queries; query head i reads key/value head i // (H / K).
          k: keys.
          v: values.
          segment_ids: document of each token within its row, from 0 on.
        """
        if not self.packing_mask:
            segment_ids = jnp.zeros_like(segment_ids)
        attend = {
            "xla": self._plain,
            "splash": self._splash,
            "triton": self._on_gpu,
            "cudnn": self._on_gpu,
        }[self.kernel]
        attended = attend(q, k, v, segment_ids)
        # These name what they save themselves, and naming it twice would save it twice.
        named = self.kernel in ("xla", "splash")
        return attended if named else checkpoint_name(attended, RESIDUAL)

    def _plain(self, q, k, v, segment_ids):
        batch, length, heads, width = q.shape
        kv_heads = k.shape[2]
        mesh = jax.sharding.get_abstract_mesh()
        whole = mesh.empty or _size(mesh.shape, self.positions) == 1
        q = q.reshape(batch, length, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        attended = _packed_attention(whole, self.window, q, k, v, segment_ids)
        return attended.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)

    def _sharded(self, function, *sizes):
        """Wraps a kernel's call so that each device runs it on its own rows and heads."""
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return function
        rows, positions, heads = (axes or None for axes in (self.rows, self.positions, self.heads))
        q = PartitionSpec(rows, positions, heads)
        kv = PartitionSpec(rows, None, heads)
        segments = (PartitionSpec(rows, positions), PartitionSpec(rows))
        return jax.shard_map(
            function, mesh=mesh, in_specs=(q, kv, kv, *segments, *sizes), out_specs=q,
            check_vma=False,
        )  # fmt: skip

    def _splash(self, q, k, v, segment_ids):
        # Imported here: who trains on a CPU need not wait for it.
        from jax.experimental.pallas.ops.tpu import splash_attention as splash

        length, heads = q.shape[1:3]
        mesh = jax.sharding.get_abstract_mesh()
        # Without a mesh every axis has one device.
        size = functools.partial(_size, {} if mesh.empty else mesh.shape)
        shards = size(self.positions)
        padded = -(-length // (LANES * shards)) * LANES * shards
        q, k, v = (_pad_positions(x, padded) for x in (q * q.shape[-1] ** -0.5, k, v))
        # What is padded is a document of its own, behind all others.
        segment_ids = _pad_positions(segment_ids, padded, -1)
        block = next(b for b in (MAX_BLOCK, 256, LANES) if padded // shards % b == 0)
        if self.window:
            mask = splash.LocalMask(
                (padded, padded), (self.window - 1, 0), offset=0, shard_count=shards
            )
        else:
            mask = splash.CausalMask((padded, padded), shard_count=shards)
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * heads),
            block_sizes=splash.BlockSizes(
                **dict.fromkeys(
                    (
                        "block_q", "block_kv", "block_kv_compute",
                        "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute",
                        "block_q_dq", "block_kv_dq",
                    ),
                    block,
                )
            ),
            head_shards=size(self.heads),
            q_seq_shards=shards,
            residual_checkpoint_name=RESIDUAL,
            interpret=self.interpret,
        )  # fmt: skip

        def attend(q, k, v, q_segments, kv_segments, kernel):
            def row(q, k, v, q_segments, kv_segments):
                return kernel(q, k, v, splash.SegmentIds(q_segments, kv_segments))

            q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
            return jax.vmap(row)(q, k, v, q_segments, kv_segments).swapaxes(1, 2)

        specs = ()
        if not mesh.empty:
            spec = PartitionSpec(self.heads or None, self.positions or None)
            specs = (kernel.manual_sharding_spec(NamedSharding(mesh, spec)),)
        sharded = self._sharded(attend, *specs)
        return sharded(q, k, v, segment_ids, segment_ids, kernel)[:, :length]

    def _on_gpu(self, q, k, v, segment_ids):
        length = q.shape[1]
        attend = {"cudnn": self._cudnn, "triton": self._triton}[self.kernel]
        # A mask of an odd length is too much for `cudnn`, but alone it takes any.
        if self.kernel == "triton" or self.packing_mask:
            padded = -(-length // LANES) * LANES
            q, k, v = (_pad_positions(x, padded) for x in (q, k, v))
            segment_ids = _pad_positions(segment_ids, padded, -1)
        return self._sharded(attend)(q, k, v, segment_ids, segment_ids)[:, :length]

    def _cudnn(self, q, k, v, q_segments, kv_segments):
        same_document = (q_segments[:, :, None] == kv_segments[:, None])[:, None]
        return jax.nn.dot_product_attention(
            q, k, v, mask=same_document if self.packing_mask else None, is_causal=True,
            local_window_size=(self.window - 1, 0) if self.window else None,
            implementation="xla" if self.interpret else "cudnn",
        )  # fmt: skip

    def _triton(self, q, k, v, segment_ids, _):
        from jax.experimental.pallas.ops.gpu import attention as triton

        scale, groups = q.shape[-1] ** -0.5, q.shape[2] // k.shape[2]
        blocks = triton.BlockSizes.get_default()
        if _capability() == HOPPER and q.shape[-1] * q.dtype.itemsize <= HOPPER_ROW_BYTES:
            backward = ("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
            blocks = dataclasses.replace(blocks, **dict.fromkeys(backward, HOPPER_BLOCK))
        # This kernel wants a key and a value for each query head.
        k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
        return triton.mha(
            q, k, v, segment_ids, sm_scale=scale, causal=True, block_sizes=blocks,
            interpret=self.interpret,
        )  # fmt: skip


PLAIN_ATTENTION = PackedAttention()


def _capability() -> str:
    """Returns the compute capability of the GPUs, or nothing where there are none."""
    return getattr(jax.devices()[0], "compute_capability", "")


def _size(mesh_shape, axes: tuple[str, ...]) -> int:
    size = 1
    for axis in axes:
        size *= mesh_shape.get(axis, 1)
    return size


def _pad_positions(x: Array, length: int, value: int = 0) -> Array:
    widths = [(0, length - x.shape[1] if axis == 1 else 0) for axis in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)


def seen_pairs(length: int, window: int = 0) -> int:
    """Returns the pairs of a query and a key that it sees, for one row and head.

    Args:
      length: S.
      window: as in `PackedAttention`.
    """
    seen = min(window or length, length)
    return seen * (seen + 1) // 2 + (length - seen) * seen


def computed_pairs(length: int, whole: bool, window: int = 0) -> int:
    """Returns the pairs of a query and a key that the kernel `xla` computes for one row and head.

    Args:
      length: S.
      whole: whether one device holds all positions.
      window: as in `PackedAttention`.
    """
    parts = _blocks(length, whole, window)
    return sum((end - start) * (end - first) for first, start, end in parts)


def _blocks(length: int, whole: bool, window: int) -> list[tuple[int, int, int]]:
    """Returns the parts of the queries that attend in turn, each after the first key it sees.

    No part attends to a key beyond its own end. Two halves save a quarter of the products, and more
    parts gained nothing (CPU, S 256), unless a window leaves most keys out: then up to eight, none
    shorter than the window. One part where devices share the positions, which cutting them would
    move between devices.
    """
    if not whole or length < 2 * LANES:
        return [(0, 0, length)]
    size = length // 2 if length % 2 == 0 else length
    if window:
        windowed = -(-max(window, -(-length // 8)) // LANES) * LANES
        size = min(size, windowed)
    return [
        (max(0, start - window + 1) if window else 0, start, min(start + size, length))
        for start in range(0, length, size)
    ]


def _mask(
    segment_ids: Int[Array, "B S"], part: tuple[int, int, int], window: int
) -> Bool[Array, "B 1 1 Q T"]:
    """Returns which keys, of those that a part of the queries reads, each of them sees."""
    first, start, end = part
    queries, keys = jnp.arange(start, end)[:, None], jnp.arange(first, end)
    seen = queries >= keys
    if window:
        seen &= queries - keys < window
    same_document = segment_ids[:, start:end, None] == segment_ids[:, None, first:end]
    return (seen & same_document)[:, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _packed_attention(
    whole: bool,
    window: int,
    q: Float[Array, "B K G S h"],
    k: Float[Array, "B K S h"],
    v: Float[Array, "B K S h"],
    segment_ids: Int[Array, "B S"],
) -> Float[Array, "B K G S h"]:
    """Causal softmax attention within documents, in plain XLA operations, heads in front.

    The backward pass keeps the result and the logarithm of each query's normaliser, and forms the
    weights again from them, as FlashAttention does (Dao et al. 2022, appendix B): nothing of size
    S x S is saved. `jax.nn.dot_product_attention(implementation="xla")` gives the same numbers.
    """
    return _packed_forward(whole, window, q, k, v, segment_ids)[0]


def _packed_forward(whole, window, q, k, v, segment_ids):
    scaled = q * q.shape[-1] ** -0.5
    attended, normalisers = [], []
    for part in _blocks(q.shape[3], whole, window):
        first, start, end = part
        logits = _products("bkgsh,bkth->bkgst", scaled[:, :, :, start:end], k[:, :, first:end])
        seen = _mask(segment_ids, part, window)
        logits = jnp.where(seen, logits, jnp.finfo(jnp.float32).min)
        highest = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - highest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        mixed = _products("bkgst,bkth->bkgsh", weights.astype(v.dtype), v[:, :, first:end])
        attended.append((mixed / total).astype(q.dtype))
        normalisers.append(highest + jnp.log(total))
    # Saved by name, so that a policy which keeps attention need not run this again.
    attended, normaliser = (
        checkpoint_name(jnp.concatenate(parts, axis=3), RESIDUAL)
        for parts in (attended, normalisers)
    )
    return attended, (q, k, v, segment_ids, attended, normaliser)


def _packed_backward(whole, window, saved, gradient):
    q, k, v, segment_ids, attended, normaliser = saved
    scale = q.shape[-1] ** -0.5
    scaled = q * scale
    # d softmax = weights * (d weights - sum(weights * d weights)), and that sum is this one.
    both = attended.astype(jnp.float32) * gradient.astype(jnp.float32)
    inner = jnp.sum(both, axis=-1, keepdims=True)
    d_q, d_k, d_v = [], 0, 0
    for part in _blocks(q.shape[3], whole, window):
        first, start, end = part
        queries, d_attended = (x[:, :, :, start:end] for x in (scaled, gradient))
        logits = _products("bkgsh,bkth->bkgst", queries, k[:, :, first:end])
        weights = jnp.exp(logits - normaliser[:, :, :, start:end])
        weights = jnp.where(_mask(segment_ids, part, window), weights, 0)
        d_weights = _products("bkgsh,bkth->bkgst", d_attended, v[:, :, first:end])
        d_logits = (weights * (d_weights - inner[:, :, :, start:end])).astype(q.dtype)
        d_q.append(_products("bkgst,bkth->bkgsh", d_logits, k[:, :, first:end]) * scale)
        beyond = [(0, 0), (0, 0), (first, q.shape[3] - end), (0, 0)]
        d_k += jnp.pad(_products("bkgst,bkgsh->bkth", d_logits, queries), beyond)
        weights = weights.astype(v.dtype)
        d_v += jnp.pad(_products("bkgst,bkgsh->bkth", weights, d_attended), beyond)
    d_q = jnp.concatenate(d_q, axis=3)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_packed_attention.defvjp(_packed_forward, _packed_backward)


def _products(axes: str, a: Array, b: Array) -> Array:
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)


def cached_attention(
    q: Float[Array, "B K G S h"],
    k: Float[Array, "*BK m n"],
    v: Float[Array, "*BK T h"],
    q_positions: Int[Array, "B S"],
    window: int = 0,
) -> Float[Array, "B K G S h"]:
    """Attention of new tokens over a cache of T slots, slot j holding position j.

    A query at position p sees the slots 0..p; whatever lies beyond, such as the keys of
    rejected drafts, is masked. Only the first slots of the cache are read, as many as the
    furthest query needs, rounded up to one of a few sizes. B and K may be one axis of the cache, or
    none where both are 1; its keys are then transposed, `[B K, h, T]`.

    With a window w a query sees the last w positions up to its own, and slot j holds the newest
    position written that is j modulo T: T may be less than the positions, but no less than w and
    what may be written beyond the tokens that stay.
    """
    slots = v.shape[-2]
    sizes = [size for size in CACHE_SIZES if size < slots] + [slots]

    def over(size: int):
        def attend(q, k, v, q_positions):
            visible = _visible(q_positions, size, slots, window)
            keys = k[..., :size] if k.ndim < 4 else k[..., :size, :].swapaxes(-1, -2)
            return _attend(q, keys, v[..., :size, :], visible)

        return attend

    if len(sizes) == 1:
        return over(slots)(q, k, v, q_positions)
    smallest = jnp.searchsorted(jnp.array(sizes), jnp.minimum(q_positions.max() + 1, slots))
    return jax.lax.switch(smallest, [over(size) for size in sizes], q, k, v, q_positions)


def _visible(
    q_positions: Int[Array, "B S"], size: int, slots: int, window: int
) -> Bool[Array, "B S T"]:
    """Returns which of the first `size` slots each query sees."""
    queries = q_positions[:, :, None]
    if not window:
        return jnp.arange(size) <= queries
    newest = q_positions[:, -1:, None]
    held = newest - (newest - jnp.arange(size)) % slots  # negative where nothing is yet
    return (0 <= held) & (held <= queries) & (queries - held < window)


def _attend(
    q: Float[Array, "B K G S h"],
    k: Float[Array, "*BK h T"],
    v: Float[Array, "*BK T h"],
    mask: Bool[Array, "B S T"],
) -> Float[Array, "B K G S h"]:
    """Softmax attention in float32, in the plain XLA operations that a CPU runs best.

    Heads in front make each product a plain batched matrix product, over the queries of a
    key/value head in one.
    """
    q = q * q.shape[-1] ** -0.5
    shape, rows = q.shape, k.shape[:-2]
    queries = q.reshape(*rows, -1, shape[-1])
    logits = jnp.einsum("...mh,...ht->...mt", queries, k, preferred_element_type=jnp.float32)
    logits = logits.reshape(*shape[:-1], -1)
    logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype).reshape(*rows, queries.shape[-2], -1)
    return jnp.einsum("...mt,...th->...mh", weights, v).reshape(shape)
