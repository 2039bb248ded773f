"""Which exit and draft length decode fastest: predicted for all pairs, verified for the best.

How often the drafts of an exit are accepted does not depend on how many are made at a time, so
one run for each E gives it, by draft position, for every G. What a cycle costs does not depend
on the text, so a few generations of a pair measure it, with the cache as full as it gets in use,
and in turns with plain decoding, so that a machine whose speed drifts does not decide it. For each
E the shortest and the longest drafts are timed, those between follow on a line, and a pair that
looks best by that line is timed before it is believed.

Drafts that end where the exit is unsure (`stop_below`) cost what the text makes them cost, so they
are measured whole: the best pair of each exit, and the exit with longer drafts, each with a few
thresholds, on some of the prompts; the faster half goes on until one is left. It is then run on
all prompts, in turns with plain decoding and the best pair without a threshold.
"""

import itertools
import math
import operator
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from layerskip_jax.generation.generator import Generator
from layerskip_jax.generation.options import (
    Drafting,
    Generation,
    read_stop_below,
    stop_below_text,
)
from layerskip_jax.schema import require, require_whole

TIMED_PROMPTS = 4  # that a cycle's cost is measured on
TIMED_ROUNDS = 5
THRESHOLDS = (0.3, "lead:0.55", "lead:0.6", "lead:0.65", "lead:0.7")
THRESHOLD_PROMPTS = 8  # that thresholds are compared on


