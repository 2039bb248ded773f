"""Loss and perplexity of every exit on a fixed set of windows."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from layerskip_jax.config import RunConfig, folder_name
from layerskip_jax.data.batches import BatchSource
from layerskip_jax.data.manifest import TOKENIZER_FILE, Manifest, read_manifest
from layerskip_jax.distributed.processes import BatchPlacement
from layerskip_jax.model.adapters import adapted
from layerskip_jax.model.definition import ModelDefinition, Parameters
from layerskip_jax.model.transformer import Transformer
from layerskip_jax.ops.linear_cross_entropy import (
    NO_NORM,
    ONE_DEVICE,
    HeadInputs,
    Layout,
    linear_cross_entropy,
)
from layerskip_jax.schema import UserError
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
            def read(carry, adapter, x):
                norm = model.final_norm
                if adapter is not None:
                    x, norm = adapted(x, *adapter, model.config.norm_eps), NO_NORM
                inputs = HeadInputs(x[None], batch.targets, batch.valid, one)
                nll, _ = linear_cross_entropy(
                    (inputs,), head, norm=norm, chunk=chunk,
                    vocab_size=model.config.vocab_size, layout=layout,
                )  # fmt: skip
                return carry, nll

            x = model.embed(batch.tokens)
            rows = model.row_inputs(batch.positions, batch.segment_ids)
            _, nll = model.scan_layers(x, rows, read, None, exit_adapters(model))
            return total + nll, None

        zeros = jnp.zeros(definition.config.num_layers)
        nll, _ = jax.lax.scan(microbatch, zeros, batch)
        return nll, batch.valid.sum()

    return score


def exit_adapters(model: Transformer) -> tuple[Array, Array, Array] | None:
    """Returns scales, A and B of all layers, the final norm and 0 where an exit has no adapter."""
    config = model.config
    if not config.exits.adapters:
        return None
    at = jnp.asarray(config.exits.adapters) - 1
    scales = jnp.tile(model.final_norm.scale[...], (config.num_layers, 1))
    down, up = (
        jnp.zeros((config.num_layers, *part.shape[1:])).at[at].set(part)
        for part in (model.exits.down[...], model.exits.up[...])
    )
    return scales.at[at].set(model.exits.scale[...]), down, up


def evaluate_exits(score: Callable, parameters: Parameters, batches: Iterable) -> list[dict]:
    """Averages `score` over batches.

    Returns:
      For each exit `{"layers": E, "loss": nats per token, "perplexity": exp(loss)}`,
      shallowest first; the perplexity is infinite where float64 has no such number.
    """
    total, tokens = 0.0, 0
    for batch in batches:
        nll, count = score(parameters, batch)
        # float64 on the host, where a sum over a long validation set keeps its digits.
        total = total + np.asarray(nll, np.float64)
        tokens += int(count)
    losses = np.atleast_1d(total / max(tokens, 1))
    with np.errstate(over="ignore"):
        perplexities = np.exp(losses)
    return [
        {"layers": layer + 1, "loss": float(loss), "perplexity": float(perplexity)}
        for layer, (loss, perplexity) in enumerate(zip(losses, perplexities, strict=True))
    ]


def not_finite(exits: list[dict]) -> list[int]:
    """Returns the exits, in layers, whose loss is not finite, given what `evaluate_exits` does."""
    return [entry["layers"] for entry in exits if not math.isfinite(entry["loss"])]


class ValidationSet:
    """The validation windows of a run, opened before anything is computed.

    Attributes:
      sequence_length: S of the windows.
    """

    def __init__(self, config: RunConfig, path: str | None = None, split: str = "validation"):
        """Opens them.

        Args:
          config: names the data, what becomes of damaged records, and the batch size.
          path: prepared data; None takes `config.data.path`.
          split: of that data.

        Raises:
          UserError: there are none, or the index of their files is damaged.
        """
        self._config, self._opened, self._split = config, [], split
        self._path = config.data.path if path is None else path
        self._whole = self._open(shuffle=False)
        self.sequence_length = self._whole.sequence_length

    def _open(self, shuffle: bool) -> BatchSource:
        source = BatchSource(
            self._path,
            self._split,
            batch_size=self._config.training.batch_size,
            seed=0,
            shuffle=shuffle,
            skip_damaged=self._config.data.on_damaged == "skip",
        )
        self._opened.append(source)
        return source

    @functools.cached_property
    def _drawn(self) -> BatchSource:
        """The same windows in an order drawn by a fixed seed, for evaluations of a part."""
        return self._open(shuffle=True)

    @property
    def left_out(self) -> int:
        """Damaged records that this process has read as padding so far."""
        return sum(source.damaged for source in self._opened)

    def batches(self, placement: BatchPlacement, limit: int = 0) -> Iterator[Batch]:
        """Yields the windows on the mesh.

        Args:
          placement: lays the batches out.
          limit: batches, of windows drawn by a fixed seed; 0 takes every window, in order.
        """
        part = 0 < limit < self._whole.steps_per_epoch
        chosen = self._drawn if part else self._whole
        for step in range(limit if part else self._whole.steps_per_epoch):
            yield placement.place(Batch(*chosen.rows(step, placement.rows)))


def open_further(config: RunConfig, manifest: Manifest) -> dict[str, ValidationSet]:
    """Opens the sets that are evaluated beside the run's own validation split.

    These are the sets that its data hold out by name, and those of `config.data.validation`, by the
    names of their folders.

    Args:
      config: the run, its vocabulary known.
      manifest: of the data that it trains on.

    Raises:
      UserError: a folder is not prepared, by another tokenizer, of windows too long for the model
        or with a token that it does not have, or by a name that is taken; or see `ValidationSet`.
    """
    longest = config.model.max_sequence_length
    sets = {
        one.name: ValidationSet(config, config.data.path, one.name) for one in manifest.held_out
    }
    for path in config.data.validation:
        theirs = read_manifest(path)
        if (name := folder_name(path)) in sets:
            raise UserError(
                f"{path} of config.data.validation is called {name!r}, as a set that "
                f"{config.data.path} holds out; rename the folder"
            )
        if theirs.tokenizer_sha256 != manifest.tokenizer_sha256:
            raise UserError(
                f"{path} of config.data.validation was prepared with another tokenizer than "
                f"{config.data.path}; prepare it with "
                f"--tokenizer={config.data.path}/{TOKENIZER_FILE}"
            )
        if theirs.sequence_length > longest:
            raise UserError(
                f"{path} of config.data.validation has windows of {theirs.sequence_length} tokens, "
                f"longer than config.model.max_sequence_length={longest}; prepare shorter ones"
            )
        theirs.check_tokens(config.model.vocab_size, path)
        sets[name] = ValidationSet(config, path)
    return sets
