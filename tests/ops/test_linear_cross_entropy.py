from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from layerskip_jax.distributed.mesh import MeshShape, make_mesh
from layerskip_jax.ops.linear_cross_entropy import HeadInputs, Layout
from layerskip_jax.ops.linear_cross_entropy import linear_cross_entropy as score_parts
from tests.helpers import REAL_PROGRAM


def linear_cross_entropy(states, head, targets, valid, weights, **settings):
    """One part, as most tests need it."""
    loss, (sums,) = score_parts((HeadInputs(states, targets, valid, weights),), head, **settings)
    return loss, sums


def _reference(states, head, targets, valid, weights):
    """The definition, in float64, with all logits at once."""
    states, head = np.asarray(states, np.float64), np.asarray(head, np.float64)
    logits = np.einsum("absd,dv->absv", states, head)
    top = logits.max(axis=-1, keepdims=True)
    log_z = np.log(np.exp(logits - top).sum(axis=-1)) + top[..., 0]
    picked = np.take_along_axis(logits, np.asarray(targets)[None, ..., None], axis=-1)[..., 0]
    sums = ((log_z - picked) * np.asarray(valid)).sum(axis=(1, 2))
    d_logits = np.exp(logits - log_z[..., None])
    d_logits -= np.eye(head.shape[1])[np.asarray(targets)]
    d_logits *= (np.asarray(weights)[:, None, None] * np.asarray(valid))[..., None]
    d_states = np.einsum("absv,dv->absd", d_logits, head)
    d_head = np.einsum("absd,absv->dv", states, d_logits)
    return (np.asarray(weights) * sums).sum(), sums, d_states, d_head


def _case(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    states = jax.random.normal(keys[0], (3, 2, 10, 8)).astype(dtype)
    head = jax.random.normal(keys[1], (8, 23))
    targets = jax.random.randint(keys[2], (2, 10), 0, 23)
    valid = jax.random.bernoulli(keys[3], 0.7, (2, 10))
    return states, head, targets, valid, jnp.array([0.3, 0.0, 0.05])


def test_padded_columns_of_the_head_have_no_probability_and_no_gradient():
    states, head, targets, valid, weights = _case()
    padded = jnp.pad(head, ((0, 0), (0, 9)), constant_values=50.0)

    def function(states, head):
        return linear_cross_entropy(
            states, head, targets, valid, weights, chunk=3, z_loss=1e-2, vocab_size=23
        )[0]

    loss, (d_states, d_head) = jax.value_and_grad(function, (0, 1))(states, head)
    found, (d_states_padded, d_head_padded) = jax.value_and_grad(function, (0, 1))(states, padded)
    np.testing.assert_allclose(found, loss, rtol=1e-6)
    np.testing.assert_allclose(d_states_padded, d_states, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(d_head_padded[:, :23], d_head, rtol=1e-5, atol=1e-6)
    assert not d_head_padded[:, 23:].any()


LAYOUTS = [
    (1, Layout()),
    (3, Layout(rows=2)),
    (5, Layout()),
    (10, Layout(rows=2)),
    (64, Layout()),
    (3, Layout(positions=5)),
    (4, Layout(rows=2, positions=5, inner=2)),
    (3, Layout(inner=2)),
    (1, Layout(inner=5)),
]


@pytest.mark.parametrize("chunk, layout", LAYOUTS)
def test_loss_and_gradients_equal_the_float64_reference(chunk, layout):
    states, head, targets, valid, weights = _case()
    loss, sums, d_states, d_head = _reference(states, head, targets, valid, weights)

    def function(states, head):
        return linear_cross_entropy(
            states, head, targets, valid, weights, chunk=chunk, layout=layout
        )

    (value, by_slot), gradients = jax.jit(
        jax.value_and_grad(function, argnums=(0, 1), has_aux=True)
    )(states, head)
    assert value == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(by_slot, [sums[0], 0, sums[2]], rtol=1e-6)
    np.testing.assert_allclose(gradients[0], d_states, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradients[1], d_head, rtol=1e-5, atol=1e-6)
    # without differentiation the same numbers come out
    plain = jax.jit(function)(states, head)
    np.testing.assert_allclose(plain[0], value, rtol=1e-6)


class _Scale(NamedTuple):
    """A norm with a parameter, as simple as one can be."""

    scale: jax.Array

    def __call__(self, x):
        return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * self.scale


@pytest.mark.parametrize("chunk, shards, z_loss", [(3, 1, 0.0), (4, 2, 0.1), (64, 1, 0.1)])
def test_parts_norm_and_z_loss_against_plain_differentiation_in_float64(chunk, shards, z_loss):
    """Two parts of different lengths share the head; one slot is off."""
    states, head, targets, valid, weights = _case()
    norm = _Scale(1 + 0.1 * jnp.arange(8.0))
    short = HeadInputs(states[:2, :, 3:7], targets[:, 3:7], valid[:, 3:7], weights[:2])
    long = HeadInputs(states[2:], targets, valid, weights[2:])

    def fused(states, head, norm):
        parts = tuple(
            part._replace(states=s) for part, s in zip((short, long), states, strict=True)
        )
        return score_parts(
            parts, head, norm=norm, chunk=chunk, layout=Layout(rows=shards), z_loss=z_loss
        )

    def naive(states, head, norm):
        total = 0.0
        for part, s in zip((short, long), states, strict=True):
            logits = jnp.einsum("abmd,dv->abmv", norm(s), head)
            log_z = jax.nn.logsumexp(logits, axis=-1)
            picked = jnp.take_along_axis(logits, part.targets[None, ..., None], axis=-1)[..., 0]
            token = jnp.where(part.valid, log_z - picked + z_loss * log_z**2, 0)
            total += jnp.sum(part.weights.astype(s.dtype) * token.sum(axis=(1, 2)))
        return total

    arguments = ((short.states, long.states), head, norm)
    (value, sums), gradients = jax.jit(jax.value_and_grad(fused, (0, 1, 2), has_aux=True))(
        *arguments
    )
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), arguments)
        expected, reference = jax.value_and_grad(naive, (0, 1, 2))(*double)
    assert value == pytest.approx(float(expected), rel=1e-6)
    assert [len(part) for part in sums] == [2, 1]
    assert sums[0][1] == 0  # off
    for found, wanted in zip(jax.tree.leaves(gradients), jax.tree.leaves(reference), strict=True):
        largest = np.abs(np.asarray(wanted)).max()
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6 * largest)


