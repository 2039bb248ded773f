"""Elementwise parts of a layer whose backward pass computes them again from their inputs.

Automatic differentiation saves each factor of each product. These keep the inputs alone, which
the layer's matrix products have written anyway, and a few operations an element make the rest.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def swiglu(gate: Float[Array, "B S F"], up: Float[Array, "B S F"]) -> Float[Array, "B S F"]:
    """Returns silu(gate) * up (Shazeer 2020, GLU Variants Improve Transformer)."""
    return jax.nn.silu(gate) * up


def _swiglu_forward(gate, up):
    return swiglu(gate, up), (gate, up)


def _swiglu_backward(saved, gradient):
    gate, up = saved
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return gradient * up * (sigmoid + silu * (1 - sigmoid)), gradient * silu


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "... D"], scale: Float[Array, "D"], eps: float):
    """Returns x / rms(x) * scale in the dtype of x, computed in float32."""
    return _rms_forward(x, scale, eps)[0]


def _rms_forward(x, scale, eps):
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * inverse * scale).astype(x.dtype), (x, scale, inverse)


def _rms_backward(eps, saved, gradient):
    x, scale, inverse = saved
    x32, gradient = x.astype(jnp.float32), gradient.astype(jnp.float32)
    normed = x32 * inverse
    scaled = gradient * scale
    inner = jnp.mean(scaled * normed, axis=-1, keepdims=True)
    d_scale = jnp.sum(gradient * normed, axis=range(x.ndim - 1))
    return ((scaled - normed * inner) * inverse).astype(x.dtype), d_scale


rms_norm.defvjp(_rms_forward, _rms_backward)
