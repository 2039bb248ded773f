"""Which exit and draft length decode fastest: predicted for all pairs, verified for the best.

How often the drafts of an exit are accepted does not depend on how many are made at a time, so
one run for each E gives it, by draft position, for every G. What a cycle costs does not depend
on the text, so a few generations of a pair measure it, with the cache as full as it gets in use,
and in turns with plain decoding, so that a machine whose speed drifts does not decide it. For each
E the shortest and the longest drafts are timed, those between follow on a line, and a pair that
looks best by that line is timed before it is believed. The best is then run on all prompts.
"""

import itertools
import math
import operator
import statistics
from collections.abc import Callable, Sequence

from layerskip_jax.generation.generator import Generator
from layerskip_jax.generation.options import Drafting, Generation
from layerskip_jax.schema import require, require_whole

TIMED_PROMPTS = 4  # that a cycle's cost is measured on
TIMED_ROUNDS = 5


def accepted_per_cycle(by_position: Sequence[float], draft_length: int) -> float:
    """Returns the drafts accepted of a cycle, on average.

    Args:
      by_position: probability that a draft is accepted, all before it having been; positions
        beyond it go on with the last one.
      draft_length: G.
    """
    return sum(itertools.accumulate(_rates(by_position, draft_length), operator.mul))


def _rates(by_position: Sequence[float], draft_length: int) -> list[float]:
    """Returns the rates of G positions; those beyond what is known go on with the last one."""
    known = list(by_position[:draft_length])
    return known + [known[-1]] * (draft_length - len(known))


def expected_cycles(by_position: Sequence[float], draft_length: int, tokens: int) -> float:
    """Returns how many cycles make so many tokens, on average; the last may make too many.

    Args:
      by_position: as for `accepted_per_cycle`.
      draft_length: G.
      tokens: to be made.
    """
    reach = 1.0  # of so many drafts, all being accepted
    chances = []  # of a cycle that makes 1, 2, ... G + 1 tokens
    for rate in _rates(by_position, draft_length):
        chances.append(reach * (1 - rate))
        reach *= rate
    chances.append(reach)
    cycles = [0.0]
    for count in range(1, tokens + 1):
        after = (p * cycles[max(count - made, 0)] for made, p in enumerate(chances, 1))
        cycles.append(1 + sum(after))
    return cycles[tokens]


def sweep(
    generator: Generator,
    prompts: Sequence[list[int]],
    new_tokens: int,
    *,
    exits: Sequence[int],
    draft_lengths: Sequence[int],
    repeats: int = 5,
    progress: Callable[[str], None] = lambda text: None,
    **options: object,
) -> dict:
    """Predicts the speed of every pair (E, G) on these prompts, and measures the best.

    Args:
      generator: the model, ready to generate.
      prompts: token ids; one prompt at a time.
      new_tokens: new tokens for each prompt, at least 2; no end token stops a row.
      exits: values of E.
      draft_lengths: values of G.
      repeats: turns that plain decoding and the best pair take in the end; medians count.
      progress: called with what is done next.
      **options: further attributes of `Request`, such as the temperature.

    Returns:
      `plain_tokens_per_second`; `pairs`, for each: `exit_layer`, `draft_length`,
      `seconds_per_cycle`, `timed` (whether it was measured or lies on the line between those that
      were), `acceptance_by_position`, `acceptance`, `tokens_per_cycle`, `tokens_per_second` and
      `speedup` (predicted from those), `identical` (whether every token of the exit's run was
      plain decoding's), `verified` (false); and `best`, the fastest of them, with `verified` true,
      its speed, speed-up and acceptance measured, and `predicted_speedup`. Where the speed-up of
      the best is below 1, plain decoding is the fastest.
    """
    require(len(prompts) > 0, "there is no prompt to measure on; give at least one")
    require(
        len(exits) > 0 and len(draft_lengths) > 0,
        "name at least one exit and one draft length to measure",
    )
    for name, values in (
        ("new_tokens", [new_tokens]), ("exits", exits), ("draft_lengths", draft_lengths),
        ("repeats", [repeats]),
    ):  # fmt: skip
        for value in values:
            require_whole(name, value)
    require(new_tokens >= 2, f"new_tokens={new_tokens} must be at least 2 to measure a cycle")
    lengths = sorted(set(draft_lengths))
    timing = _Timing(generator, prompts, new_tokens, options)

    progress("plain decoding")
    plain = [generation.tokens for generation in timing.run(None, prompts)]
    acceptance, identical = {}, {}
    for exit_layer in exits:
        progress(f"the drafts of {exit_layer} layers")
        generations = timing.run((exit_layer, lengths[-1]), prompts)
        total = sum_draftings(generations)
        rates = [rate for rate in total.acceptance_by_position if not math.isnan(rate)]
        acceptance[exit_layer] = rates or [0.0]
        identical[exit_layer] = [generation.tokens for generation in generations] == plain

    def predicted(pair: tuple[int, int]) -> float:
        return timing.speedup(pair, acceptance[pair[0]])

    every = [(exit_layer, length) for exit_layer in exits for length in lengths]
    progress(
        "cycles of " + ", ".join(f"{e},{g}" for e, g in every if g in (lengths[0], lengths[-1]))
    )
    timing.measure([pair for pair in every if pair[1] in (lengths[0], lengths[-1])])
    while (best := max(every, key=predicted)) not in timing.costs:
        progress(f"cycles of {best[0]},{best[1]}")
        timing.measure([best])
    progress(f"plain decoding and {best[0]},{best[1]} in turns")
    speed, ratio, generations = timing.compare(best, repeats)
    total = sum_draftings(generations)

    pairs = [
        _predicted_pair(pair, acceptance[pair[0]], timing, speed)
        | {"identical": identical[pair[0]], "verified": False}
        for pair in every
    ]
    chosen = pairs[every.index(best)] | {
        "verified": True,
        "identical": [generation.tokens for generation in generations] == plain,
        "predicted_speedup": predicted(best),
        "speedup": ratio,
        "tokens_per_second": speed * ratio,
        "acceptance": _number(total.acceptance),
        "tokens_per_cycle": _number(total.tokens_per_cycle),
        "acceptance_by_position": [_number(rate) for rate in total.acceptance_by_position],
    }
    return {"plain_tokens_per_second": speed, "pairs": pairs, "best": chosen}


