"""What the verbs share in reading their command lines."""

import argparse
import dataclasses
import textwrap
from pathlib import Path
from typing import Any

from layerskip_jax.config import recipe_names
from layerskip_jax.run_folder.object_store import require_local
from layerskip_jax.settings import read_docstring, setting_groups


def make_parser(verb: str, description: str) -> argparse.ArgumentParser:
    """Returns an empty parser for `layerskip VERB`; abbreviated options are refused."""
    return argparse.ArgumentParser(
        prog=f"layerskip {verb}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def local_path(text: str) -> Path:
    """Returns the path of what a verb writes, for `add_argument(type=local_path)`.

    Raises:
      UserError: it is on an object store, where only runs may be.
    """
    require_local(text, "what is written there")
    return Path(text)


def add_fields(parser: argparse.ArgumentParser, cls: type, leave_out: str = "") -> None:
    """Adds an option for each field of a dataclass, with its default and its docstring's entry.

    Args:
      parser: what to add them to.
      cls: the dataclass; a tuple field `things` becomes `--thing`, which may be repeated.
      leave_out: a field that is no option.
    """
    _, _, meanings = read_docstring(cls)
    for field in dataclasses.fields(cls):
        if field.name == leave_out:
            continue
        default, name = field.default, field.name
        shown = ", ".join(default) if isinstance(default, tuple) else default
        how: dict[str, Any] = {"type": type(default), "default": default}
        if isinstance(default, bool):
            how = {"action": "store_true"}
        elif isinstance(default, tuple):
            # The first that is given replaces the default.
            name = name.removesuffix("s")
            how = {"action": _Repeated, "default": default, "metavar": name.upper()}
        option = f"--{name.replace('_', '-')}"
        text = meanings[field.name].removesuffix(".") + (f" (default: {shown})" if shown else "")
        parser.add_argument(option, dest=field.name, help=text, **how)


def given_fields(options: argparse.Namespace, cls: type) -> dict[str, Any]:
    """Returns the fields that `add_fields` made options of, by name, as they were given."""
    names = [field.name for field in dataclasses.fields(cls)]
    return {name: getattr(options, name) for name in names if name in options}


class _Repeated(argparse.Action):
    """Collects the values of an option that may be repeated, in a tuple without the default."""

    def __call__(self, parser, namespace, values, option_string=None):
        given = getattr(namespace, self.dest)
        given = () if given is self.default else given
        setattr(namespace, self.dest, (*given, values))


def make_run_parser(verb: str, description: str) -> argparse.ArgumentParser:
    """Returns a parser with `--workdir`, `--step` and `--json`, for verbs that read a run."""
    parser = make_parser(verb, description)
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--step", type=int, help="checkpoint to read (default: the newest)")
    parser.add_argument("--json", type=local_path, help="also write the figures to this file")
    return parser


def split_config_arguments(
    verb: str, description: str, argv: list[str]
) -> tuple[argparse.ArgumentParser, list[str], list[str]]:
    """Separates `--config...` arguments from the verb's own.

    Returns:
      A parser for the verb's own arguments, the config arguments as `--name=value`, the rest.
    """
    parser = make_parser(verb, description)
    parser.epilog = _config_help()
    config, rest = [], []
    arguments = iter(argv)
    for argument in arguments:
        is_config = argument.split("=")[0] == "--config" or argument.startswith("--config.")
        if is_config and "=" not in argument:
            argument = f"{argument}={next(arguments, '')}"
        (config if is_config else rest).append(argument)
    return parser, config, rest


def _config_help() -> str:
    """Returns what a verb's help says of `--config`: the recipes, and the groups of settings."""
    wrap = textwrap.TextWrapper(78, initial_indent="  ", subsequent_indent="  ")
    groups = [group for group in setting_groups() if group.name]
    width = max(len(group.name) for group in groups)
    return "\n".join(
        [
            "recipes, by name from any folder (your own by its path, --config=FILE.py):",
            wrap.fill(", ".join(recipe_names())),
            "",
            "settings, each --config.GROUP.NAME=VALUE; `layerskip settings [GROUP|WORD]` prints",
            "them with default, range and meaning:",
            *(f"  {group.name:<{width}}  {group.summary}" for group in groups),
        ]
    )
