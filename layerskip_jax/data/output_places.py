"""Where prepared data are put: on a disk, or on an object store.

On a disk a folder appears whole: it is filled under another name and moved. A store moves nothing;
there the manifest is uploaded last, without which a folder is no prepared data.
"""

import contextlib
import dataclasses
import fcntl
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

from etils import epath

from layerskip_jax.data import origins
from layerskip_jax.data.assembly import DOCUMENTS, EmptyError, Output
from layerskip_jax.data.manifest import (
    MANIFEST_FILE,
    TOKENIZER_FILE,
    Manifest,
    parse_manifest,
    read_manifest,
)
from layerskip_jax.data.runners import is_of_disk
from layerskip_jax.data.unit_folder import DiskFolder, StoreFolder, UnitFolder
from layerskip_jax.run_folder.atomic import remedy, staged_folder, unwritable
from layerskip_jax.run_folder.object_store import AnyPath, is_remote
from layerskip_jax.schema import UserError

logger = logging.getLogger(__name__)

# What is put on a store before the manifest.
_PUT_TOGETHER = re.compile(
    rf".+-[0-9]+\.array_record|{origins.FOLDER}|{DOCUMENTS}|{TOKENIZER_FILE}|.*info\.json|"
    r"features\.json"
)


@runtime_checkable
class OutputPlace(Protocol):
    """What both kinds of places do."""

    def prepared(self) -> Manifest | None:
        """Returns the manifest of prepared data that are there and are to stay."""
        ...

    def check(self) -> None:
        """Looks whether data may be put there.

        Raises:
          UserError: something else is there.
        """
        ...

    def units(self) -> contextlib.AbstractContextManager[UnitFolder]:
        """Yields the folder of the units, kept where the body fails and some units are done.

        Raises:
          UserError: another process prepares the same, or nothing can be written there.
        """
        ...

    def staged(self) -> contextlib.AbstractContextManager[Output]:
        """Yields where to put the data together, which appear there once the body has done so."""
        ...


def output_place(output: AnyPath, overwrite: bool) -> OutputPlace:
    """Returns the place of an output.

    Args:
      output: a folder.
      overwrite: whether prepared data that are there are replaced.

    Raises:
      UserError: a store is to replace what is there.
    """
    if not is_remote(output):
        return DiskPlace(Path(output), overwrite)
    if overwrite:
        raise UserError(
            f"--overwrite: a store cannot exchange one folder for another, so {output} would be "
            "neither the old nor the new data for a while; take another --output, or remove it"
        )
    return StorePlace(output)


@contextlib.contextmanager
def _kept_if_done(folder: UnitFolder, name: str) -> Iterator[None]:
    """Removes the units after the body; where it fails, those that are done stay."""
    try:
        yield
    except BaseException as error:
        # A unit has a folder named by its key alone, and what was looked through a file.
        names = folder.names() - {"lock", "results"}
        done = any("." not in entry or entry.startswith("scan-") for entry in names)
        if isinstance(error, EmptyError) or not done:
            folder.remove()
        else:
            logger.info("what is done is kept in %s, and the same command goes on there", name)
        raise
    folder.remove()


@dataclasses.dataclass(frozen=True)
class DiskPlace:
    """A folder on a disk.

    Attributes:
      output: the folder.
      overwrite: whether prepared data that are there are replaced.
    """

    output: Path
    overwrite: bool

    def prepared(self) -> Manifest | None:
        """See `OutputPlace`."""
        if self.overwrite or not (self.output / MANIFEST_FILE).is_file():
            return None
        return read_manifest(self.output)

    def check(self) -> None:
        """See `OutputPlace`."""
        self._check(self.output.resolve())

    def _check(self, place: Path) -> None:
        if (place / MANIFEST_FILE).is_file():
            if not self.overwrite:
                raise UserError(f"--output={self.output} was prepared by another process meanwhile")
        elif place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise _other_than_data(self.output)

    @contextlib.contextmanager
    def units(self) -> Iterator[UnitFolder]:
        """See `OutputPlace`."""
        with _work_folder(self.output.resolve()) as work, _disk_errors(self.output):
            folder = DiskFolder(work)
            with _kept_if_done(folder, str(work)):
                yield folder

    @contextlib.contextmanager
    def staged(self) -> Iterator[Output]:
        """See `OutputPlace`."""
        with staged_folder(self.output, self._check) as folder:
            yield Output(folder, str(folder))


