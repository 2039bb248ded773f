"""Which parameters a run trains: all, those of exits, or those whose names match.

What a run leaves as it is takes no gradient and no state of the optimizer, and its bits stay. The
layers are stacked, so that a name such as `layers.mlp.up` is that of all of them.
"""

import re
from typing import Any

from layerskip_jax.schema import ConfigError

ALL, EXITS = "all", "exits"


def trained(parameters: dict[str, Any], trainable: str) -> dict[str, Any]:
    """Returns the part of parameters, or of a nest like them, that a run trains.

    Args:
      parameters: nested by name.
      trainable: as `config.training.trainable`.
    """
    if trainable == ALL:
        return parameters
    if trainable == EXITS:
        return {EXITS: parameters[EXITS]}
    return _matching(parameters, re.compile(trainable), "")


def _matching(tree: dict[str, Any], pattern: re.Pattern, prefix: str) -> dict[str, Any]:
    found = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            value = _matching(value, pattern, f"{name}.")
            if value:
                found[key] = value
        elif pattern.fullmatch(name):
            found[key] = value
    return found


def merged(parameters: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Returns the parameters with those of a part of them in place of their own."""
    return parameters | {
        key: merged(parameters[key], value) if isinstance(value, dict) else value
        for key, value in part.items()
    }


def names(parameters: dict[str, Any], prefix: str = "") -> list[str]:
    """Returns the names of parameters, with dots."""
    found = []
    for key, value in parameters.items():
        name = f"{prefix}{key}"
        found += names(value, f"{name}.") if isinstance(value, dict) else [name]
    return found


def check_trainable(parameters: dict[str, Any], trainable: str) -> None:
    """Raises `ConfigError` where nothing would be trained."""
    if not trained(parameters, trainable):
        raise ConfigError(
            f"config.training.trainable={trainable!r} is the whole name of none of the parameters: "
            f"{', '.join(names(parameters))}; give a regular expression of some of them, such as "
            r"'layers\.mlp\..*|.*norm\.scale'"
        )
