"""Numbers as people write them."""

import math


def amount(value: float | int | None, digits: int = 3) -> str:
    """Returns `value` with about `digits` significant digits: 0.0123, 24.8, 1,930."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    if abs(value) >= 1e7 or abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    return f"{round(value, places):,.{max(places, 0)}f}"


def count(value: float | int | None) -> str:
    """Returns a large count with a prefix: 812, 24.6 thousand, 7.9 million, 1.5 billion."""
    if value is None or not math.isfinite(value):
        return "–"
    for limit, unit in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e4, "thousand")):
        if value >= limit:
            return f"{amount(value / (1e3 if unit == 'thousand' else limit))} {unit}"
    return f"{value:,.0f}"


def percent(value: float | int | None, places: int = 0) -> str:
    """Returns a share as a percentage."""
    return "–" if value is None else f"{100 * value:.{places}f}%"


def times(ratio: float | int | None) -> str:
    """Returns a ratio with two decimals, or with three digits from 10 on: 0.97×, 1.20×, 107×."""
    if ratio is None or not math.isfinite(ratio):
        return "–"
    return f"{ratio:.2f}×" if ratio < 9.995 else f"{amount(ratio)}×"


def duration(seconds: float | int | None) -> str:
    """Returns 48 s, 12 min 5 s, 3 h 20 min or 2 d 4 h."""
    if seconds is None:
        return "–"
    total = round(seconds)
    for size, unit, part, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if total >= size:
            return f"{total // size} {unit} {total % size // part} {name}"
    return f"{total // 60} min {total % 60} s" if total >= 60 else f"{total} s"


def join_words(words: list[str]) -> str:
    """Returns `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
