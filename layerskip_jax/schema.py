"""Checked construction of the frozen configuration dataclasses.

A recipe is an `ml_collections.ConfigDict`; the code below it only sees frozen dataclasses.
`build` is the one crossing between the two: unknown keys, wrong types and values that a
dataclass refuses all become a `ConfigError` that names the full key and the remedy.
"""

import dataclasses
import difflib
import math
import numbers
import os
import struct
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")

LARGEST_INT32 = 2**31 - 1
LARGEST_UINT32 = 2**32 - 1
# Below the smallest, devices read 0.
SMALLEST_FLOAT32, LARGEST_FLOAT32 = 2.0**-126, (2 - 2.0**-23) * 2.0**127


class ConfigError(ValueError):
    """A setting that cannot work; the message names the key, the value and the remedy."""


class UserError(RuntimeError):
    """Anything else that is the caller's to mend (files, folders, devices).

    The command line prints the message without a traceback, as it does for `ConfigError`.
    """


def is_text(value: object) -> bool:
    """Whether a value is text that UTF-8 has.

    An argument or the name of a file may be any bytes, and JSON can spell half a surrogate pair.
    """
    try:
        return isinstance(value, str) and value.encode("utf-8") is not None
    except UnicodeEncodeError:
        return False


def as_bytes(name: str) -> str:
    """Returns such a name as it can be printed and written, its bytes spelled out."""
    return repr(os.fsencode(name))[1:]


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns ` Did you mean 'x'?` for the closest of `known`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number of Python or numpy; a bool, a str and 4.0 are none."""
    return is_whole_type(type(value))


def is_whole_type(kind: type) -> bool:
    """Whether the values of a type are whole numbers, see `is_whole`."""
    return issubclass(kind, numbers.Integral) and not issubclass(kind, bool)


def require_whole(name: str, value: Any) -> None:
    """Raises `ConfigError` unless `value` is a whole number, see `is_whole`."""
    if not is_whole(value):
        near = isinstance(value, numbers.Real) and float(value).is_integer()
        hint = f", such as {int(value)}" if near and not isinstance(value, bool) else ""
        raise ConfigError(
            f"{name}={value!r} has type {type(value).__name__}; it must be a whole number{hint}"
        )


def require_number(name: str, value: Any) -> None:
    """Raises `ConfigError` unless `value` is a number of Python or numpy."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} has type {type(value).__name__}; it must be a number")


def as_float32(number: float) -> float:
    """Returns what a device makes of a number: rounded, `inf` if too large, 0 if too small."""
    try:
        [rounded] = struct.unpack("f", struct.pack("f", number))
    except OverflowError:
        return math.inf if number > 0 else -math.inf
    return 0.0 if abs(rounded) < SMALLEST_FLOAT32 else rounded


def require_range(name: str, value: float, interval: str, reason: str = "") -> None:
    """Raises `ConfigError` unless a number, and the float32 that it becomes, is in an interval.

    Neither may the float32 be 0 where the number is not: such a setting would be off unsaid.

    Args:
      name: what it is called.
      value: the number.
      interval: such as `[0, 1)`; `inf` for an open end, where the number must be finite still.
      reason: added to the message, after a colon.
    """
    require_number(name, value)
    low, high = (float(end) for end in interval[1:-1].split(","))
    if high < math.inf:
        wanted = f"in {interval}"
    else:
        wanted = f"{'above' if interval[0] == '(' else 'at least'} {low:g}"

    def inside(number: float) -> bool:
        above = number > low or (number == low and interval[0] == "[")
        return above and (number < high or (number == high and interval[-1] == "]"))

    reason = reason and f": {reason}"
    require(math.isfinite(value), f"{name}={value} must be a number, finite and {wanted}{reason}")
    require(inside(value), f"{name}={value} must be {wanted}{reason}")
    there = as_float32(value)
    require(
        math.isfinite(there) and inside(there) and (there == 0) == (value == 0),
        f"{name}={value} must be {wanted} in float32 too, where it is {there:g}; the numbers "
        f"there go from {SMALLEST_FLOAT32:.3g} to {LARGEST_FLOAT32:.3g}, with "
        f"seven digits{reason}",
    )


