"""Folders and files that appear whole or not at all."""

import contextlib
import errno
import glob
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

from layerskip_jax.interrupts import raise_if_interrupted
from layerskip_jax.schema import UserError, as_bytes, is_text

# What helps against errors of the system, by their numbers.
_SPACE, _RIGHTS = "free some space there", "allow that to who runs this"
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _SPACE),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _RIGHTS),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files, by `ulimit -n`"),
    errno.ENAMETOOLONG: "take a shorter name",
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST, errno.EISDIR), "take another folder"),
}
logger = logging.getLogger(__name__)


@contextlib.contextmanager
def staged_folder(folder: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """Yields an empty folder that becomes `folder` once the body has filled it.

    It lies beside `folder`, on the same disk, under a hidden name. After the body its files
    are synced to the disk and it takes the place of `folder`, and what stood there before is
    removed. A reader finds the old folder whole or the new one whole, and none for the moment
    between the two renames; a process killed in that moment leaves both under hidden names.
    Any failure leaves the old folder as it was, and so does Ctrl-C, also where a library has
    swallowed it. What a killed process left half-filled is removed by the next one that writes
    the same folder.

    Args:
      folder: where the result goes; folders above it are made.
      check: called with the resolved `folder`, before anything is written and again before
        it is replaced; raises if what stands there must stay.

    Raises:
      UserError: it cannot be written; names `folder` and the cause.
    """
    folder = folder.resolve()
    require_text_name(folder)
    stage = _sibling(folder, "partial")
    check(folder)
    try:
        _remove_leftovers(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        stage.mkdir()
        yield stage
        for path in (*stage.rglob("*"), stage):
            sync(path)
        check(folder)
        raise_if_interrupted()
        _replace(stage, folder)
        sync(folder.parent)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}{remedy(error)}") from error
    finally:
        # Gone already after success. After a failure its cause is what counts, not whether
        # the same disk also failed here.
        shutil.rmtree(stage, ignore_errors=True)


def remedy(error: OSError) -> str:
    """Returns what helps against an error of the system, to be put after it; "" if nothing known.

    What fails within a library may have no number, but the system's words.
    """
    for number, words in _REMEDIES.items():
        if error.errno == number or (error.errno is None and os.strerror(number) in str(error)):
            return f"; {words}"
    return ""


@contextlib.contextmanager
def named_writes(path: Path) -> Iterator[None]:
    """Names what is written, and what helps, in the system's errors of the body.

    Raises:
      UserError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(unwritable(path, error)) from error


def unwritable(path: PurePath, error: OSError) -> str:
    """Returns what is said of a file or folder that the system does not let be written."""
    return f"{path} cannot be written ({error.strerror or error}){remedy(error)}"


def require_text_name(folder: Path) -> None:
    """Refuses a folder whose path, from the root, is not UTF-8: libraries cannot write there.

    Raises:
      UserError: naming it.
    """
    if not is_text(str(folder)):
        raise UserError(
            f"the folder {as_bytes(str(folder))} has a name that is not UTF-8 text, or lies in one "
            "that has; rename that with mv"
        )


def _sibling(folder: Path, role: str) -> Path:
    return folder.with_name(f".{folder.name}.{role}-{os.getpid()}")


def _remove_leftovers(folder: Path) -> None:
    """Removes what processes that are gone have left half-filled."""
    for stage in folder.parent.glob(f".{glob.escape(folder.name)}.partial-*"):
        owner = stage.name.rsplit("-", 1)[1]
        if owner.isdigit() and not is_alive(int(owner)):
            shutil.rmtree(stage)


def is_alive(process: int) -> bool:
    """Returns whether another process of this number runs on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's
    return process != os.getpid()


def sync(path: Path) -> None:
    """Has the system write a file, or the names in a folder, to the disk."""
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
    try:
        os.rename(folder, previous)
        os.rename(stage, folder)
    except BaseException:  # Ctrl-C as well
        if previous.exists() and not folder.exists():
            os.rename(previous, folder)
        raise
    try:
        shutil.rmtree(previous)
    except OSError as error:
        logger.warning("%s is written; what it replaced is left over: %s", folder, error)


def to_json(value: Any, indent: int | None = None) -> str:
    """Returns JSON; a number that is not finite is `null`, since JSON has no word for it."""

    def finite(value):
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(value), indent=indent, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Writes `to_json` beside `path` and moves it into place: no reader sees half of it."""
    write_text(path, to_json(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text beside `path` and moves it into place."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes beside `path` and moves it into place; what fails leaves nothing behind."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C as well
        temporary.unlink(missing_ok=True)
        raise
