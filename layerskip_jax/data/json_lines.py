"""Files of JSON lines that an option names."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layerskip_jax.schema import UserError


def read_named(path: Path, name: str, otherwise: str = "") -> bytes:
    """Returns what a file holds, less a byte-order mark.

    Args:
      path: the file.
      name: how it was named, such as `--prompts=FILE`.
      otherwise: what may be given instead, for the error.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except (OSError, ValueError) as error:  # a name may hold what no name can
        said = getattr(error, "strerror", None) or error
        raise UserError(f"{name} cannot be read ({said}){otherwise}") from error


def json_values(written: bytes, name: str) -> Iterator[tuple[str, Any]]:
    """Yields where each line stands, for messages, and the value that it holds.

    Args:
      written: the lines; empty ones are left alone.
      name: how they were named.

    Raises:
      UserError: a line is no JSON; by its number.
    """
    for number, line in enumerate(written.split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            yield where, json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is no JSON ({error}); correct it or leave it out") from error
