"""What is asked of a generator, checked, and what it answers."""

import dataclasses
import math
import operator
from collections.abc import Sequence

from layerskip_jax.decoding.adaptive import SKIPPED_KV
from layerskip_jax.decoding.exit_policy import ExitPolicy, candidate_exits, parse_policy
from layerskip_jax.hardware.bandwidth import read_bandwidth
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.schema import (
    LARGEST_UINT32,
    ConfigError,
    is_whole,
    is_whole_type,
    require,
    require_choice,
    require_count,
    require_range,
    require_whole,
)
from layerskip_jax.self_speculation import ACCEPTANCES, SURENESS

MODES = ("plain", "early_exit", "self_speculative", "draft_model", "auto", "adaptive")
PAIR_MODES = ("self_speculative", "draft_model")  # G drafts a cycle, always the same way
DEFAULT_KV, DEFAULT_ROOM, MOST_ROOM = "propagate", 3, 63


def read_stop_below(value: float | str, name: str = "stop_below") -> tuple[float, str]:
    """Returns the threshold of `0.5`, `lead:0.6` or `learned:0.5`, and of which score it is.

    Args:
      value: as a request has it.
      name: what it is called in messages.

    Raises:
      ConfigError: it is none of them, or not in (0, 1).
    """
    number, score = value, SURENESS[0]
    if isinstance(value, str):
        before, colon, after = value.partition(":")
        if colon and before in SURENESS:
            score = before
        try:
            number = float(after if score == before else value)
        except ValueError:
            raise ConfigError(
                f"{name}={value!r} is neither a number nor one after lead: or learned:, such "
                "as 0.5, lead:0.6 or learned:0.5"
            ) from None
    require_range(name, number, "(0, 1)")
    return float(number), score


def stop_below_text(value: float | str) -> str:
    """Returns such a threshold as a command line takes it."""
    threshold, score = read_stop_below(value)
    return f"{threshold:g}" if score == SURENESS[0] else f"{score}:{threshold:g}"


