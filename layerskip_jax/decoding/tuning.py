"""Measuring which exit and draft length decode fastest."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

from layerskip_jax.schema import require


def measure(
    generator: Any,
    prompts: Sequence[list[int]],
    new_tokens: int,
    *,
    exits: Sequence[int],
    draft_lengths: Sequence[int],
    repeats: int = 2,
) -> dict:
    """Times plain decoding and every pair (E, G) on the same prompts, one prompt at a time.

    All are compiled and run once before. Then they take turns, `repeats` times over all
    prompts, so that a machine that slows down slows all of them; medians are reported.

    Args:
      generator: a `Generator`.
      prompts: token ids.
      new_tokens: new tokens for each prompt; no end token stops a row.
      exits: values of E.
      draft_lengths: values of G.
      repeats: turns.

    Returns:
      `plain_tokens_per_second`, `pairs` (for each: `exit_layer`, `draft_length`,
      `tokens_per_second`, `speedup` over plain, `identical` (whether every token is plain
      decoding's), and the fields of `Drafting`), and `best`, the fastest pair.
    """
    require(len(prompts) > 0, "there is no prompt to measure on; give at least one")
    modes = [{"mode": "plain"}] + [
        {"mode": "self_speculative", "exit_layer": e, "draft_length": g}
        for e in exits
        for g in draft_lengths
    ]
    require(len(modes) > 1, "name at least one exit and one draft length to measure")
    results = [[generator.generate([p], new_tokens, **mode) for p in prompts] for mode in modes]
    seconds: list[list[float]] = [[] for _ in modes]
    for _ in range(repeats):
        for times, mode in zip(seconds, modes, strict=True):
            times.append(sum(generator.generate([p], new_tokens, **mode).seconds for p in prompts))
    total = len(prompts) * new_tokens
    speeds = [total / statistics.median(times) for times in seconds]
    plain, *drafted = ([g.tokens[0] for g in generations] for generations in results)
    pairs = [
        {
            "exit_layer": mode["exit_layer"],
            "draft_length": mode["draft_length"],
            "tokens_per_second": speed,
            "speedup": speed / speeds[0],
            "identical": tokens == plain,
            **_drafting([g.drafting for g in generations]),
        }
        for mode, speed, tokens, generations in zip(
            modes[1:], speeds[1:], drafted, results[1:], strict=True
        )
    ]
    return {
        "plain_tokens_per_second": speeds[0],
        "pairs": pairs,
        "best": max(pairs, key=lambda pair: pair["tokens_per_second"]),
    }


def _drafting(draftings: Sequence[Any]) -> dict:
    """Adds the counts of several generations up; a share of nothing becomes None."""
    total = draftings[0]
    for drafting in draftings[1:]:
        total = total + drafting
    values = dataclasses.asdict(total)
    values["acceptance"] = total.acceptance
    values["tokens_per_cycle"] = total.tokens_per_cycle
    values["acceptance_by_position"] = total.acceptance_by_position
    return {key: _without_nan(value) for key, value in values.items()}


def _without_nan(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