def require_count(name: str, value: int, least: int, most: int = LARGEST_INT32) -> None:
    """Raises `ConfigError` unless a whole number is in `least..most`, by default up to int32's."""
    require_whole(name, value)
    require(value >= least, f"{name}={value} must be at least {least}")
    require(value <= most, f"{name}={value} must be at most {most}, the largest there is for it")


def require_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raises `ConfigError` unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        raise ConfigError(
            f"{name}={value!r} is not one of {', '.join(choices)}.{nearest(value, choices)}"
        )


def changeable(default: Any, was: str = "") -> Any:
    """Returns a field that a run may have another value of when it goes on.

    Such a setting changes neither the parameters that a run arrives at nor the order of its data.

    Args:
      default: its default.
      was: what it was called before, see `renamed`.
    """
    return dataclasses.field(default=default, metadata={_CHANGEABLE: True, **_called(was)})


def renamed(was: str, default: Any) -> Any:
    """Returns a field that was called `was` before: a recipe is told so, a run's folder is read."""
    return dataclasses.field(default=default, metadata=_called(was))


def _called(was: str) -> dict[str, str]:
    return {_WAS: was} if was else {}


_CHANGEABLE, _WAS = "changeable", "was"


def new_names(cls: type, path: str = "config") -> dict[str, str]:
    """Returns the present key of every old one, both with all dots."""
    names = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if was := field.metadata.get(_WAS):
            names[f"{path}.{was}"] = f"{path}.{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            names |= new_names(hints[field.name], f"{path}.{field.name}")
    return names


def changeable_keys(cls: type, path: str = "config") -> list[str]:
    """Returns the dotted keys of all `changeable` fields; those of a whole group end with a dot."""
    keys = []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key, is_group = f"{path}.{field.name}", dataclasses.is_dataclass(hints[field.name])
        if field.metadata.get(_CHANGEABLE):
            keys.append(f"{key}." if is_group else key)
        elif is_group:
            keys += changeable_keys(hints[field.name], key)
    return keys


def build(
    cls: type[T], values: Mapping[str, Any], path: str = "config", *, old_names: bool = False
) -> T:
    """Builds the frozen dataclass `cls` from nested mappings, checking every key and type.

    Args:
      cls: a dataclass whose fields are scalars, tuples of these or of tuples, or dataclasses.
      values: nested mapping with a subset of the fields; what is missing takes its default.
      path: dotted prefix used in messages.
      old_names: whether fields may bear the names they had before, as in the folder of an old run.

    Raises:
      ConfigError: unknown key, wrong type, or a value `cls.__post_init__` refuses.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    arguments = {}
    before = {
        field.metadata[_WAS]: name for name, field in fields.items() if _WAS in field.metadata
    }
    for key, value in values.items():
        if key not in fields and key in before:
            if not old_names:
                raise ConfigError(f"{path}.{key} is called {path}.{before[key]} now")
            key = before[key]
        if key not in fields:
            raise ConfigError(f"{path}.{key} is not a setting.{nearest(key, fields)}")
        arguments[key] = _convert(hints[key], value, f"{path}.{key}", old_names)
    try:
        return cls(**arguments)
    except ConfigError as error:
        message = str(error)
        raise ConfigError(
            message if message.startswith("config") else f"{path}.{message}"
        ) from None


def _convert(hint: Any, value: Any, path: str, old_names: bool = False) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}={value!r} must be a group of settings")
        return build(hint, value, path, old_names=old_names)
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        (inner,) = (arm for arm in typing.get_args(hint) if arm is not type(None))
        return _convert(inner, value, path)
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise ConfigError(f"{path}={value!r} must be a tuple")
        inner = typing.get_args(hint)
        if inner[-1] is Ellipsis:
            inner = inner[:1] * len(value)
        if len(value) != len(inner):
            raise ConfigError(f"{path}={value!r} must have {len(inner)} entries")
        return tuple(
            _convert(kind, item, f"{path}[{i}]")
            for i, (kind, item) in enumerate(zip(inner, value, strict=True))
        )
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{path}={value} is larger than any number may be") from None
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(
            f"{path}={value!r} has type {type(value).__name__}; it must be {hint.__name__}"
        )
    return value