@dataclasses.dataclass(frozen=True)
class Request:
    """Prompts, and how to continue them.

    Attributes:
      prompts: token ids, a list a row; lengths may differ.
      max_new_tokens: the most new tokens a row gets.
      mode: `plain`; `early_exit` (the first E layers only); `self_speculative` (the tokens of
        `plain`, drafted by the first E layers); `draft_model` (the same, drafted by a second
        model); `auto` (the same, E and G chosen from cycle to cycle by what has been accepted so
        far); `adaptive` (each token by as many layers as `exit_when` has it run).
      exit_layer: E, for `early_exit` and `self_speculative`.
      draft_length: G, for `self_speculative` and `draft_model`.
      stop_below: for the same two and `auto`, drafting ends for a row after the first draft whose
        probability is below this, in (0, 1), as the exit or the draft model sees it; `lead:0.6`
        looks at the share of the draft and the second choice that the draft has, from 0.5 on, and
        `learned:0.6` asks the trained classifier of exits. None drafts G tokens always. The
        tokens are the same.
      pairs: for `auto`, the pairs (E, G) to choose from beside plain decoding; None takes some
        spread over the layers.
      end_token: id that ends a row.
      stop: sequences of ids that end a row; they are its last tokens.
      temperature: 0 decodes greedily; else any positive float32.
      top_k: draw from so many likeliest tokens only; None draws from all.
      top_p: draw from the fewest likeliest tokens that have this share of the probability, in
        (0, 1].
      seed: the seed of the noise, in 0..2**32 - 1; row i draws with seed + i, modulo 2**32.
      acceptance: how drawn tokens are accepted, `same_noise` (the very tokens of `plain`) or
        `rejection` (the same distribution).
      exit_when: for `adaptive`, when an exit is sure, such as `entropy:0.2`; see
        `decoding.exit_policy`.
      exits: for `adaptive`, the candidate exits E; None takes every eighth of the layers.
      kv: for `adaptive`, what skipped layers leave in the cache, `propagate` or `deferred`; see
        `decoding.adaptive`.
      room: for `deferred`, the most tokens of a row that wait.
      falling: for `adaptive`, whether the threshold falls along the text, see
        `falling_threshold`.
    """

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    mode: str = "plain"
    exit_layer: int | None = None
    draft_length: int | None = None
    stop_below: float | str | None = None
    pairs: Sequence[tuple[int, int]] | None = None
    end_token: int | None = None
    stop: Sequence[Sequence[int]] = ()
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    acceptance: str = "same_noise"
    exit_when: str | ExitPolicy | None = None
    exits: Sequence[int] | None = None
    kv: str = DEFAULT_KV
    room: int = DEFAULT_ROOM
    falling: bool = False

    @property
    def policy(self) -> ExitPolicy:
        """When an exit is sure.

        Raises:
          ConfigError: `exit_when` is no policy with a threshold.
        """
        policy = self.exit_when
        if isinstance(policy, str):
            policy = parse_policy(policy)
        if policy is None or policy.threshold is None:
            raise ConfigError(
                f"exit_when={self.exit_when!r} has no threshold; write NAME:THRESHOLD, such as "
                "entropy:0.2"
            )
        return policy

    def check(self, config: ModelConfig, draft_config: ModelConfig | None = None) -> None:
        """Raises ConfigError where this cannot be asked of such a model and such a draft model."""
        require_choice("mode", self.mode, MODES)
        require_choice("acceptance", self.acceptance, ACCEPTANCES)
        self._check_types()
        self._check_prompts(config)
        self._check_drafting(config)
        if self.mode == "draft_model":
            self._check_draft_model(draft_config)
        self._check_depth(config)
        vocab = config.vocab_size
        if self.end_token is not None:
            require(
                0 <= self.end_token < vocab, f"end_token={self.end_token} is outside 0..{vocab - 1}"
            )
        for sequence in self.stop:
            require(len(sequence) > 0, "a stop sequence is empty; leave it out")
            require(
                0 <= min(sequence) and max(sequence) < vocab,
                f"stop sequence {list(sequence)} holds a token outside 0..{vocab - 1}",
            )
        require_range("temperature", self.temperature, "[0, inf)", "0 is greedy")
        require(
            self.top_k is None or self.top_k >= 1,
            f"top_k={self.top_k} must be at least 1, or None for all tokens",
        )
        require_range("top_p", self.top_p, "(0, 1]")
        require_count("seed", self.seed, 0, LARGEST_UINT32)
        if self.temperature == 0:
            require(
                self.top_k is None and self.top_p == 1,
                "top_k and top_p have no meaning for temperature=0, which takes the likeliest "
                "token; set a temperature above 0",
            )

    def _check_types(self) -> None:
        """Refuses what the compiled programs would cut to a whole number, or fail at."""
        require_whole("max_new_tokens", self.max_new_tokens)
        for name in ("exit_layer", "draft_length", "end_token", "top_k"):
            if getattr(self, name) is not None:
                require_whole(name, getattr(self, name))
        named = [(f"prompt {index}", prompt) for index, prompt in enumerate(self.prompts)]
        named += [("a stop sequence", sequence) for sequence in self.stop]
        named += [("a pair", pair) for pair in self.pairs or ()]
        for name, ids in named:
            if all(is_whole_type(kind) for kind in set(map(type, ids))):
                continue
            wrong = next(number for number in ids if not is_whole(number))
            raise ConfigError(
                f"{name} holds {wrong!r}, which is no whole number; a text is turned into token "
                "ids by the model's own tokenizer"
            )

    def _check_prompts(self, config: ModelConfig) -> None:
        require(len(self.prompts) > 0, "prompts is empty; give at least one")
        require(
            self.max_new_tokens >= 1, f"max_new_tokens={self.max_new_tokens} must be at least 1"
        )
        for index, prompt in enumerate(self.prompts):
            require(len(prompt) > 0, f"prompt {index} is empty; begin it with at least one token")
            total = len(prompt) + int(self.max_new_tokens)
            require(
                total <= config.max_sequence_length,
                f"prompt {index} of {len(prompt)} tokens and max_new_tokens="
                f"{self.max_new_tokens} make {total}, and the context is "
                f"{config.max_sequence_length}; shorten one",
            )
            require(
                0 <= min(prompt) and max(prompt) < config.vocab_size,
                f"prompt {index} holds a token outside 0..{config.vocab_size - 1}; use the "
                "model's own tokenizer",
            )

    def _check_drafting(self, config: ModelConfig) -> None:
        mode, exit_layer, draft_length = self.mode, self.exit_layer, self.draft_length
        most = config.num_layers - 1
        require(
            mode in ("early_exit", "self_speculative") or exit_layer is None,
            f"exit_layer={exit_layer} has no meaning for mode={mode!r}",
        )
        require(
            mode in PAIR_MODES or draft_length is None,
            f"draft_length={draft_length} has no meaning for mode={mode!r}",
        )
        require(mode == "auto" or self.pairs is None, f"pairs have no meaning for mode={mode!r}")
        if self.stop_below is not None:
            read_stop_below(self.stop_below)
            require(
                mode in (*PAIR_MODES, "auto"),
                f"stop_below={self.stop_below!r} has no meaning for mode={mode!r}, which drafts "
                "nothing that could end early",
            )
        if mode in PAIR_MODES and draft_length is not None:
            require(draft_length >= 1, f"draft_length={draft_length} must be at least 1")
        if mode in ("plain", "draft_model"):
            return
        require(
            most >= 1, f"a model of one layer has no early exit; use mode='plain', not {mode!r}"
        )
        if mode == "adaptive":
            return
        if mode == "auto":
            for pair in self.pairs or ():
                require(
                    len(pair) == 2 and 1 <= pair[0] <= most and pair[1] >= 1,
                    f"pair {tuple(pair)} must be (E, G) with E in 1..{most} and G at least 1",
                )
            require(self.pairs is None or len(self.pairs) > 0, "pairs is empty; give one, or None")
            return
        if exit_layer is None or not 1 <= exit_layer <= most:
            raise ConfigError(f"exit_layer={exit_layer} must be in 1..{most} for mode={mode!r}")
        if mode == "self_speculative":
            require(draft_length is not None, "draft_length=None must be at least 1")

    def _check_draft_model(self, config: ModelConfig | None) -> None:
        if config is None:
            raise ConfigError(
                "mode='draft_model' needs a second model to draft with, and none was given; give "
                "Generator(model, draft_model=...) one, or let the model's own layers draft"
            )
        require(
            self.draft_length is not None,
            "draft_length=None must be at least 1: say how many tokens the draft model drafts a "
            "cycle, such as draft_length=5",
        )
        require(
            self.stop_below is None or read_stop_below(self.stop_below)[1] != "learned",
            f"stop_below={self.stop_below!r} asks whether an exit is right, and the draft model "
            "drafts with its last layer; give a probability, such as stop_below=0.5",
        )
        longest = max(map(len, self.prompts)) + int(self.max_new_tokens)
        require(
            longest <= config.max_sequence_length,
            f"the longest prompt and max_new_tokens={self.max_new_tokens} make {longest} tokens, "
            f"and the context of the draft model is {config.max_sequence_length}; shorten one, or "
            "decode without the draft model",
        )

    def _check_depth(self, config: ModelConfig) -> None:
        if self.mode != "adaptive":
            for name, default in (
                ("exit_when", None), ("exits", None), ("kv", DEFAULT_KV), ("room", DEFAULT_ROOM),
                ("falling", False),
            ):  # fmt: skip
                value = getattr(self, name)
                require(value == default, f"{name}={value!r} has no meaning for mode={self.mode!r}")
            return
        policy = self.policy
        require_choice("kv", self.kv, SKIPPED_KV)
        require_count("room", self.room, 1, MOST_ROOM)
        require(
            self.kv == "deferred" or self.room == DEFAULT_ROOM,
            f"room={self.room} has no meaning for kv={self.kv!r}, where nothing waits",
        )
        require(
            not self.falling or policy.kind.range == "[0, 1]",
            f"falling has no meaning for exit_when={str(policy)!r}: its threshold is no share",
        )
        exits = None if self.exits is None else tuple(self.exits)
        candidate_exits(config.num_layers, exits)


