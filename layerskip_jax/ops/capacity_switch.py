"""A switch over branches that differ in how many rows they compute."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from layerskip_jax.ops.remat import rematerialised


def take_rows(x: Array, index: Int[Array, "G C"]) -> Array:
    """Returns the rows at `index` of each group of x, `[G, g, ...]`."""
    return jax.vmap(lambda rows, i: rows[i])(x, index)


@jax.custom_vjp
def permute_rows(x: Array, order: Int[Array, "G g"], inverse: Int[Array, "G g"]) -> Array:
    """Reorders the rows of each group; the gradient goes back by a gather, not a scatter."""
    return take_rows(x, order)


def _permute_forward(x, order, inverse):
    return take_rows(x, order), inverse


def _permute_backward(inverse, gradient):
    return take_rows(gradient, inverse), None, None


permute_rows.defvjp(_permute_forward, _permute_backward)


def switch_with_shared_residuals(branches: list[Callable], remat: str, groups: int) -> Callable:
    """Returns `lax.switch` over branches that differ in their number of rows only.

    Automatic differentiation of a switch makes every branch return the residuals of all of them,
    each with its own shapes. Here a branch returns its residuals padded to those of the last
    one, which has the most rows, so that they take the room of one branch.

    Args:
      branches: functions of (differentiable, fixed), by rising number of rows; the first may
        have none and return the second of `differentiable`. Gradients flow to the first argument.
      remat: what the backward pass computes again (see `rematerialised`).
      groups: every residual's rows come in so many equal groups.
    """
    pull_backs = {}  # by branch: how to make its pull-back again from residuals

    def with_residuals(number, differentiable, fixed):
        function = rematerialised(branches[number], remat)
        y, pull_back = jax.vjp(lambda inputs: function(inputs, fixed), differentiable)
        leaves, structure = jax.tree.flatten(pull_back)
        # Inputs are at hand in the backward pass: they are not saved a second time.
        given = {id(leaf): n for n, leaf in enumerate(jax.tree.leaves((differentiable, fixed)))}
        # Constants of a kernel, such as its masks, are the same for every layer.
        sources = [leaf if isinstance(leaf, np.ndarray) else given.get(id(leaf)) for leaf in leaves]
        saved = [leaf for leaf, source in zip(leaves, sources, strict=True) if source is None]
        pull_backs[number] = structure, sources, [leaf.shape for leaf in saved]
        return y, saved

    @jax.custom_vjp
    def switch(index, differentiable, fixed):
        return jax.lax.switch(index, branches, differentiable, fixed)

    def forward(index, differentiable, fixed):
        last = functools.partial(with_residuals, len(branches) - 1)
        _, largest = jax.eval_shape(last, differentiable, fixed)

        def padded(number):
            def run(differentiable, fixed):
                y, saved = with_residuals(number, differentiable, fixed)
                if len(saved) < len(largest):  # a branch that runs nothing saves nothing
                    return y, [jnp.zeros(leaf.shape, leaf.dtype) for leaf in largest]
                return y, [
                    _fit_rows(leaf, wanted.shape, groups)
                    for leaf, wanted in zip(saved, largest, strict=True)
                ]

            return run

        every = [padded(number) for number in range(len(branches))]
        y, saved = jax.lax.switch(index, every, differentiable, fixed)
        return y, (index, differentiable, fixed, saved)

    def backward(residuals, gradient):
        index, differentiable, fixed, saved = residuals

        def pull(number):
            def run(differentiable, fixed, saved, gradient):
                structure, sources, shapes = pull_backs[number]
                given = jax.tree.leaves((differentiable, fixed))
                fitted = [
                    _fit_rows(a, shape, groups) for a, shape in zip(saved, shapes, strict=False)
                ]
                fitted = iter(fitted)
                leaves = [
                    next(fitted) if source is None
                    else given[source] if isinstance(source, int)
                    else source
                    for source in sources
                ]  # fmt: skip
                return jax.tree.unflatten(structure, leaves)(gradient)[0]

            return run

        every = [pull(number) for number in range(len(branches))]
        return None, jax.lax.switch(index, every, differentiable, fixed, saved, gradient), None

    switch.defvjp(forward, backward)
    return switch


def _fit_rows(x: Array, shape: tuple[int, ...], groups: int) -> Array:
    """Pads or cuts the rows of each group, along the axis in which `shape` differs from x's."""
    for axis, (have, want) in enumerate(zip(x.shape, shape, strict=True)):
        if have == want:
            continue
        x = jnp.moveaxis(x, axis, 0)
        x = x.reshape(groups, have // groups, *x.shape[1:])
        if want < have:
            x = x[:, : want // groups]
        else:
            x = jnp.pad(x, [(0, 0), (0, (want - have) // groups)] + [(0, 0)] * (x.ndim - 2))
        x = jnp.moveaxis(x.reshape(want, *x.shape[2:]), 0, axis)
    return x
