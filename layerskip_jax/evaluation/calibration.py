"""The threshold that keeps an exit policy's risk within bounds: Learn then Test.

CALM (section 4) calibrates early exits so. Candidate thresholds are fixed beforehand and tested
from the most careful one on. The null hypothesis of a threshold is that its risk is above delta;
one of `BOUNDS` gives a p-value for risks in [0, 1]. Testing stops at the first that is not
rejected at level eps (fixed sequence testing), so no correction for their number is needed, and
the last rejected one keeps P(E[r] <= delta) >= 1 - eps.

CALM takes Hoeffding's inequality, which knows of the risks only that they are in [0, 1]. Betting
also learns how little they vary, so that it needs a tenth of the texts where most risks are small.
"""

import bisect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from layerskip_jax.decoding.adaptive import SKIPPED_KV
from layerskip_jax.decoding.exit_policy import POLICIES
from layerskip_jax.decoding.weights import DecoderWeights
from layerskip_jax.evaluation.policy_scores import (
    first_sure,
    pad_length,
    read_exits,
    read_propagated,
)
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.schema import ConfigError, UserError, require_choice, require_range

RISKS = {
    "tokens": "share of a text's tokens that differ from the whole model's",
    "loss": "mean loss a text's tokens gain, clipped to 0..1 nats",
}
# Texts in a pass.
ROWS = 16
# How far from full certainty the first candidate threshold is, and how many there are on either
# side of a tenth.
NEAREST = {"entropy": 1e-3, "margin": 1e-3, "learned": 1e-3, "saturation": 1e-5}
GRID = 25
# Up to how many texts it is looked for how many are enough.
MOST_TEXTS = 1 << 20
# The share of the texts that only say where testing begins, where each threshold takes a pass.
PILOT = 8


class Measured(NamedTuple):
    """What a threshold does to texts.

    Attributes:
      risks: of each text, in [0, 1].
      layers: the mean of the layers run, over all tokens.
    """

    risks: Float[np.ndarray, "N"]
    layers: float


class Tested(NamedTuple):
    """One step of the test.

    Attributes:
      threshold: what was tested.
      risk: the mean risk of the texts.
      p_value: by the bound.
      layers: the mean of the layers run.
    """

    threshold: int | float
    risk: float
    p_value: float
    layers: float


def hoeffding_p(risks: Float[np.ndarray, "N"], risk: float, level: float) -> float:
    """Returns exp(-2 n max(0, delta - mean r)^2), whatever the level."""
    return math.exp(-2 * len(risks) * max(0.0, risk - float(np.mean(risks))) ** 2)


def betting_p(risks: Float[np.ndarray, "N"], risk: float, level: float) -> float:
    """Returns 1 / the most that bets against the null hypothesis ever made of 1.

    Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting" (2024), with
    their predictable plug-in stakes. A bettor stakes a share nu_i on each risk being below delta,
    chosen from the risks before it: its capital, the product of 1 - nu_i (r_i - delta), is a
    supermartingale where E[r] >= delta, so by Ville's inequality it reaches 1 / eps with
    probability eps at most.

    Args:
      risks: of the texts, in [0, 1], in an order that is drawn at random.
      risk: delta.
      level: eps, for which the stakes are the best; the p-value holds at any.
    """
    n = len(risks)
    seen = np.arange(1, n + 1)
    mean = (0.5 + np.cumsum(risks)) / (1 + seen)
    variance = (0.25 + np.cumsum((risks - mean) ** 2)) / (1 + seen)
    before = np.concatenate([[0.25], variance[:-1]])
    stake = np.minimum(1, np.sqrt(-2 * math.log(level) / (n * before)))
    capital = np.cumsum(np.log1p(-stake * (risks - risk)))
    return math.exp(-max(0.0, float(capital.max())))


# p-values for the null hypothesis that risks in [0, 1] have a mean above delta.
BOUNDS = {"betting": betting_p, "hoeffding": hoeffding_p}
DEFAULT_BOUND = "betting"


def texts_needed(
    risks: Sequence[float] | Float[np.ndarray, "N"], risk: float, confidence: float, bound: str
) -> int | None:
    """Returns how many texts with such risks, repeated in turn, are accepted.

    None where `MOST_TEXTS` are not, as where the mean is not below the risk allowed.
    """
    level = 1 - confidence

    def accepted(count: int) -> bool:
        return BOUNDS[bound](np.resize(np.asarray(risks, np.float64), count), risk, level) <= level

    if not accepted(MOST_TEXTS):
        return None
    return bisect.bisect_left(range(1, MOST_TEXTS), True, key=accepted) + 1


