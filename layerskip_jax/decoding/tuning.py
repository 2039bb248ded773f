"""Which exit and draft length decode fastest: predicted for all pairs, verified for the best.

How often the drafts of an exit are accepted does not depend on how many are made at a time, so
one run for each E gives it, by draft position, for every G. What a cycle costs does not depend
on the text, so a few cycles of each pair measure it. Tokens a cycle over its cost predict the
speed of every pair, and only the best one is run on all prompts, against plain decoding.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from layerskip_jax.schema import require


def accepted_per_cycle(by_position: Sequence[float], draft_length: int) -> float:
    """Returns the drafts accepted of a cycle, on average.

    Args:
      by_position: probability that a draft is accepted, all before it having been; positions
        beyond it go on with the last one.
      draft_length: G.
    """
    total, product = 0.0, 1.0
    for position in range(draft_length):
        product *= by_position[min(position, len(by_position) - 1)]
        total += product
    return total


def sweep(
    generator: Any,
    prompts: Sequence[list[int]],
    new_tokens: int,
    *,
    exits: Sequence[int],
    draft_lengths: Sequence[int],
    repeats: int = 2,
    **options: Any,
) -> dict:
    """Predicts the speed of every pair (E, G) on these prompts, and measures the best.

    Args:
      generator: a `Generator`.
      prompts: token ids; one prompt at a time.
      new_tokens: new tokens for each prompt; no end token stops a row.
      exits: values of E.
      draft_lengths: values of G.
      repeats: turns that plain decoding and the best pair take in the end; medians count.
      **options: further attributes of `Request`, such as the temperature.

    Returns:
      `plain_tokens_per_second`; `pairs`, for each: `exit_layer`, `draft_length`,
      `seconds_per_cycle` (measured), `acceptance_by_position`, `acceptance`,
      `tokens_per_cycle`, `tokens_per_second` and `speedup` (predicted from those), `identical`
      (whether every token of the exit's run was plain decoding's), `verified` (false); and
      `best`, the fastest of them, with `verified` true, its speed, speed-up and acceptance
      measured, and `predicted_speedup`.
    """
    require(len(prompts) > 0, "there is no prompt to measure on; give at least one")
    require(
        len(exits) > 0 and len(draft_lengths) > 0,
        "name at least one exit and one draft length to measure",
    )

    def run(**mode):
        return [generator.generate([p], new_tokens, **mode, **options) for p in prompts]

    def drafted(exit_layer, draft_length):
        return {
            "mode": "self_speculative", "exit_layer": exit_layer, "draft_length": draft_length
        }  # fmt: skip

    plain = [generation.tokens for generation in run()]
    plain_cost = generator.seconds_per_cycle(prompts[0], new_tokens, **options)
    longest, pairs = max(draft_lengths), []
    for exit_layer in exits:
        generations = run(**drafted(exit_layer, longest))
        total = sum_draftings(generations)
        known = [rate for rate in total.acceptance_by_position if not math.isnan(rate)] or [0.0]
        identical = [generation.tokens for generation in generations] == plain
        for length in draft_lengths:
            cost = generator.seconds_per_cycle(
                prompts[0], new_tokens, **drafted(exit_layer, length), **options
            )
            accepted = accepted_per_cycle(known, length)
            pairs.append(
                {
                    "exit_layer": exit_layer,
                    "draft_length": length,
                    "seconds_per_cycle": cost,
                    "acceptance_by_position": (known + [known[-1]] * length)[:length],
                    "acceptance": accepted / length,
                    "tokens_per_cycle": 1 + accepted,
                    "speedup": (1 + accepted) * plain_cost / cost,
                    "identical": identical,
                    "verified": False,
                }
            )
    best = dict(max(pairs, key=lambda pair: pair["speedup"]))
    turns = {"plain": {}, "best": drafted(best["exit_layer"], best["draft_length"])}
    seconds = {name: [] for name in turns}
    for _ in range(repeats):
        for name, mode in turns.items():
            generations = run(**mode)
            seconds[name].append(sum(generation.seconds for generation in generations))
    total = sum_draftings(generations)
    speed = {
        name: len(prompts) * new_tokens / statistics.median(times)
        for name, times in seconds.items()
    }
    for pair in pairs:
        pair["tokens_per_second"] = pair["speedup"] * speed["plain"]
    best |= {
        "verified": True,
        "identical": [generation.tokens for generation in generations] == plain,
        "predicted_speedup": best["speedup"],
        "speedup": speed["best"] / speed["plain"],
        "tokens_per_second": speed["best"],
        "acceptance": _number(total.acceptance),
        "tokens_per_cycle": _number(total.tokens_per_cycle),
        "acceptance_by_position": [_number(rate) for rate in total.acceptance_by_position],
    }
    return {"plain_tokens_per_second": speed["plain"], "pairs": pairs, "best": best}


def sum_draftings(generations: Sequence[Any]) -> Any:
    """Adds the counts of several generations up."""
    first, *rest = (generation.drafting for generation in generations)
    return sum(rest, start=first)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
