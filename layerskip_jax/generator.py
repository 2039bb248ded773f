"""A model ready to generate: checks, buckets, and one compiled program for each of them."""

import dataclasses
import functools
import math
import time
from collections.abc import Sequence

import jax
import numpy as np

from layerskip_jax.decoding.autoregressive import Limits, Rows, decode
from layerskip_jax.decoding.weights import decoder_weights
from layerskip_jax.model.transformer import Transformer
from layerskip_jax.schema import ConfigError, require, require_choice
from layerskip_jax.self_speculation import SpeculationCounts, speculate

MODES = ("plain", "early_exit", "self_speculative")
SMALLEST_BUCKET = 16


@dataclasses.dataclass(frozen=True)
class Drafting:
    """How the drafts of a self-speculative generation fared; two of them add up.

    Attributes:
      cycles: cycles, summed over the rows.
      tokens: new tokens that came out of cycles: all but the first of each row.
      drafted: drafts made, see `SpeculationCounts`.
      accepted: drafts accepted.
      examined: by draft position, drafts whose predecessors were all accepted.
      kept: by draft position, drafts accepted.
    """

    cycles: int
    tokens: int
    drafted: int
    accepted: int
    examined: tuple[int, ...]
    kept: tuple[int, ...]

    def __add__(self, other: "Drafting") -> "Drafting":
        """Returns the counts of both."""

        def add(a, b):
            return tuple(map(sum, zip(a, b, strict=True))) if isinstance(a, tuple) else a + b

        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Drafting(*(add(a, b) for a, b in pairs))

    @property
    def acceptance(self) -> float:
        """Drafts accepted over drafts made, what the paper prints; nan if none was made."""
        return self.accepted / self.drafted if self.drafted else math.nan

    @property
    def tokens_per_cycle(self) -> float:
        """Mean new tokens of a cycle and row; nan if there was no cycle."""
        return self.tokens / self.cycles if self.cycles else math.nan

    @property
    def acceptance_by_position(self) -> tuple[float, ...]:
        """Share accepted at each position, of those whose predecessors all were."""
        pairs = zip(self.kept, self.examined, strict=True)
        return tuple(kept / examined if examined else math.nan for kept, examined in pairs)