def _predicted_pair(
    pair: tuple[int, int], rates: Sequence[float], timing: "_Timing", plain_speed: float
) -> dict:
    """Returns what is predicted of a pair, from its exit's acceptance and its cycle's cost."""
    exit_layer, length = pair
    accepted = accepted_per_cycle(rates, length)
    speedup = timing.speedup(pair, rates)
    return {
        "exit_layer": exit_layer,
        "draft_length": length,
        "seconds_per_cycle": timing.cost(pair),
        "timed": pair in timing.costs,
        "acceptance_by_position": _rates(rates, length),
        "acceptance": accepted / length,
        "tokens_per_cycle": 1 + accepted,
        "tokens_per_second": speedup * plain_speed,
        "speedup": speedup,
    }


class _Timing:
    """What generations and their cycles cost, a pair (E, G) or plain decoding (None)."""

    def __init__(self, generator, prompts, new_tokens, options):
        self._generator, self._prompts = generator, prompts
        self._new_tokens, self._options = new_tokens, options
        self._plain_cycle = self._first = 0.0
        self.costs: dict[tuple[int, int], float] = {}  # in plain cycles

    def run(self, pair, prompts):
        """Continues each prompt on its own."""
        mode = {}
        if pair is not None:
            mode = {"mode": "self_speculative", "exit_layer": pair[0], "draft_length": pair[1]}
        return [
            self._generator.generate([prompt], self._new_tokens, **mode, **self._options)
            for prompt in prompts
        ]

    def measure(self, pairs):
        """Times cycles of these pairs and of plain decoding, in turns."""
        prompts = self._prompts[:TIMED_PROMPTS]
        modes = [None, *pairs]
        for mode in modes:
            self.run(mode, prompts[:1])  # compiles
        rounds, firsts = [], []
        for _ in range(TIMED_ROUNDS):
            generations = [self.run(mode, prompts) for mode in modes]
            rounds.append([_cycle_seconds(of_mode) for of_mode in generations])
            firsts += [generation.seconds_to_first_token for generation in generations[0]]
        for index, pair in enumerate(pairs, 1):
            self.costs[pair] = statistics.median(costs[index] / costs[0] for costs in rounds)
        if not self._plain_cycle:
            self._plain_cycle = statistics.median(costs[0] for costs in rounds)
            self._first = statistics.median(firsts) / self._plain_cycle

    def cost(self, pair: tuple[int, int]) -> float:
        """Returns the seconds of a cycle, measured or on the line between those that were."""
        return self._relative(pair) * self._plain_cycle

    def _relative(self, pair):
        if pair in self.costs:
            return self.costs[pair]
        exit_layer, length = pair
        known = sorted((g, cost) for (e, g), cost in self.costs.items() if e == exit_layer)
        (g0, low), (g1, high) = (
            max(point for point in known if point[0] < length),
            min(point for point in known if point[0] > length),
        )
        return low + (high - low) * (length - g0) / (g1 - g0)

    def speedup(self, pair: tuple[int, int], rates: Sequence[float]) -> float:
        """Returns the time of plain decoding, the prompt's included, over that of the pair."""
        rest = self._new_tokens - 1  # the first token comes of the prompt
        cycles = expected_cycles(rates, pair[1], rest)
        return (self._first + rest) / (self._first + cycles * self._relative(pair))

    def compare(self, pair: tuple[int, int], repeats: int):
        """Returns plain decoding's tokens a second, the pair's speed-up, and what it generated."""
        plain, ratios = [], []
        for _ in range(repeats):
            seconds, generations = [0.0, 0.0], []
            for prompt in self._prompts:
                (ours,), (theirs,) = self.run(pair, [prompt]), self.run(None, [prompt])
                generations.append(ours)
                seconds[0] += ours.seconds
                seconds[1] += theirs.seconds
            plain.append(seconds[1])
            ratios.append(seconds[1] / seconds[0])
        tokens = len(self._prompts) * self._new_tokens
        return tokens / statistics.median(plain), statistics.median(ratios), generations


def _cycle_seconds(generations: Sequence[Generation]) -> float:
    """Returns the seconds of a cycle after the first token."""
    seconds = sum(g.seconds - g.seconds_to_first_token for g in generations)
    cycles = sum(
        len(g.tokens[0]) - 1 if g.drafting is None else g.drafting.cycles for g in generations
    )
    return seconds / cycles


def sum_draftings(generations: Sequence[Generation]) -> Drafting:
    """Adds the counts of several generations up."""
    first, *rest = (generation.drafting for generation in generations)
    return sum(rest, start=first)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