def require_enough(texts: int, risk: float, confidence: float, bound: str) -> None:
    """Refuses texts that are too few for any threshold, before anything is computed.

    Raises:
      ConfigError: a number out of its range, or no bound of that name.
      UserError: too few; with the number needed.
    """
    require_choice("--bound", bound, BOUNDS)
    require_range("--risk", risk, "(0, 1)")
    require_range("--confidence", confidence, "(0, 1)")
    needed = texts_needed([0.0], risk, confidence, bound)
    if needed is None or texts < needed:
        raise UserError(
            f"{texts} texts to calibrate on are too few for --risk={risk} at --confidence="
            f"{confidence}: even a policy that never errs needs {needed or f'over {MOST_TEXTS}'}, "
            "each of another document, and as many again are held out; name data with more "
            "validation documents (--data), or allow more risk or less confidence"
        )


def candidate_thresholds(policy: str, candidates: int) -> tuple[int, ...] | tuple[float, ...]:
    """Returns the thresholds to test, the most careful first; no data enter into them.

    Args:
      policy: one of `POLICIES`.
      candidates: how many candidate exits there are, which bounds `patience`.
    """
    kind = POLICIES[policy]
    if kind.range is None:
        return tuple(range(candidates, 0, -1))
    # Near the careful end in equal ratios, where scores crowd; from a tenth on in equal steps.
    away = np.concatenate(
        [np.geomspace(NEAREST[policy], 0.1, GRID, endpoint=False), np.linspace(0.1, 1, GRID)]
    )
    # As they are printed, so that a threshold that is typed again is the same.
    return tuple(float(f"{1 - d if kind.careful_high else d:.6g}") for d in away)


def learn_then_test(
    thresholds: Iterable[int | float],
    measure: Callable[[int | float], Measured],
    risk: float,
    confidence: float,
    bound: str,
) -> tuple[Tested, list[Tested]]:
    """Returns the last threshold accepted, and all that were tested.

    Args:
      thresholds: the most careful first, fixed without the texts.
      measure: what a threshold does to the texts to calibrate on.
      risk: delta.
      confidence: 1 - eps.
      bound: one of `BOUNDS`.

    Raises:
      UserError: none is accepted; with the texts that would be enough.
    """
    tested: list[Tested] = []
    accepted, level = None, 1 - confidence
    first = np.zeros(0)
    for threshold in thresholds:
        found = measure(threshold)
        p_value = BOUNDS[bound](found.risks, risk, level)
        tested.append(Tested(threshold, float(np.mean(found.risks)), p_value, found.layers))
        if p_value > level:
            first = found.risks
            break
        accepted = tested[-1]
    if accepted is None:
        needed = texts_needed(first, risk, confidence, bound)
        more = (
            "no number of texts is enough, as that is not below it"
            if needed is None
            else f"about {needed} texts would be enough, and there are {len(first)}"
        )
        raise UserError(
            f"no threshold keeps the risk within {risk} at confidence {confidence}: the most "
            f"careful one, {tested[0].threshold:g}, has a mean risk of {tested[0].risk:.4g}; "
            f"{more}. Name more data with --data, allow more risk or less confidence, or take "
            "later --exits"
        )
    return accepted, tested


def begin_at(
    thresholds: Sequence[int | float], pilot: Callable[[int | float], Measured], risk: float
) -> Sequence[int | float]:
    """Returns the thresholds from the one where testing may begin.

    That is the last before half of the risk is exceeded, on texts that have no further part: a
    sequence to test may be chosen by anything but the texts that test it.

    Args:
      thresholds: the most careful first.
      pilot: what a threshold does to those texts.
      risk: delta.
    """

    def exceeds(threshold: int | float) -> bool:
        return float(np.mean(pilot(threshold).risks)) > risk / 2

    return thresholds[max(0, bisect.bisect_left(thresholds, True, key=exceeds) - 1) :]


