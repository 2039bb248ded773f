"""A folder that appears whole or not at all."""

import contextlib
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from layerskip_jax.schema import UserError

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def staged_folder(folder: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """Yields an empty folder that becomes `folder` once the body has filled it.

    It lies beside `folder`, on the same disk, under a hidden name. After the body its files
    are synced to the disk and it takes the place of `folder`, and what stood there before is
    removed. A reader finds the old folder whole or the new one whole, and none for the moment
    between the two renames; a process killed in that moment leaves both under hidden names.
    Any failure leaves the old folder as it was.

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
        folder.parent.mkdir(parents=True, exist_ok=True)
        stage.mkdir()
        yield stage
        for path in (*stage.iterdir(), stage):
            _sync(path)
        check(folder)
        _replace(stage, folder)
        _sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {error}") from error
    finally:
        # Gone already after success. After a failure its cause is what counts, not whether
        # the same disk also failed here.
        shutil.rmtree(stage, ignore_errors=True)


def _sibling(folder: Path, role: str) -> Path:
    return folder.with_name(f".{folder.name}.{role}-{secrets.token_hex(4)}")


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
