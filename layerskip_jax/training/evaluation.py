"""Loss and perplexity of every exit on a fixed set of windows."""

import math
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from layerskip_jax.config import RunConfig
from layerskip_jax.data.batches import BatchSource
from layerskip_jax.model.definition import ModelDefinition, Parameters
from layerskip_jax.ops.linear_cross_entropy import (
    ONE_DEVICE,
    HeadInputs,
    Layout,
    linear_cross_entropy,
)
from layerskip_jax.training.setup import TrainSetup
from layerskip_jax.training.step import Batch


def make_exit_scorer(
    definition: ModelDefinition, *, chunk: int, layout: Layout = ONE_DEVICE
) -> Callable:
    """Returns a jitted `score(parameters, batch) -> (nll [L], tokens)`.

    `batch` holds `[N, B, S]` arrays as the train step takes them. `nll` is the summed
    cross-entropy in nats of the head on each layer's output, over the valid targets, which `tokens`
    counts. No layer is dropped. `layout` tells how the batch lies over the devices.
    """

    @jax.jit
    def score(parameters, batch) -> tuple[Float[Array, "L"], Int[Array, ""]]:
        model = definition.model(parameters)
        head, one = model.head_weight, jnp.ones(1)

        def microbatch(total, batch):
            def read(carry, _, x):
                inputs = HeadInputs(x[None], batch.targets, batch.valid, one)
                nll, _ = linear_cross_entropy(
                    (inputs,), head, norm=model.final_norm, chunk=chunk,
                    vocab_size=model.config.vocab_size, layout=layout,
                )  # fmt: skip
                return carry, nll

            x = model.embed(batch.tokens)
            rows = model.row_inputs(batch.positions, batch.segment_ids)
            _, nll = model.scan_layers(x, rows, read, None)
            return total + nll, None

        zeros = jnp.zeros(definition.config.num_layers)
        nll, _ = jax.lax.scan(microbatch, zeros, batch)
        return nll, batch.valid.sum()

    return score


def evaluate_exits(score: Callable, parameters: Parameters, batches: Iterable) -> list[dict]:
    """Averages `score` over batches.

    Returns:
      For each exit `{"layers": E, "loss": nats per token, "perplexity": exp(loss)}`,
      shallowest first.
    """
    total, tokens = 0.0, 0
    for batch in batches:
        nll, count = score(parameters, batch)
        # float64 on the host, where a sum over a long validation set keeps its digits.
        total = total + np.asarray(nll, np.float64)
        tokens += int(count)
    losses = total / max(tokens, 1)
    return [
        {"layers": layer + 1, "loss": float(loss), "perplexity": math.exp(min(loss, 700))}
        for layer, loss in enumerate(np.atleast_1d(losses))
    ]


def validation_batches(config: RunConfig, setup: TrainSetup, limit: int = 0) -> Iterator[Batch]:
    """Yields the validation set on the mesh.

    Args:
      config: names the data and the batch size.
      setup: places the batches.
      limit: batches, of windows drawn by a fixed seed; 0 takes every window, in order.
    """

    def source(shuffle: bool) -> BatchSource:
        rows = config.training.batch_size
        return BatchSource(config.data.path, "validation", batch_size=rows, seed=0, shuffle=shuffle)

    whole = source(shuffle=False)
    part = 0 < limit < whole.steps_per_epoch
    chosen = source(shuffle=True) if part else whole
    for step in range(limit if part else whole.steps_per_epoch):
        yield setup.placement.place(Batch(*chosen.rows(step, setup.placement.rows)))