class PolicyTexts:
    """Texts as the whole model reads them, and what thresholds of a policy do to them.

    The first pass over them is made when one is built.
    """

    def __init__(
        self,
        weights: DecoderWeights,
        config: ModelConfig,
        texts: Sequence[Sequence[int]],
        *,
        policy: str,
        exits: tuple[int, ...],
        kv: str,
        risk_of: str = "tokens",
    ):
        """Reads the texts.

        Args:
          weights: the model's weights.
          config: shapes.
          texts: token ids, at least two each.
          policy: one of `POLICIES`.
          exits: the candidate exits, ascending.
          kv: `propagate` or `deferred`.
          risk_of: one of `RISKS`.

        Raises:
          ConfigError: a word that is none of these, or a policy that the model has no weights for.
        """
        require_choice("--kv", kv, SKIPPED_KV)
        require_choice("--risk-of", risk_of, RISKS)
        require_weights(weights, policy)
        self._weights, self._config = weights, config
        self._policy, self._exits, self._kv, self._risk_of = policy, exits, kv, risk_of
        self._length = pad_length(max(map(len, texts)))
        self._lengths = np.array([len(text) - 1 for text in texts])
        self._tokens = np.zeros((-(-len(texts) // ROWS) * ROWS, self._length), np.int32)
        for row, text in zip(self._tokens, texts, strict=False):
            row[: len(text)] = text
        choices, losses, scores = [], [], []
        for start in range(0, len(self._tokens), ROWS):
            found = jax.device_get(
                read_exits(
                    weights, self._rows(start), config=config, exits=exits, policies=(policy,)
                )
            )  # fmt: skip
            choices.append(found.choice)
            losses.append(found.loss)
            scores.append(found.scores[policy])
        rows = slice(0, len(texts))
        self._choice = np.concatenate(choices, axis=1)[:, rows]
        self._loss = np.concatenate(losses, axis=1)[:, rows]
        self._scores = np.concatenate(scores, axis=1)[:, rows]

    def _rows(self, start: int) -> Int[Array, "B S1"]:
        return jnp.asarray(self._tokens[start : start + ROWS])

    @property
    def _counts(self) -> Bool[np.ndarray, "N S"]:
        """Which positions are of a text."""
        return np.arange(self._length - 1) < self._lengths[:, None]

    def measure(self, threshold: int | float) -> Measured:
        """Returns risks and layers run at a threshold."""
        left = self._deferred if self._kv == "deferred" else self._propagated
        layers, choice, loss = left(threshold)
        counts = self._counts
        if self._risk_of == "tokens":
            differs = (choice != self._choice[-1]) & counts
            risks = differs.sum(axis=1) / self._lengths
        else:
            added = np.where(counts, loss.astype(np.float64) - self._loss[-1], 0)
            risks = np.clip(added.sum(axis=1) / self._lengths, 0, 1)
        return Measured(risks, float(layers[counts].mean()))

    def _deferred(
        self, threshold: int | float
    ) -> tuple[Int[np.ndarray, "N S"], Int[np.ndarray, "N S"], Float[np.ndarray, "N S"]]:
        """Returns layers run, choice and loss where all K/V are the whole model's."""
        at = first_sure(self._scores, threshold, self._policy)
        layers = np.array([*self._exits, self._config.num_layers])[at]
        choice = np.take_along_axis(self._choice, at[None], axis=0)[0]
        return layers, choice, np.take_along_axis(self._loss, at[None], axis=0)[0]

    def _propagated(
        self, threshold: int | float
    ) -> tuple[Int[np.ndarray, "N S"], Int[np.ndarray, "N S"], Float[np.ndarray, "N S"]]:
        """Returns the same where skipped layers take K/V from the exit state, by a pass."""
        parts = [
            jax.device_get(
                read_propagated(
                    self._weights, self._rows(start), jnp.float32(threshold),
                    config=self._config, exits=self._exits, policy=self._policy,
                )
            )
            for start in range(0, len(self._tokens), ROWS)
        ]  # fmt: skip
        layers, choice, loss = (
            np.concatenate(arrays)[: len(self._lengths)] for arrays in zip(*parts, strict=True)
        )
        return layers, choice, loss


def require_weights(weights: DecoderWeights, policy: str) -> None:
    """Refuses a policy that the model has no weights for.

    Raises:
      ConfigError: `learned`, and no classifier was trained.
    """
    if policy == "learned" and weights.classifier is None:
        raise ConfigError(
            "the policy learned needs a classifier, and this model was trained without one; take "
            "entropy, margin, saturation or patience"
        )


def calibrate(
    read: Callable[[Sequence[int]], PolicyTexts],
    *,
    pilot: Sequence[int],
    calibration: Sequence[int],
    held_out: Sequence[int],
    thresholds: Sequence[int | float],
    risk: float,
    confidence: float,
    bound: str = DEFAULT_BOUND,
) -> dict:
    """Finds the threshold, and measures it on texts that had no part in it.

    Args:
      read: reads the texts of these numbers.
      pilot: numbers of the texts that only say where testing begins, see `begin_at`; may be none.
      calibration: of those to calibrate on, in an order drawn at random.
      held_out: of those that are read once a threshold is found.
      thresholds: see `candidate_thresholds`.
      risk: delta.
      confidence: 1 - eps.
      bound: one of `BOUNDS`.

    Returns:
      `threshold`, `mean_risk`, `mean_layers` and `p_value` of the accepted one; `held_out` with its
      `texts`, `risk` and `mean_layers`; `tested`, all that were tested in order.

    Raises:
      UserError: no threshold is accepted; that texts are too few, `require_enough` says first.
    """
    if pilot:
        thresholds = begin_at(thresholds, read(pilot).measure, risk)
    measure = read(calibration).measure
    accepted, tested = learn_then_test(thresholds, measure, risk, confidence, bound)
    found = read(held_out).measure(accepted.threshold)
    return {
        "threshold": accepted.threshold,
        "mean_risk": accepted.risk,
        "mean_layers": accepted.layers,
        "p_value": accepted.p_value,
        "held_out": {
            "texts": len(found.risks),
            "risk": float(np.mean(found.risks)),
            "mean_layers": found.layers,
        },
        "tested": [step._asdict() for step in tested],
    }
