"""The folder of the units, which who submits shares with all workers: on a disk or a store.

Everything in it has a name of its own, a file or a folder of files, that follows from what it holds
is made of; it is there whole or not at all. On a disk it is written beside its place and moved. An
object store moves nothing, but shows an object only when it is whole: of a folder one file is
uploaded last, by which the others count.
"""

import contextlib
import dataclasses
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Protocol, runtime_checkable

import fsspec

from layerskip_jax.data.tokenizer import file_sha256
from layerskip_jax.run_folder.atomic import sync
from layerskip_jax.run_folder.object_store import is_remote


@runtime_checkable
class UnitFolder(Protocol):
    """What both kinds of folders do; `name` may have folders in it, parted by slashes."""

    def staged(self, name: str, last: str) -> contextlib.AbstractContextManager[Path]:
        """Yields an empty folder of this machine, which becomes `name` once the body has filled it.

        Args:
          name: of the folder; what it held before is replaced.
          last: the file by which the others count.
        """
        ...

    def put(self, file: Path, name: str) -> None:
        """Makes a file of this machine, which may be moved, the file `name`."""
        ...

    def scratch(self, name: str) -> Path:
        """Returns where on this machine a file may be written that nobody else needs."""
        ...

    def find(self, name: str) -> Path:
        """Returns a file of this machine with the content of the file `name`.

        Raises:
          FileNotFoundError: there is none.
        """
        ...

    def texts(self, names: Iterable[str]) -> dict[str, str]:
        """Returns what the files of these names hold, those that there are."""
        ...

    def names(self) -> set[str]:
        """Returns the names of the files and folders in it."""
        ...

    def is_whole(self, name: str, size: int, sha256: str) -> bool:
        """Returns whether a file is there as it was written."""
        ...

    def copy(self, name: str, target: str | Path) -> None:
        """Copies a file to another place on the same disk or store, without its bytes if it can."""
        ...

    def remove(self, name: str = "") -> None:
        """Removes a file or folder, or all there is; of what is not there nothing is said."""
        ...


def unit_folder(place: str | PurePath, here: Path) -> UnitFolder:
    """Returns the folder of units at a place, which need not exist.

    Args:
      place: a folder on a disk or a store.
      here: of a store, the folder on this machine for copies of what is there.
    """
    return StoreFolder(str(place), here) if is_remote(place) else DiskFolder(Path(place))


