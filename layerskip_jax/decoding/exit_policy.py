"""When an exit is sure enough to stop at: what DeeBERT, CALM, PABEE and BERxiT each look at.

A token runs up to the first candidate exit whose score passes the policy's threshold; the last
layer needs none. Scores are of the distribution before temperature, top-k and top-p, so that how
tokens are drawn does not change how deep they run.

| name | score | sure when the score is | source |
|---|---|---|---|
| entropy | H(p) / ln V, H in nats | below | DeeBERT (H itself, of few classes) |
| margin | p(first) - p(second) | above | CALM, "softmax response" |
| saturation | cos(x_E, x_F), F the candidate before | above | CALM, "hidden-state saturation" |
| patience | candidates in a row that chose the same token | at least | PABEE |
| learned | sigmoid(w z + b), z what the head reads | above | BERxiT, "learning to exit" |
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from layerskip_jax.decoding.sampling import likeliest
from layerskip_jax.decoding.weights import DecoderWeights
from layerskip_jax.model.exits import every_eighth
from layerskip_jax.schema import (
    ConfigError,
    nearest,
    require,
    require_count,
    require_range,
    require_whole,
)

# CALM's falling threshold: by so much it begins above (0.9 T), and how fast that is forgotten.
FALLING_SHARE, FALLING_RATE = 0.1, 4.0


class Candidate(NamedTuple):
    """What a candidate exit shows of each token, and what the next one compares with.

    Attributes:
      state: x_E, the states after the first E layers.
      read: z, what the head reads of them.
      logits: of z; None for a policy that does without.
      choice: the likeliest token; 0 for a policy without logits.
      streak: candidates in a row, this one the last, that chose it.
    """

    state: Float[Array, "B S D"]
    read: Float[Array, "B S D"]
    logits: Float[Array, "B S V"] | None
    choice: Int[Array, "B S"]
    streak: Int[Array, "B S"]


def look(
    state: Float[Array, "B S D"],
    read: Float[Array, "B S D"],
    logits: Float[Array, "B S V"] | None,
    before: Candidate | None,
) -> Candidate:
    """Returns what a candidate exit shows, given the candidate before it (None at the first)."""
    if logits is None:
        nothing = jnp.zeros(state.shape[:2], jnp.int32)
        return Candidate(state, read, None, nothing, nothing)
    choice = likeliest(logits)
    streak = jnp.ones_like(choice)
    if before is not None:
        streak = jnp.where(choice == before.choice, before.streak + 1, 1)
    return Candidate(state, read, logits, choice, streak)


def entropy_share(logits: Float[Array, "... V"]) -> Float[Array, "..."]:
    """Returns H(p) / ln V in [0, 1], H in nats; of one token 0.

    Tokens at -inf, such as padding of the vocabulary, count in neither.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    nats = -jnp.sum(jnp.where(jnp.isneginf(log_p), 0, jnp.exp(log_p) * log_p), axis=-1)
    tokens = jnp.sum(~jnp.isneginf(log_p), axis=-1).astype(jnp.float32)
    return jnp.where(tokens > 1, nats / jnp.log(jnp.maximum(tokens, 2)), 0)


def margin(logits: Float[Array, "... V"]) -> Float[Array, "..."]:
    """Returns p(first) - p(second)."""
    p = jax.nn.softmax(logits.astype(jnp.float32))
    first = jnp.max(p, axis=-1)
    # Two maxima and no top-k, which would gather a vocabulary that is split over devices.
    ids = jnp.arange(p.shape[-1], dtype=jnp.int32)
    second = jnp.max(jnp.where(ids == likeliest(logits)[..., None], 0, p), axis=-1)
    return first - second


def top_probability(logits: Float[Array, "... V"]) -> Float[Array, "..."]:
    """Returns the probability of the likeliest token."""
    return jnp.max(jax.nn.softmax(logits.astype(jnp.float32)), axis=-1)


def saturation(state: Float[Array, "... D"], before: Float[Array, "... D"]) -> Float[Array, "..."]:
    """Returns the cosine between two states of each token; with a state of zeros it is 0."""
    a, b = state.astype(jnp.float32), before.astype(jnp.float32)
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.sum(a * b, axis=-1) / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)


def _saturation(weights, candidate, before):
    if before is None:
        return jnp.full(candidate.state.shape[:2], -2.0)  # below every cosine: never sure
    return saturation(candidate.state, before.state)