@dataclasses.dataclass(frozen=True)
class Generation:
    """The result of one call.

    Attributes:
      tokens: new tokens of each prompt, with the end token where it was reached.
      seconds: wall-clock time of the compiled program, compilation not included.
      drafting: for the self-speculative mode.
    """

    tokens: list[list[int]]
    seconds: float
    drafting: Drafting | None = None

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows over the time, reading the prompts included."""
        return sum(map(len, self.tokens)) / self.seconds


def bucket(length: int, most: int) -> int:
    """Returns the padded size for `length`: a power of two, or `most` if that is less.

    Few sizes mean few programs to compile.
    """
    return min(max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()), most)


class Generator:
    """Decodes with one model.

    A program is compiled for each mode, E, G and bucket of prompt length, new tokens and
    batch it meets, and kept.

    Attributes:
      config: of the model.
      compilations: programs compiled so far.
    """

    def __init__(self, model: Transformer):
        """Lays the weights of `model` out for decoding."""
        self.config = model.config
        self.compilations = 0
        self._weights = decoder_weights(model)
        self._programs = {}

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        mode: str = "plain",
        exit_layer: int | None = None,
        draft_length: int | None = None,
        end_token: int | None = None,
    ) -> Generation:
        """Continues each prompt greedily.

        Args:
          prompts: token ids, a list a row; lengths may differ.
          max_new_tokens: the most new tokens a row gets.
          mode: `plain`, `early_exit` (the first E layers only) or `self_speculative` (the
            tokens of `plain`, drafted by the first E layers).
          exit_layer: E, for the latter two.
          draft_length: G, for the last.
          end_token: id that ends a row.

        Raises:
          ConfigError: before anything is compiled, naming the value and the remedy.
        """
        exit_layer, draft_length = self._check(
            prompts, max_new_tokens, mode, exit_layer, draft_length, end_token
        )
        context = self.config.max_sequence_length
        width = bucket(max(map(len, prompts)), context)
        padded = np.zeros((len(prompts), width), np.int32)
        for row, prompt in zip(padded, prompts, strict=True):
            row[: len(prompt)] = prompt
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        limits = Limits(np.int32(max_new_tokens), np.int32(-1 if end_token is None else end_token))
        arguments = jax.device_put((padded, lengths, limits))
        program = self._program(
            mode, exit_layer, draft_length, bucket(max_new_tokens, context), arguments
        )
        start = time.perf_counter()
        result = jax.block_until_ready(program(self._weights, *arguments))
        seconds = time.perf_counter() - start
        rows, counts = jax.device_get(result)
        tokens = [row[:n].tolist() for row, n in zip(rows.tokens, rows.count, strict=True)]
        return Generation(tokens, seconds, None if counts is None else _drafting(rows, counts))

    def _program(self, mode, exit_layer, draft_length, capacity, arguments):
        key = (mode, exit_layer, draft_length, capacity, arguments[0].shape)
        if key not in self._programs:
            settings = {"config": self.config, "exit_layer": exit_layer, "capacity": capacity}
            if mode == "self_speculative":
                function = functools.partial(speculate, draft_length=draft_length, **settings)
            else:

                def function(*arguments):
                    return decode(*arguments, **settings), None

            self._programs[key] = jax.jit(function).lower(self._weights, *arguments).compile()
            self.compilations += 1
        return self._programs[key]

    def _check(self, prompts, max_new_tokens, mode, exit_layer, draft_length, end_token):
        """Checks a request and returns E and G, as far as the mode has them."""
        config = self.config
        require_choice("mode", mode, MODES)
        require(len(prompts) > 0, "prompts is empty; give at least one")
        require(max_new_tokens >= 1, f"max_new_tokens={max_new_tokens} must be at least 1")
        for index, prompt in enumerate(prompts):
            require(len(prompt) > 0, f"prompt {index} is empty; begin it with at least one token")
            total = len(prompt) + max_new_tokens
            require(
                total <= config.max_sequence_length,
                f"prompt {index} of {len(prompt)} tokens and max_new_tokens={max_new_tokens} "
                f"make {total}, and the context is {config.max_sequence_length}; shorten one",
            )
            require(
                0 <= min(prompt) and max(prompt) < config.vocab_size,
                f"prompt {index} holds a token outside 0..{config.vocab_size - 1}; use the "
                "model's own tokenizer",
            )
        if end_token is not None:
            require(
                0 <= end_token < config.vocab_size,
                f"end_token={end_token} is outside 0..{config.vocab_size - 1}",
            )
        require(
            mode != "plain" or exit_layer is None,
            f"exit_layer={exit_layer} has no meaning for mode='plain', which runs every layer",
        )
        require(
            mode == "self_speculative" or draft_length is None,
            f"draft_length={draft_length} has no meaning for mode={mode!r}, which drafts nothing",
        )
        if mode == "plain":
            return config.num_layers, None
        most = config.num_layers - 1
        require(
            most >= 1, f"a model of one layer has no early exit; use mode='plain', not {mode!r}"
        )
        if exit_layer is None or not 1 <= exit_layer <= most:
            raise ConfigError(f"exit_layer={exit_layer} must be in 1..{most} for mode={mode!r}")
        if mode == "self_speculative" and (draft_length is None or draft_length < 1):
            raise ConfigError(f"draft_length={draft_length} must be at least 1")
        return exit_layer, draft_length


def _drafting(rows: Rows, counts: SpeculationCounts) -> Drafting:
    return Drafting(
        cycles=int(counts.cycles.sum()),
        tokens=int(rows.count.sum()) - len(rows.count),
        drafted=int(counts.drafted.sum()),
        accepted=int(counts.accepted.sum()),
        examined=tuple(counts.examined.sum(axis=0).tolist()),
        kept=tuple(counts.kept.sum(axis=0).tolist()),
    )