@dataclasses.dataclass(frozen=True)
class DiskFolder:
    """One on a disk, which several machines may share.

    Attributes:
      path: its place.
    """

    path: Path

    @contextlib.contextmanager
    def staged(self, name: str, last: str) -> Iterator[Path]:
        """See `UnitFolder`."""
        place, stage = self.path / name, self.path / f"{name}.{uuid.uuid4().hex}"
        stage.mkdir(parents=True)
        try:
            yield stage
            for file in (*stage.iterdir(), stage):
                sync(file)
            if place.exists():  # by another worker, or damaged
                shutil.rmtree(place)
            os.rename(stage, place)
            sync(self.path)
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    def put(self, file: Path, name: str) -> None:
        """See `UnitFolder`."""
        place = self.path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        sync(file)
        os.replace(file, place)

    def scratch(self, name: str) -> Path:
        """See `UnitFolder`."""
        return self.path / f"scratch.{uuid.uuid4().hex}.{name}"

    def find(self, name: str) -> Path:
        """See `UnitFolder`."""
        place = self.path / name
        if not place.is_file():
            raise FileNotFoundError(place)
        return place

    def texts(self, names: Iterable[str]) -> dict[str, str]:
        """See `UnitFolder`."""
        found = {}
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found[name] = (self.path / name).read_text(encoding="utf-8")
        return found

    def names(self) -> set[str]:
        """See `UnitFolder`."""
        return {place.name for place in self.path.iterdir()} if self.path.is_dir() else set()

    def is_whole(self, name: str, size: int, sha256: str) -> bool:
        """See `UnitFolder`."""
        place = self.path / name
        return place.is_file() and file_sha256(place) == sha256

    def copy(self, name: str, target: str | Path) -> None:
        """See `UnitFolder`."""
        try:
            os.link(self.path / name, target)
        except OSError:
            shutil.copyfile(self.path / name, target)

    def remove(self, name: str = "") -> None:
        """See `UnitFolder`."""
        place = self.path / name
        if place.is_dir():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class StoreFolder:
    """One on an object store.

    Attributes:
      url: its address, as gs://bucket/folder.
      here: a folder for copies, which all processes of a machine share. Who submits removes it on
        its own; on others it is made anew.
    """

    url: str
    here: Path

    @contextlib.contextmanager
    def staged(self, name: str, last: str) -> Iterator[Path]:
        """See `UnitFolder`."""
        self.here.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.here) as stage:
            yield Path(stage)
            # Nobody takes for whole what is replaced a file at a time.
            self.remove(f"{name}/{last}")
            self.put_all(Path(stage), f"{name}/", last)

    def put(self, file: Path, name: str) -> None:
        """See `UnitFolder`."""
        filesystem, root = self._opened()
        filesystem.put_file(str(file), f"{root}/{name}")

    def put_all(self, stage: Path, prefix: str, last: str) -> None:
        """Uploads the files of a folder of this machine, the one called `last` after the others."""
        files = [file for file in stage.rglob("*") if file.is_file()]
        for file in sorted(files, key=lambda file: (file.name == last, file)):
            self.put(file, f"{prefix}{file.relative_to(stage).as_posix()}")

    def scratch(self, name: str) -> Path:
        """See `UnitFolder`."""
        self.here.mkdir(parents=True, exist_ok=True)
        return self.here / f"scratch.{uuid.uuid4().hex}.{name}"

    def find(self, name: str) -> Path:
        """See `UnitFolder`."""
        copy = self.here / name
        if not copy.is_file():
            filesystem, root = self._opened()
            stage = self.scratch("copy")
            copy.parent.mkdir(parents=True, exist_ok=True)
            filesystem.get_file(f"{root}/{name}", str(stage))
            os.replace(stage, copy)
        return copy

    def texts(self, names: Iterable[str]) -> dict[str, str]:
        """See `UnitFolder`."""
        filesystem, root = self._opened()
        paths = {f"{root}/{name}": name for name in names}
        # All at once, as each takes its time to answer.
        found = filesystem.cat(list(paths), on_error="return") if paths else {}
        failures = [value for value in found.values() if isinstance(value, Exception)]
        for failure in failures:
            if not isinstance(failure, FileNotFoundError):
                raise failure
        return {
            paths[path]: content.decode()
            for path, content in found.items()
            if isinstance(content, bytes)
        }

    def names(self) -> set[str]:
        """See `UnitFolder`."""
        filesystem, root = self._opened()
        with contextlib.suppress(FileNotFoundError):
            return {name.rstrip("/").rpartition("/")[2] for name in filesystem.ls(root, False)}
        return set()

    def is_whole(self, name: str, size: int, sha256: str) -> bool:
        """See `UnitFolder`; a store keeps checksums of its own, so the size is enough."""
        filesystem, root = self._opened()
        with contextlib.suppress(FileNotFoundError):
            return filesystem.size(f"{root}/{name}") == size
        return False

    def copy(self, name: str, target: str | Path) -> None:
        """See `UnitFolder`."""
        filesystem, root = self._opened()
        filesystem.cp_file(f"{root}/{name}", filesystem._strip_protocol(str(target)))

    def remove(self, name: str = "") -> None:
        """See `UnitFolder`."""
        filesystem, root = self._opened()
        with contextlib.suppress(FileNotFoundError):
            filesystem.rm(f"{root}/{name}".rstrip("/"), recursive=True)

    def _opened(self) -> tuple[fsspec.AbstractFileSystem, str]:
        # Others write there too, so a listing is asked for each time.
        return fsspec.core.url_to_fs(self.url, use_listings_cache=False)