def test_a_cotangent_scales_the_gradient():
    states, head, targets, valid, weights = _case()

    def function(factor, head):
        return factor * linear_cross_entropy(states, head, targets, valid, weights, chunk=4)[0]

    once = jax.grad(function, argnums=1)(1.0, head)
    np.testing.assert_allclose(jax.grad(function, argnums=1)(-2.5, head), -2.5 * once, rtol=1e-6)


def test_bfloat16_states_keep_a_float32_head_gradient():
    states, head, targets, valid, weights = _case(jnp.bfloat16)
    gradients = jax.grad(
        lambda s, h: linear_cross_entropy(s, h, targets, valid, weights, chunk=5)[0], (0, 1)
    )(states, head)
    assert gradients[0].dtype == jnp.bfloat16
    assert gradients[1].dtype == jnp.float32
    *_, d_head = _reference(states.astype(jnp.float32), head, targets, valid, weights)
    assert np.linalg.norm(gradients[1] - d_head) < 2e-2 * np.linalg.norm(d_head)


def test_the_logits_of_all_tokens_are_never_held():
    """At 16 chunks the gradient needs far less memory than the logits of every token."""
    slots, batch, length, width, vocab = 4, 2, 256, 16, 4096
    shapes = (
        jax.ShapeDtypeStruct((slots, batch, length, width), jnp.float32),
        jax.ShapeDtypeStruct((width, vocab), jnp.float32),
    )
    targets, valid = jnp.zeros((batch, length), jnp.int32), jnp.ones((batch, length), bool)
    function = jax.grad(
        lambda s, h: linear_cross_entropy(s, h, targets, valid, jnp.ones(slots), chunk=16)[0],
        argnums=(0, 1),
    )
    memory = jax.jit(function).lower(*shapes).compile(REAL_PROGRAM).memory_analysis()
    assert memory.temp_size_in_bytes < slots * batch * length * vocab * 4 / 4


def test_devices_add_the_heads_gradient_up_once():
    """No collective inside the loop over chunks: they are all in the entry computation."""
    mesh = make_mesh(MeshShape(data=8))
    batch = NamedSharding(mesh, PartitionSpec(None, "data"))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    function = jax.grad(
        lambda states, head, targets, valid: linear_cross_entropy(
            states, head, targets, valid, jnp.ones(2), chunk=4, layout=Layout(rows=8)
        )[0],
        argnums=(0, 1),
    )
    text = (
        jax.jit(function, out_shardings=(batch, whole))
        .lower(
            jax.ShapeDtypeStruct((2, 16, 32, 8), jnp.float32, sharding=batch),
            jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=whole),
            jax.ShapeDtypeStruct((16, 32), jnp.int32, sharding=rows),
            jax.ShapeDtypeStruct((16, 32), jnp.bool_, sharding=rows),
        )
        .compile(REAL_PROGRAM)
        .as_text()
    )
    before_entry, entry = text.split("\nENTRY ")
    assert "while(" in entry
    assert "all-reduce(" in entry
    for collective in ("all-reduce(", "all-gather(", "reduce-scatter(", "all-to-all("):
        assert collective not in before_entry
