"""Folders and files that appear whole or not at all."""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from layerskip_jax.schema import UserError

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def staged_folder(folder: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """Yields an empty folder that becomes `folder` once the body has filled it.

    It lies beside `folder`, on the same disk, under a hidden name. After the body its files
    are synced to the disk and it takes the place of `folder`, and what stood there before is
    removed. A reader finds the old folder whole or the new one whole, and none for the moment
    between the two renames; a process killed in that moment leaves both under hidden names.
    Any failure leaves the old folder as it was. What a killed process left half-filled is
    removed by the next one that writes the same folder.

    Args:
      folder: where the result goes; folders above it are made.
      check: called with the resolved `folder`, before anything is written and again before
        it is replaced; raises if what stands there must stay.

    Raises:
      UserError: it cannot be written; names `folder` and the cause.
    """
    folder = folder.resolve()
    stage = _sibling(folder, "partial")
    check(folder)
    try:
        _remove_leftovers(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        stage.mkdir()
        yield stage
        for path in (*stage.rglob("*"), stage):
            _sync(path)
        check(folder)
        _replace(stage, folder)
        _sync(folder.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error}; free some space or take another folder"
        ) from error
    finally:
        # Gone already after success. After a failure its cause is what counts, not whether
        # the same disk also failed here.
        shutil.rmtree(stage, ignore_errors=True)


def _sibling(folder: Path, role: str) -> Path:
    return folder.with_name(f".{folder.name}.{role}-{os.getpid()}")


def _remove_leftovers(folder: Path) -> None:
    """Removes what processes that are gone have left half-filled."""
    for stage in folder.parent.glob(f".{folder.name}.partial-*"):
        owner = stage.name.rsplit("-", 1)[1]
        if owner.isdigit() and not _is_alive(int(owner)):
            shutil.rmtree(stage)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's
    return process != os.getpid()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(stage: Path, folder: Path) -> None:
    if not folder.exists() or not any(folder.iterdir()):
        os.rename(stage, folder)  # takes the place of an empty folder, too
        return
    previous = _sibling(folder, "previous")
    os.rename(folder, previous)
    try:
        os.rename(stage, folder)
    except OSError:
        os.rename(previous, folder)
        raise
    try:
        shutil.rmtree(previous)
    except OSError as error:
        logger.warning("%s is written; what it replaced is left over: %s", folder, error)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON beside `path` and moves it into place, so that no reader sees half of it."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text beside `path` and moves it into place."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes beside `path` and moves it into place; what fails leaves nothing behind."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