class Way(NamedTuple):
    """How to draft: E, G, and below how sure a draft a row makes no more."""

    exit_layer: int
    draft_length: int
    stop_below: float | str | None = None


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
    thresholds: Sequence[float | str] = THRESHOLDS,
    tasks: Sequence[str] = (),
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
      thresholds: values of `stop_below` to try with the best pair of the best exit, and
        with drafts of twice the longest G; () tries none.
      tasks: what each prompt is an example of; () gives no figures by task.
      repeats: turns that plain decoding and the best ways take in the end; medians count.
      progress: called with what is done next.
      **options: further attributes of `Request`, such as the temperature.

    Returns:
      `plain_tokens_per_second`; `pairs`, for each: `exit_layer`, `draft_length`,
      `seconds_per_cycle`, `timed` (whether it was measured or lies on the line between those that
      were), `acceptance_by_position`, `acceptance`, `tokens_per_cycle`, `tokens_per_second` and
      `speedup` (predicted from those), `identical` (whether every token of the exit's run was
      plain decoding's), `verified` (false); `static`, the fastest of them, with `verified` true,
      its speed, speed-up and acceptance measured, and `predicted_speedup`; `thresholds`, for each
      pair and `stop_below` tried: its `speedup` on some prompts, the `rounds` that it is the
      median of, `acceptance`, `tokens_per_cycle`, `drafts_per_cycle` and `identical`; and `best`,
      the faster of `static` and the best of those, measured alike, with its `stop_below` (None
      for `static`) and the `static_speedup` of the same turns. Where the speed-up of the best is
      below 1, plain decoding is the fastest. With `tasks`, also `tasks`, for each: `task`,
      `prompts`, `exits` (by `exit_layer`, the share `first_accepted` of first drafts), and of the
      best `acceptance`, `tokens_per_cycle`, `plain_tokens_per_second`, `tokens_per_second`,
      `speedup`, `static_speedup` and `identical`.

    Raises:
      ConfigError: naming the value and the remedy, before anything is measured.
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
    for threshold in thresholds:
        read_stop_below(threshold)
    require(
        len(tasks) in (0, len(prompts)),
        f"tasks has {len(tasks)} names for {len(prompts)} prompts; give one for each, or none",
    )
    lengths = sorted(set(draft_lengths))
    timing = _Timing(generator, prompts, new_tokens, options)

    progress("plain decoding")
    plain = [generation.tokens for generation in timing.run(None, prompts)]
    drafted: dict[int, list[Generation]] = {}
    acceptance, identical = {}, {}
    for exit_layer in exits:
        progress(f"the drafts of {exit_layer} layers")
        generations = drafted[exit_layer] = timing.run(Way(exit_layer, lengths[-1]), prompts)
        total = sum_draftings(generations)
        rates = [rate for rate in total.acceptance_by_position if not math.isnan(rate)]
        acceptance[exit_layer] = rates or [0.0]
        identical[exit_layer] = _tokens(generations) == plain

    def predicted(pair: Way) -> float:
        return timing.speedup(pair, acceptance[pair.exit_layer])

    every = [Way(exit_layer, length) for exit_layer in exits for length in lengths]
    ends = [pair for pair in every if pair.draft_length in (lengths[0], lengths[-1])]
    progress("cycles of " + ", ".join(map(_name, ends)))
    timing.measure(ends)
    while (static := max(every, key=predicted)) not in timing.costs:
        progress(f"cycles of {_name(static)}")
        timing.measure([static])
    fastest = sorted(every, key=predicted, reverse=True)
    tried = _compare_thresholds(
        timing, _with_thresholds(fastest, lengths[-1], thresholds), plain, progress
    )
    ways = [static]
    if tried:
        top = max(tried, key=lambda found: (found["rounds"], found["speedup"]))
        ways.append(Way(top["exit_layer"], top["draft_length"], top["stop_below"]))
    progress("plain decoding and " + " and ".join(map(_name, ways)) + " in turns")
    turns = timing.take_turns(ways, repeats)

    pairs = [
        _predicted_pair(pair, acceptance[pair.exit_layer], timing, turns.speed(None))
        | {"identical": identical[pair.exit_layer], "verified": False}
        for pair in every
    ]
    verified = pairs[every.index(static)] | {
        **_measured(turns, static, plain),
        "predicted_speedup": predicted(static),
    }
    best = max(ways, key=turns.speedup)
    chosen = {**best._asdict(), "static_speedup": verified["speedup"]}
    chosen = (verified if best == static else _measured(turns, best, plain)) | chosen
    result = {
        "plain_tokens_per_second": turns.speed(None),
        "pairs": pairs,
        "static": verified,
        "thresholds": tried,
        "best": chosen,
    }
    if tasks:
        result["tasks"] = _by_task(tasks, turns, best, static, drafted, plain)
    return result


def _name(way: Way) -> str:
    pair = f"{way.exit_layer},{way.draft_length}"
    return (
        pair
        if way.stop_below is None
        else f"{pair} that stop below {stop_below_text(way.stop_below)}"
    )


def _tokens(generations: Sequence[Generation]) -> list[list[list[int]]]:
    return [generation.tokens for generation in generations]


def _with_thresholds(
    fastest: Sequence[Way], longest: int, thresholds: Sequence[float | str]
) -> list[Way]:
    """Returns ways to draft that may end early: the best exit, with its best G and with 2 G.

    Args:
      fastest: all pairs, the fastest first.
      longest: the longest G of them, of which twice as many drafts are tried, too.
      thresholds: values of `stop_below`.
    """
    exit_layer, length, _ = fastest[0]
    # One draft is always made: with G = 1 there is nothing to end.
    lengths = (length if length > 1 else longest, 2 * longest)
    return [
        Way(exit_layer, most, threshold)
        for most in lengths if most > 1 for threshold in thresholds
    ]  # fmt: skip


def _compare_thresholds(timing: "_Timing", ways: Sequence[Way], plain, progress) -> list[dict]:
    """Measures ways to draft on some prompts, the faster half again until one is left."""
    # Spread over all, since prompts of one kind may stand together.
    some = range(0, len(plain), -(-len(plain) // THRESHOLD_PROMPTS))
    ratios: dict[Way, list[float]] = {way: [] for way in ways}
    figures: dict[Way, dict] = {}
    racing = list(ways)
    while racing:
        progress(f"{len(racing)} ways to end drafts early")
        turns = timing.take_turns(racing, 1, some)
        for way in racing:
            ratios[way].append(turns.speedup(way))
            figures[way] = _fared(turns.generations[way], [plain[index] for index in some])
        racing.sort(key=lambda way: statistics.median(ratios[way]), reverse=True)
        racing = racing[: len(racing) // 2]
    return [
        way._asdict()
        | {"speedup": statistics.median(ratios[way]), "rounds": len(ratios[way])}
        | figures[way]
        for way in ways
    ]


def _fared(generations: Sequence[Generation], plain) -> dict:
    """Returns how drafts fared, and whether the tokens are those of plain decoding."""
    total = sum_draftings(generations)
    cycles = total.cycles + total.plain_cycles
    return {
        "acceptance": _number(total.acceptance),
        "tokens_per_cycle": _number(total.tokens_per_cycle),
        "drafts_per_cycle": total.drafted / cycles if cycles else None,
        "identical": _tokens(generations) == plain,
    }


def _measured(turns: "_Turns", way: Way, plain) -> dict:
    """Returns what was measured of a way to draft on all prompts."""
    total = sum_draftings(turns.generations[way])
    return _fared(turns.generations[way], plain) | {
        "verified": True,
        "speedup": turns.speedup(way),
        "tokens_per_second": turns.speed(None) * turns.speedup(way),
        "acceptance_by_position": [_number(rate) for rate in total.acceptance_by_position],
    }


def _by_task(tasks, turns: "_Turns", best: Way, static: Way, drafted, plain) -> list[dict]:
    """Returns the figures of the prompts of each task, in the order in which tasks come."""
    found = []
    for task in dict.fromkeys(tasks):
        rows = [index for index, name in enumerate(tasks) if name == task]
        part = turns.of(rows)
        first = {
            exit_layer: sum_draftings([generations[row] for row in rows]).acceptance_by_position[0]
            for exit_layer, generations in drafted.items()
        }
        found.append(
            {
                "task": task,
                "prompts": len(rows),
                "exits": [
                    {"exit_layer": exit_layer, "first_accepted": _number(rate)}
                    for exit_layer, rate in first.items()
                ],
                **_fared(part.generations[best], [plain[row] for row in rows]),
                "plain_tokens_per_second": part.speed(None),
                "tokens_per_second": part.speed(None) * part.speedup(best),
                "speedup": part.speedup(best),
                "static_speedup": part.speedup(static),
            }
        )
    return found


def _predicted_pair(
    pair: Way, rates: Sequence[float], timing: "_Timing", plain_speed: float
) -> dict:
    """Returns what is predicted of a pair, from its exit's acceptance and its cycle's cost."""
    exit_layer, length, _ = pair
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


class _Turns(NamedTuple):
    """Whole generations of plain decoding (None) and of ways to draft, a prompt after another.

    Attributes:
      seconds: of each way, by round and prompt.
      generations: of each way but plain decoding, the last round's.
      tokens: new tokens of a generation.
    """

    seconds: dict[Way | None, list[list[float]]]
    generations: dict[Way, list[Generation]]
    tokens: int

    def of(self, rows: Sequence[int]) -> "_Turns":
        """Returns the same of some of the prompts."""
        seconds = {
            way: [[times[row] for row in rows] for times in rounds]
            for way, rounds in self.seconds.items()
        }
        generations = {way: [made[row] for row in rows] for way, made in self.generations.items()}
        return _Turns(seconds, generations, self.tokens)

    def speed(self, way: Way | None) -> float:
        """Returns tokens a second, the prompt's reading included."""
        rounds = self.seconds[way]
        return self.tokens * len(rounds[0]) / statistics.median(map(sum, rounds))

    def speedup(self, way: Way) -> float:
        """Returns the time of plain decoding over that of a way to draft."""
        both = zip(self.seconds[None], self.seconds[way], strict=True)
        return statistics.median(sum(plain) / sum(ours) for plain, ours in both)


class _Timing:
    """What generations and their cycles cost, of a way to draft or plain decoding (None)."""

    def __init__(self, generator, prompts, new_tokens, options):
        self._generator, self._prompts = generator, prompts
        self._new_tokens, self._options = new_tokens, options
        self._plain_cycle = self._first = 0.0
        self.costs: dict[Way, float] = {}  # in plain cycles

    def run(self, way, prompts):
        """Continues each prompt on its own."""
        mode = {}
        if way is not None:
            mode = {"mode": "self_speculative", **way._asdict()}
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

    def cost(self, pair: Way) -> float:
        """Returns the seconds of a cycle, measured or on the line between those that were."""
        return self._relative(pair) * self._plain_cycle

    def _relative(self, pair):
        if pair in self.costs:
            return self.costs[pair]
        exit_layer, length, _ = pair
        known = sorted((g, cost) for (e, g, _), cost in self.costs.items() if e == exit_layer)
        (g0, low), (g1, high) = (
            max(point for point in known if point[0] < length),
            min(point for point in known if point[0] > length),
        )
        return low + (high - low) * (length - g0) / (g1 - g0)

    def speedup(self, pair: Way, rates: Sequence[float]) -> float:
        """Returns the time of plain decoding, the prompt's included, over that of the pair."""
        rest = self._new_tokens - 1  # the first token comes of the prompt
        cycles = expected_cycles(rates, pair[1], rest)
        return (self._first + rest) / (self._first + cycles * self._relative(pair))

    def take_turns(
        self, ways: Sequence[Way], repeats: int, rows: Sequence[int] | None = None
    ) -> _Turns:
        """Generates each way and plainly, prompt by prompt, so that all meet the same machine.

        Args:
          ways: to draft.
          repeats: rounds over the prompts.
          rows: which of the prompts; None takes all.
        """
        prompts = self._prompts if rows is None else [self._prompts[row] for row in rows]
        modes = [None, *ways]
        seconds: dict[Way | None, list[list[float]]] = {mode: [] for mode in modes}
        generations: dict = {}
        for _ in range(repeats):
            rounds = [[self.run(mode, [prompt])[0] for mode in modes] for prompt in prompts]
            for mode, made in zip(modes, zip(*rounds, strict=True), strict=True):
                seconds[mode].append([generation.seconds for generation in made])
                generations[mode] = list(made)
        del generations[None]
        return _Turns(seconds, generations, self._new_tokens)


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
