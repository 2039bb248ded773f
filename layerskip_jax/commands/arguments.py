"""What the verbs share in reading their command lines."""

import argparse
import dataclasses
import textwrap
from pathlib import Path, PurePath
from typing import Any

from layerskip_jax.config import ON_DAMAGED, recipe_names
from layerskip_jax.data.manifest import MANIFEST_FILE
from layerskip_jax.run_folder.atomic import named_writes, write_json
from layerskip_jax.run_folder.object_store import is_remote, require_local
from layerskip_jax.schema import UserError
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


def numbers(text: str) -> tuple[int, ...]:
    """Returns whole numbers parted by commas, for `add_argument(type=numbers)`.

    Raises:
      argparse.ArgumentTypeError: it is no such list.
    """
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 1,2,4") from None


def figures_file(text: str) -> Path:
    """Returns the path given by `--json`, before what is to be written there is computed.

    Raises:
      UserError: no file can be there.
    """
    path = local_path(text)
    if path.is_dir():
        raise UserError(f"--json={path} is a folder; name a file")
    if not path.parent.is_dir():
        raise UserError(f"--json={path}: there is no folder {path.parent}; make it first")
    return path


def write_figures(path: Path, figures: Any) -> None:
    """Writes a verb's figures to its `--json`.

    Raises:
      UserError: it cannot be written.
    """
    with named_writes(path):
        write_json(path, figures)


def add_fields(parser: argparse.ArgumentParser, cls: type, *leave_out: str) -> None:
    """Adds an option for each field of a dataclass, with its default and its docstring's entry.

    Args:
      parser: what to add them to.
      cls: the dataclass; a tuple field `things` becomes `--thing`, which may be repeated.
      leave_out: fields that are no options.
    """
    _, _, meanings = read_docstring(cls)
    for field in dataclasses.fields(cls):
        if field.name in leave_out:
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
    parser.add_argument("--json", type=figures_file, help="also write the figures to this file")
    return parser


def prepared_data(workdir: str | PurePath, trained_on: str, given: str | None) -> str:
    """Returns the prepared data that a verb reads: what `--data` names, or what a run trained on.

    Args:
      workdir: the run's folder.
      trained_on: its `config.data.path`.
      given: `--data`, None where it was left out.

    Raises:
      UserError: there is none in either; it says what was asked for.
    """
    if given is None and not trained_on:
        raise UserError(f"{workdir} was trained on no data here; name prepared data with --data")
    path = given if given is not None else trained_on
    if not (Path(path) / MANIFEST_FILE).is_file() and not is_remote(path):
        raise UserError(
            f"the data that {workdir} was trained on is not in {path} any more; name where it is "
            "now with --data"
            if given is None
            else f"--data={path} holds no prepared data ({MANIFEST_FILE} is missing); name a "
            "folder that `layerskip prepare` made"
        )
    return path


def add_on_damaged(parser: argparse.ArgumentParser) -> None:
    """Adds `--on-damaged`, for verbs that read prepared data of a run."""
    parser.add_argument(
        "--on-damaged",
        choices=ON_DAMAGED,
        help="what a damaged record of the data does: stop, or skip it (default: as the run's "
        "config.data.on_damaged)",
    )


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
