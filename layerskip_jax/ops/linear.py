"""Products of activations and weights, and how their gradients are formed.

The weight gradient of `x @ w` contracts over rows and positions alike. Written over two axes, XLA's
CPU backend first copies what was computed before it into another order; over one axis of all
tokens it does not. Merging the axes would move data where devices share the positions of a row,
so it is done where they do not, and only on CPUs: other backends contract over several axes as
they are.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# (activations [B, S, *I], weights [*I, *O], axes of I) -> [B, S, *O]
Product = Callable[[Array, Array, int], Array]


def contract(x: Float[Array, "B S *I"], w: Float[Array, "..."], axes: int = 1) -> Array:
    """Returns x times w over the last `axes` axes of x, leaving the gradients to autodiff."""
    return jnp.tensordot(x, w, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def contract_tokens(x: Float[Array, "B S *I"], w: Float[Array, "..."], axes: int = 1) -> Array:
    """Returns the same, with a weight gradient that contracts over one axis of all tokens."""
    return contract(x, w, axes)


def _flat(x: Array, first: int) -> Array:
    """Returns x as a matrix, of which the axes before `first` are the rows."""
    return x.reshape(math.prod(x.shape[:first]), -1)


def _forward(x, w, axes):
    return contract(x, w, axes), (x, w)


def _backward(axes, saved, gradient):
    x, w = saved
    # Both products read the gradient: without a barrier its elementwise chain is computed in each.
    flat = jax.lax.optimization_barrier(_flat(gradient, 2))
    d_x = (flat @ _flat(w, axes).T).reshape(x.shape)
    return d_x, (_flat(x, 2).T @ flat).reshape(w.shape)


contract_tokens.defvjp(_forward, _backward)
