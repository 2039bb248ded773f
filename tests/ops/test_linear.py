"""Products and elementwise parts with gradients of their own, against those of autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layerskip_jax.config import MeshConfig
from layerskip_jax.distributed.mesh import MeshShape
from layerskip_jax.ops.elementwise import rms_norm, swiglu
from layerskip_jax.ops.linear import contract, contract_tokens
from layerskip_jax.training.setup import make_setup
from tests.helpers import small_run


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def gradients(function, *arguments):
    """Value and gradients of a sum that weighs each element differently."""

    def total(*arguments):
        y = function(*arguments).astype(jnp.float32)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

    return jax.value_and_grad(total, argnums=tuple(range(len(arguments))))(*arguments)


def assert_equal(ours, theirs, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), tolerance, tolerance
        )


@pytest.mark.parametrize(("inner", "outer"), [((5,), (7,)), ((5,), (3, 4)), ((3, 4), (6,))])
def test_a_product_over_tokens_is_the_product(inner, outer):
    x, w = normal(0, 2, 6, *inner), normal(1, *inner, *outer)
    axes = len(inner)
    assert contract_tokens(x, w, axes).shape == (2, 6, *outer)
    assert_equal(
        gradients(lambda x, w: contract_tokens(x, w, axes), x, w),
        gradients(lambda x, w: contract(x, w, axes), x, w),
    )


def test_swiglu_is_its_definition():
    gate, up = normal(0, 2, 3, 8), normal(1, 2, 3, 8)
    assert_equal(
        gradients(swiglu, gate, up), gradients(lambda gate, up: jax.nn.silu(gate) * up, gate, up)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_norm_is_its_definition(dtype):
    x, scale = normal(0, 2, 3, 8).astype(dtype), 1 + normal(1, 8)

    def definition(x, scale):
        x32 = x.astype(jnp.float32)
        rms = jnp.sqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + 1e-5)
        return (x32 / rms * scale).astype(x.dtype)

    ours = gradients(lambda x, scale: rms_norm(x, scale, 1e-5), x, scale)
    assert_equal(ours, gradients(definition, x, scale), 1e-5 if dtype == "float32" else 2e-2)


def test_tokens_are_one_axis_only_where_no_device_shares_a_row():
    def product(devices, **shape):
        config = small_run(mesh=MeshConfig(shape=MeshShape(**shape)))
        return make_setup(config, jax.devices()[:devices]).definition.product

    assert product(1, data=1) is contract_tokens
    assert product(4, data=2, fsdp=2) is contract_tokens
    assert product(4, data=2, context=2) is contract
    assert product(2, tensor=2, data=1) is contract