@dataclasses.dataclass(frozen=True)
class StorePlace:
    """A folder on an object store, which has no lock: whoever submits sees to it that one does.

    Attributes:
      output: the folder.
    """

    output: epath.Path

    def prepared(self) -> Manifest | None:
        """See `OutputPlace`."""
        file = self.output / MANIFEST_FILE
        with _store_errors(self.output):
            text = file.read_text() if file.exists() else None
        return None if text is None else parse_manifest(text, str(file))

    def check(self) -> None:
        """See `OutputPlace`; what an interruption left there does not stay."""
        with _store_errors(self.output):
            there = self._folder(Path()).names()
            if MANIFEST_FILE in there:
                raise UserError(f"--output={self.output} was prepared by another process meanwhile")
            left = not there or self._units_folder(Path()).names()
        if not left or not all(map(_PUT_TOGETHER.fullmatch, there)):
            raise _other_than_data(self.output)

    @contextlib.contextmanager
    def units(self) -> Iterator[UnitFolder]:
        """See `OutputPlace`."""
        with tempfile.TemporaryDirectory(prefix="layerskip-") as here, _store_errors(self.output):
            folder = self._units_folder(Path(here))
            with _kept_if_done(folder, folder.url):
                yield folder

    @contextlib.contextmanager
    def staged(self) -> Iterator[Output]:
        """See `OutputPlace`."""
        self.check()
        with tempfile.TemporaryDirectory(prefix="layerskip-") as here:
            folder = self._folder(Path(here))
            folder.remove()  # of one that was interrupted
            stage = Path(here) / "stage"
            stage.mkdir()
            yield Output(stage, folder.url)
            folder.put_all(stage, "", last=MANIFEST_FILE)

    def _folder(self, here: Path) -> StoreFolder:
        return StoreFolder(str(self.output), here)

    def _units_folder(self, here: Path) -> StoreFolder:
        return StoreFolder(str(self.output.with_name(f".{self.output.name}.units")), here)


def _other_than_data(output: AnyPath) -> UserError:
    return UserError(f"--output={output} exists and is no prepared data; take another folder")


@contextlib.contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """Yields the folder of the units on a disk, which no other process takes meanwhile."""
    work = output.with_name(f".{output.name}.units")
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("a")
    except OSError as error:
        raise UserError(unwritable(output, error)) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--output={output} is being prepared by another process; wait for it, end it, or "
                "take another folder"
            ) from None
        except OSError as error:  # some network file systems have no locks
            logger.warning(
                "%s cannot be locked (%s); see to it that no other process prepares there",
                work, error.strerror,
            )  # fmt: skip
        for stage in work.glob("*.*/"):  # of workers that were killed
            if stage.is_dir():
                shutil.rmtree(stage, ignore_errors=True)
        yield work


@contextlib.contextmanager
def _disk_errors(output: Path) -> Iterator[None]:
    """Raises as a `UserError` what the system, or a library in its own errors, says of the disk."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not is_of_disk(error):
            raise
        told = error if isinstance(error, OSError) else OSError(str(error))  # has no number then
        raise UserError(f"cannot write {output}: {error}{remedy(told)}") from error


@contextlib.contextmanager
def _store_errors(output: epath.Path) -> Iterator[None]:
    """Raises whatever the body raises of a store as a `UserError` that names the output.

    Each package raises kinds of its own, with no class in common.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"--output={output} cannot be read or written ({type(error).__name__}: {error}); check "
            "the bucket's name, the credentials and disk of this machine, and the network"
        ) from error
