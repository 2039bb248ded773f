"""Every kernel against the definition in float64; kernels without their hardware interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layerskip_jax.distributed.mesh import MeshShape, make_mesh
from layerskip_jax.ops import attention
from layerskip_jax.ops.attention import (
    PackedAttention,
    choose_kernel,
    computed_pairs,
    seen_pairs,
)
from layerskip_jax.schema import ConfigError

KERNELS = ("xla", "splash", "triton", "cudnn")


def _case(length, heads=4, kv_heads=2, width=16, rows=2, documents=3):
    random = np.random.default_rng(length)
    q, w = (random.normal(size=(rows, length, heads, width)) for _ in range(2))
    k, v = (random.normal(size=(rows, length, kv_heads, width)) for _ in range(2))
    segments = np.sort(random.integers(0, documents, (rows, length)), axis=1)
    return tuple(np.asarray(x, np.float32) for x in (q, k, v, w)) + (segments.astype(np.int32),)


def _reference(q, k, v, segments, window=0):
    """The definition, one query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, s, n in np.ndindex(*q.shape[:3]):
        first = max(0, s - window + 1) if window else 0
        seen = [t for t in range(first, s + 1) if segments[b, t] == segments[b, s]]
        group = n // (q.shape[2] // k.shape[2])
        scores = k[b, seen, group] @ q[b, s, n] * q.shape[-1] ** -0.5
        weights = np.exp(scores - scores.max())
        out[b, s, n] = weights @ v[b, seen, group] / weights.sum()
    return out


def _value_and_gradients(attend, q, k, v, w, segments):
    def weighted(q, k, v):
        return jnp.sum(attend(q, k, v, jnp.asarray(segments)) * w)

    gradients = jax.jit(jax.grad(weighted, (0, 1, 2)))(q, k, v)
    return jax.jit(attend)(q, k, v, jnp.asarray(segments)), gradients


# 256 is long enough for `xla` to attend in two halves.
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("length", [24, 128, 131, 256])
def test_a_kernel_equals_the_definition(kernel, length):
    """With packed documents and grouped heads, at lengths that no block divides."""
    q, k, v, w, segments = _case(length)
    attend = PackedAttention(kernel, interpret=True)
    value, gradients = _value_and_gradients(attend, q, k, v, w, segments)
    np.testing.assert_allclose(value, _reference(q, k, v, segments), atol=2e-6)
    _, expected = _value_and_gradients(PackedAttention("xla"), q, k, v, w, segments)
    for a, b in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("capability", ["9.0", "8.9"])
def test_larger_blocks_on_a_hopper_give_the_same(capability, monkeypatch):
    """Its own blocks of 32 are the kernel's default, which it has elsewhere."""
    from jax.experimental.pallas.ops.gpu import attention as triton

    seen = []
    mha = triton.mha
    monkeypatch.setattr(
        triton, "mha", lambda *args, **kwargs: seen.append(kwargs) or mha(*args, **kwargs)
    )
    monkeypatch.setattr(attention, "_capability", lambda: capability)
    q, k, v, w, segments = _case(256)
    attend = PackedAttention("triton", interpret=True)
    _, gradients = _value_and_gradients(attend, q, k, v, w, segments)
    _, expected = _value_and_gradients(PackedAttention("xla"), q, k, v, w, segments)
    for a, b in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    blocks = seen[0]["block_sizes"]
    assert blocks.block_q_dkv == blocks.block_kv_dq == (64 if capability == "9.0" else 32)
    wide = jnp.zeros((1, 128, 1, 128))  # a row of a head in float32 is twice what it has room for
    jax.eval_shape(attend, wide, wide, wide, jnp.zeros((1, 128), jnp.int32))
    assert seen[-1]["block_sizes"].block_q_dkv == 32


@pytest.mark.parametrize("kernel", ["xla", "splash", "cudnn"])
@pytest.mark.parametrize("length, window", [(24, 1), (131, 20), (256, 130), (300, 40)])
def test_a_window_equals_the_definition(kernel, length, window):
    q, k, v, w, segments = _case(length)
    attend = PackedAttention(kernel, window=window, interpret=True)
    value, gradients = _value_and_gradients(attend, q, k, v, w, segments)
    np.testing.assert_allclose(value, _reference(q, k, v, segments, window), atol=2e-6)
    _, expected = _value_and_gradients(_windowed(window), q, k, v, w, segments)
    for a, b in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def _windowed(window):
    """Returns the definition again, for its gradients: all pairs, of which some are masked."""

    def attend(q, k, v, segments):
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
        scores = jnp.einsum("bqnh,bknh->bnqk", q, k) * q.shape[-1] ** -0.5
        distance = jnp.arange(q.shape[1])[:, None] - jnp.arange(q.shape[1])
        seen = (0 <= distance) & (distance < window)
        seen = seen & (segments[:, :, None] == segments[:, None])
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
        return jnp.einsum("bnqk,bknh->bqnh", weights, v)

    return attend


def test_pairs_of_a_window_by_hand():
    assert seen_pairs(8) == 36
    assert seen_pairs(8, 3) == 1 + 2 + 6 * 3
    assert seen_pairs(8, 8) == seen_pairs(8, 100) == 36
    assert computed_pairs(8, True, 3) == 64  # too short to part
    # Of 128 queries each: the first sees 128 keys, the others those and 29 before them.
    assert computed_pairs(512, True, 30) == 128 * (128 + 3 * 157)
    assert computed_pairs(512, False, 30) == 512 * 512