class PolicyKind(NamedTuple):
    """One way to be sure.

    Attributes:
      score: of a candidate, given the weights and the candidate before it (None at the first).
      reads_logits: whether it needs the head at every candidate.
      range: the thresholds that make sense, in words of `require_range`; None: whole numbers.
      careful_high: whether a higher threshold is the more careful one.
    """

    score: Callable[[DecoderWeights, Candidate, Candidate | None], Float[Array, "B S"]]
    reads_logits: bool
    range: str | None
    careful_high: bool = True

    def is_sure(
        self, score: Float[Array, "..."], threshold: Float[Array, "..."]
    ) -> Bool[Array, "..."]:
        """Returns whether a score passes the threshold."""
        if not self.careful_high:
            return score < threshold
        return score >= threshold if self.range is None else score > threshold


POLICIES = {
    "entropy": PolicyKind(
        lambda weights, now, before: entropy_share(now.logits), True, "[0, 1]", careful_high=False
    ),
    "margin": PolicyKind(lambda weights, now, before: margin(now.logits), True, "[0, 1]"),
    "saturation": PolicyKind(_saturation, False, "[-1, 1]"),
    "patience": PolicyKind(lambda weights, now, before: now.streak.astype(jnp.float32), True, None),
    "learned": PolicyKind(
        lambda weights, now, before: weights.classifier(now.read), False, "[0, 1]"
    ),
}


@dataclasses.dataclass(frozen=True)
class ExitPolicy:
    """A policy and its threshold; `entropy:0.2` in words.

    Attributes:
      name: one of `POLICIES`.
      threshold: see `POLICIES`; None takes what `layerskip calibrate` found.
    """

    name: str
    threshold: int | float | None = None

    def __post_init__(self):
        """Refuses what is no policy, or no threshold of it.

        Raises:
          ConfigError: naming the value and the remedy.
        """
        if self.name not in POLICIES:
            raise ConfigError(
                f"exit_when={self.name!r} is none of {', '.join(POLICIES)}."
                f"{nearest(self.name, POLICIES)}"
            )
        if self.threshold is None:
            return
        if (allowed := self.kind.range) is None:
            require_whole(f"the threshold of {self.name}", self.threshold)
            require_count(f"the threshold of {self.name}", self.threshold, 1)
        else:
            require_range(f"the threshold of {self.name}", self.threshold, allowed)

    @property
    def kind(self) -> PolicyKind:
        """What it looks at."""
        return POLICIES[self.name]

    def __str__(self) -> str:
        """Returns what `parse_policy` reads."""
        return self.name if self.threshold is None else f"{self.name}:{self.threshold:g}"


def parse_policy(text: str) -> ExitPolicy:
    """Reads `entropy:0.2`, or `entropy` alone for what `layerskip calibrate` found.

    Raises:
      ConfigError: it is neither.
    """
    name, colon, number = text.partition(":")
    if not colon:
        return ExitPolicy(name)
    try:
        threshold = float(number)
    except ValueError:
        raise ConfigError(
            f"exit_when={text!r}: {number!r} is no number; write NAME:THRESHOLD, such as "
            "entropy:0.2"
        ) from None
    whole = name in POLICIES and POLICIES[name].range is None and threshold.is_integer()
    return ExitPolicy(name, int(threshold) if whole else threshold)


def falling_threshold(
    threshold: Float[Array, ""], count: Int[Array, "..."], most: Int[Array, "..."], kind: PolicyKind
) -> Float[Array, "..."]:
    """Returns CALM's threshold of new token t of at most N (section 3.3, with its tau = 4).

    T(t) = clip(0.9 T + 0.1 exp(-4 t / N), 0, 1): early mistakes cost more, as all that follows
    reads them. Of a policy whose lower thresholds are the careful ones, 1 - T(t) of 1 - T.

    Args:
      threshold: T.
      count: t, new tokens so far.
      most: N.
      kind: what the threshold is of.
    """
    high = threshold if kind.careful_high else 1 - threshold
    more = FALLING_SHARE * jnp.exp(-FALLING_RATE * count / jnp.maximum(most, 1))
    high = jnp.clip((1 - FALLING_SHARE) * high + more, 0, 1)
    return high if kind.careful_high else 1 - high


def candidate_exits(num_layers: int, exits: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """Returns the candidate exits in ascending order, by default every eighth of the layers.

    Raises:
      ConfigError: an exit is not in 1..L-1, or there is none.
    """
    require(num_layers > 1, "a model of one layer has no early exit")
    if exits is None:
        return every_eighth(num_layers)
    require(len(exits) > 0, "exits is empty; name one, or leave it out")
    for exit_layer in exits:
        require_count("exits", exit_layer, 1, num_layers - 1)
    return tuple(sorted(set(map(int, exits))))
