"""What each setting of a run means, as the docstrings of the dataclasses say it."""

import dataclasses
import inspect
import re
import typing
from typing import Any

from layerskip_jax.config import RunConfig, default_config

_ENTRY = re.compile(r"^  (\w+): ", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
      name: dotted, as in `--config.NAME=VALUE`.
      default: its value where no recipe sets it.
      meaning: what it does, with its range or its choices.
    """

    name: str
    default: Any
    meaning: str

    @property
    def shown_default(self) -> str:
        """The default as it would be typed, also where it is an empty text."""
        return '""' if self.default == "" else str(self.default)


@dataclasses.dataclass(frozen=True)
class Group:
    """Settings with the same dotted prefix.

    Attributes:
      name: the prefix; empty for those that have none.
      summary: what they are about, in one line.
      details: what its docstring says beside that and the settings themselves, or "".
      settings: in the order of the dataclass.
    """

    name: str
    summary: str
    details: str
    settings: tuple[Setting, ...]


def setting_groups() -> list[Group]:
    """Returns all settings by group, a group before the groups inside it.

    Raises:
      LookupError: the docstring of a dataclass does not describe one of its fields.
    """
    return _groups(RunConfig, default_config(), "")


def _groups(cls: type, defaults: Any, prefix: str) -> list[Group]:
    summary, details, meanings = read_docstring(cls)
    hints = typing.get_type_hints(cls)
    settings, inner = [], []
    for field in dataclasses.fields(cls):
        if field.name not in meanings:
            raise LookupError(f"{cls.__name__}'s docstring has no attribute {field.name}")
        default = defaults[field.name]
        if dataclasses.is_dataclass(hints[field.name]):
            inner += _groups(hints[field.name], default, f"{prefix}{field.name}.")
        else:
            settings.append(Setting(prefix + field.name, default, meanings[field.name]))
    own = [Group(prefix.rstrip("."), summary, details, tuple(settings))] if settings else []
    return own + inner


def read_docstring(cls: type) -> tuple[str, str, dict[str, str]]:
    """Returns the first line, the text after it, and the entries of `Attributes:`."""
    text, _, attributes = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    summary, _, details = text.partition("\n")
    # The text before the first name, then name and meaning by turns.
    _, *entries = _ENTRY.split(attributes)
    meanings = {
        name: " ".join(meaning.split())
        for name, meaning in zip(entries[::2], entries[1::2], strict=True)
    }
    return summary, " ".join(details.split()), meanings