@dataclasses.dataclass(frozen=True)
class DepthRun:
    """How deep a generation ran, after the first token of each row.

    Attributes:
      layers: the candidate exits, and L.
      tokens: by those, tokens that stopped there.
      passes: by those, passes through the layers before it and after the exit before: a pass is
        for all rows of a batch that still need it.
      steps: tokens that the batch took one after another.
    """

    layers: tuple[int, ...]
    tokens: tuple[int, ...]
    passes: tuple[int, ...]
    steps: int

    def __add__(self, other: "DepthRun") -> "DepthRun":
        """Returns the counts of both, of the same exits."""

        def add(a, b):
            return tuple(map(sum, zip(a, b, strict=True)))

        return DepthRun(
            self.layers,
            add(self.tokens, other.tokens),
            add(self.passes, other.passes),
            self.steps + other.steps,
        )

    @property
    def mean_layers(self) -> float:
        """Mean of the layers at which tokens stopped; nan if there was no token."""
        total = sum(map(operator.mul, self.layers, self.tokens))
        return total / sum(self.tokens) if sum(self.tokens) else math.nan

    @property
    def mean_layers_of_batch(self) -> float:
        """Mean of the layers that the batch ran for a token of each row; nan if there was none."""
        sizes = map(operator.sub, self.layers, (0, *self.layers))
        total = sum(map(operator.mul, sizes, self.passes))
        return total / self.steps if self.steps else math.nan