@pytest.mark.parametrize("kernel", KERNELS)
def test_packed_documents_equal_documents_alone(kernel):
    q, k, v, _, _ = _case(96, rows=1)
    segments = jnp.asarray(np.repeat([[0, 1, 2]], [17, 48, 31], axis=1), jnp.int32)
    attend = PackedAttention(kernel, interpret=True)
    packed = jax.jit(attend)(q, k, v, segments)
    for start, end in ((0, 17), (17, 65), (65, 96)):
        one = slice(start, end)
        alone = jax.jit(attend)(q[:, one], k[:, one], v[:, one], segments[:, one])
        np.testing.assert_allclose(packed[:, one], alone, atol=2e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_without_packing_mask_documents_see_earlier_ones(kernel):
    q, k, v, _, segments = _case(40)
    seen = PackedAttention(kernel, packing_mask=False, interpret=True)
    expected = _reference(q, k, v, np.zeros_like(segments))
    np.testing.assert_allclose(jax.jit(seen)(q, k, v, segments), expected, atol=2e-6)


@pytest.mark.parametrize(
    "kernel, shape, window",
    [
        ("xla", MeshShape(data=2, context=2, tensor=2), 0),
        ("xla", MeshShape(data=2, context=2, tensor=2), 70),
        ("splash", MeshShape(data=2, context=2, tensor=2), 0),
        ("splash", MeshShape(data=2, context=4), 0),
        ("splash", MeshShape(data=2, context=4), 70),
        ("triton", MeshShape(data=2, fsdp=2, tensor=2), 0),
        ("cudnn", MeshShape(data=2, fsdp=2, tensor=2), 70),
    ],
    ids=str,
)
def test_devices_share_rows_positions_and_heads(kernel, shape, window):
    q, k, v, w, segments = _case(264, rows=4)
    axes = ("data", "fsdp"), ("context",), ("tensor",)
    alone = PackedAttention("xla", window=window)
    expected, wanted = _value_and_gradients(alone, q, k, v, w, segments)
    with jax.set_mesh(make_mesh(shape)):
        attend = PackedAttention(kernel, True, *axes, window=window, interpret=True)
        value, gradients = _value_and_gradients(attend, q, k, v, w, segments)
    np.testing.assert_allclose(value, expected, atol=2e-6)
    for a, b in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def _choose(name, platform, packing_mask=True, context=1, **model):
    return choose_kernel(name, platform, packing_mask=packing_mask, context=context, **model)


def test_auto_takes_what_the_machine_has(monkeypatch):
    assert _choose("auto", "cpu") == "xla"
    assert _choose("auto", "tpu") == _choose("auto", "tpu", context=4) == "splash"
    assert _choose("auto", "gpu") == "triton"
    assert _choose("auto", "gpu", packing_mask=False) == "cudnn"
    assert _choose("auto", "gpu", context=2) == "xla"
    assert _choose("xla", "tpu") == "xla"
    # `triton` has no window
    monkeypatch.setattr(attention, "CUDNN_MASKS_FREELY", False)
    assert _choose("auto", "gpu", window=8) == "xla"
    monkeypatch.setattr(attention, "CUDNN_MASKS_FREELY", True)
    assert _choose("auto", "gpu", window=8) == "cudnn"
    assert _choose("auto", "gpu", packing_mask=False, window=8) == "cudnn"
    assert _choose("auto", "tpu", window=8) == "splash"
    with pytest.raises(ConfigError, match="'triton' has no sliding window, .*sliding_window=8"):
        _choose("triton", "gpu", window=8)
    # nor has `cudnn` float32, or heads of any width
    for lacks in ({"dtype": "float32"}, {"head_dim": 36}, {"head_dim": 256}):
        assert _choose("auto", "gpu", packing_mask=False, **lacks) == "triton"
        assert _choose("auto", "gpu", packing_mask=False, window=8, **lacks) == "xla"
        assert _choose("auto", "gpu", window=8, **lacks) == "xla"
    assert _choose("cudnn", "gpu", head_dim=256) == "cudnn"  # which a Hopper has
    for window, other in ((0, "triton"), (8, "xla")):
        with pytest.raises(ConfigError, match=f"takes bfloat16 .*dtype='float32'.* set '{other}'"):
            _choose("cudnn", "gpu", dtype="float32", window=window)
    with pytest.raises(ConfigError, match="multiple of 8 up to 256, .* head_dim=36; set 'triton'"):
        _choose("cudnn", "gpu", head_dim=36)


@pytest.mark.parametrize(
    "name, platform, context, message",
    [
        ("splash", "cpu", 1, "'splash' needs a TPU, .* platform 'cpu'; set 'auto', or 'xla'"),
        ("triton", "tpu", 1, "'triton' needs a GPU, .* platform 'tpu'"),
        ("triton", "gpu", 2, "'triton' cannot split sequences, and .*context=2; set 'xla'"),
        ("flash", "gpu", 1, "attention='flash' is not one of .* Did you mean 'splash'"),
    ],
)
def test_a_kernel_that_the_machine_lacks_is_refused(name, platform, context, message):
    with pytest.raises(ConfigError, match=message):
        _choose(name, platform, context=context)