@dataclasses.dataclass(frozen=True)
class Drafting:
    """How the drafts of a generation fared; two of them add up.

    Attributes:
      cycles: cycles in which tokens were drafted, summed over the rows.
      plain_cycles: cycles in which none were (`auto`), summed over the rows.
      tokens: new tokens that came out of cycles: all but the first of each row.
      drafted: drafts made, see `SpeculationCounts`.
      accepted: drafts accepted.
      examined: by draft position, drafts whose predecessors were all accepted.
      kept: by draft position, drafts accepted.
    """

    cycles: int
    plain_cycles: int
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
        cycles = self.cycles + self.plain_cycles
        return self.tokens / cycles if cycles else math.nan

    @property
    def acceptance_by_position(self) -> tuple[float, ...]:
        """Share accepted at each position, of those whose predecessors all were."""
        pairs = zip(self.kept, self.examined, strict=True)
        return tuple(kept / examined if examined else math.nan for kept, examined in pairs)


@dataclasses.dataclass(frozen=True)
class Generation:
    """The result of one call.

    Attributes:
      tokens: new tokens of each prompt, with the end token or stop sequence where reached.
      seconds: wall-clock time of the compiled programs, compilation not included.
      seconds_to_first_token: the part of them until each row had its first token.
      weight_bytes: weights that a device read after the first tokens, each as often as a pass
        through it; a draft model's too.
      drafting: for the modes that draft.
      depth: for `adaptive`.
    """

    tokens: list[list[int]]
    seconds: float
    seconds_to_first_token: float
    weight_bytes: int
    drafting: Drafting | None = None
    depth: DepthRun | None = None

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows over the time, reading the prompts included."""
        return sum(map(len, self.tokens)) / self.seconds

    @property
    def decoding_tokens_per_second(self) -> float:
        """New tokens but the first of each row over the time after it; nan if there are none."""
        tokens = sum(map(len, self.tokens)) - len(self.tokens)
        return tokens / (self.seconds - self.seconds_to_first_token) if tokens else math.nan

    @property
    def bandwidth_share(self) -> float:
        """Weights read a second, over what the device can read (`read_bandwidth`, measured once).

        Near 1 is the limit of the hardware; nan if there was no token after the first ones.
        """
        seconds = self.seconds - self.seconds_to_first_token
        return self.weight_bytes / seconds / read_bandwidth() if self.weight_bytes else math.nan
