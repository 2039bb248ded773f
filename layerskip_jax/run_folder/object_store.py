"""Folders on an object store: `gs://bucket/run` and `s3://bucket/run` beside paths on a disk.

A store keeps objects whole: nothing is appended to one and nothing renamed. So what grows or is
replaced lies in a local folder, a `Spool`, from where it is uploaded, and all that writes it knows
a local folder only. Checkpoints are too large for that; orbax writes them to the store itself.
"""

import contextlib
import importlib.util
import logging
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any

import fsspec
from etils import epath

from layerskip_jax.schema import UserError

logger = logging.getLogger(__name__)

# epath prefers TensorFlow's file system where that is installed; one way to a store is enough.
os.environ.setdefault("EPATH_USE_TF", "false")

AnyPath = Path | epath.Path

# The packages that reach the stores.
PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
UPLOAD_SECONDS = 30.0


def is_remote(path: str | PurePath) -> bool:
    """Returns whether `path` names a folder or file on an object store."""
    return "://" in str(path)


def require_local(path: str | PurePath, what: str) -> None:
    """Refuses a path on an object store.

    Args:
      path: as it was given.
      what: names the setting, and what is there.

    Raises:
      UserError: it is one.
    """
    if is_remote(path):
        raise UserError(
            f"{what} must be on a local or shared disk, not on an object store like {path}; copy "
            "it to a disk first"
        )


def as_path(path: str | PurePath) -> AnyPath:
    """Returns a path on a disk, or one on an object store that has answered.

    Raises:
      UserError: the store is of an unknown kind, its package is missing, or it cannot be reached.
    """
    scheme, separator, _ = str(path).partition("://")
    if not separator:
        return Path(path)
    if scheme not in PACKAGES:
        raise UserError(f"{path} is on no known store; take a path on a disk, gs:// or s3://")
    package = PACKAGES[scheme]
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{path} needs the package {package}, which is not installed; `pip install {package}`"
        )
    # Other processes and tensorstore write there too, so a listing is asked for each time.
    for name in {"gs": ("gs", "gcs"), "s3": ("s3",)}[scheme]:
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    remote = epath.Path(str(path))
    with named_failures(remote, "cannot be reached"):
        remote.exists()
    return remote


def absolute(path: AnyPath) -> AnyPath:
    """Returns the path from the root; on a store it is that already, which epath does not see."""
    return path if is_remote(path) else path.absolute()


@contextlib.contextmanager
def named_failures(path: epath.Path, what: str) -> Iterator[None]:
    """Turns whatever the body raises into a `UserError` that names the path.

    Each package raises kinds of its own, with no class in common.
    """
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{path} {what} ({type(error).__name__}: {error}); check the bucket's name, the "
            "credentials of this machine, and the network"
        ) from error


def move_folder(source: AnyPath, target: AnyPath) -> None:
    """Moves a folder to a new place on the same disk or store, making the folder above it.

    On a store every object is copied before the first is deleted, so that whoever is stopped
    in between leaves one of the two whole.

    Raises:
      FileNotFoundError: there is no such folder.
      UserError: the store failed.
    """
    if not is_remote(source):
        target.parent.mkdir(exist_ok=True)
        os.rename(source, target)
        return
    filesystem, root = fsspec.core.url_to_fs(str(source))
    failures = named_failures(source, f"cannot be moved to {target}")
    with failures, contextlib.suppress(FileNotFoundError):  # where another process was first
        objects = filesystem.find(root)
        for name in objects:
            filesystem.cp_file(name, f"{target}{name.removeprefix(root)}")
        if objects:
            filesystem.rm(root, recursive=True)
            return
    raise FileNotFoundError(str(source))


def kvstore(path: AnyPath) -> str | dict[str, Any]:
    """Returns what tensorstore calls the folder `path`."""
    if not str(path).startswith("s3://"):
        return f"{absolute(path).as_uri()}/"
    bucket, _, key = str(path).removeprefix("s3://").partition("/")
    # Tensorstore reads neither AWS_ENDPOINT_URL nor a profile's endpoint; s3fs has found it.
    filesystem = fsspec.filesystem("s3")
    filesystem.connect()
    client = filesystem.s3.meta
    spec = {"driver": "s3", "bucket": bucket, "path": f"{key}/"}
    if client.region_name not in (None, "aws-global"):
        spec["aws_region"] = client.region_name
    if "AWS_ACCESS_KEY_ID" in os.environ:
        # Where it would find them in the end, having complained of every place it looked first.
        spec["aws_credentials"] = {"type": "environment"}
    if not client.endpoint_url.endswith(".amazonaws.com"):
        # A store that is not Amazon's may want a region for its signatures, and takes any.
        spec |= {"endpoint": client.endpoint_url, "aws_region": client.region_name or "us-east-1"}
    return spec


class Spool:
    """The local side of a folder on an object store.

    What is written to `local` is uploaded: every file that has changed since, and always whole, so
    that a reader finds the old object or the new one. Hidden files are those that are not ready
    yet, and stay. A process uploads what it has written itself and nothing else, so several of
    them share the folder on the store as they would one on a disk.

    Attributes:
      local: a new folder on this machine, removed when the spool is not used any more.
      remote: the folder on the store.
    """

    def __init__(self, remote: epath.Path, last: str = ""):
        """Makes the local folder.

        Args:
          remote: the folder on the store, which need not exist.
          last: the name of the file that makes the others count; uploaded after them.
        """
        self.local, self.remote = Path(tempfile.mkdtemp(prefix="layerskip-")), remote
        self._last = last
        self._uploaded: dict[Path, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._worker = ThreadPoolExecutor(1, "upload")
        self._pending: Future | None = None
        self._not_before = 0.0
        self._removal = weakref.finalize(self, shutil.rmtree, self.local, ignore_errors=True)

    def fetch(self, names: Iterable[str]) -> None:
        """Downloads the files of these names that there are, and whole folders: `name/`."""
        for name in names:
            with named_failures(self.remote, "cannot be read"):
                found = self._read(name)
            for path, content in found.items():
                self._keep(path, content)

    def _read(self, name: str) -> dict[PurePath, bytes]:
        """Returns what there is of a file or a folder on the store, by the names in it."""
        paths = [self.remote / name]
        if name.endswith("/"):
            [folder] = paths
            inner = folder.iterdir() if folder.is_dir() else ()
            paths = [path for path in inner if not path.is_dir()]
        found = {}
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                found[path.relative_to(self.remote)] = path.read_bytes()
        return found

    def _keep(self, name: PurePath, content: bytes) -> None:
        file = self.local / name
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        except OSError as error:  # of this machine's disk, not of the store
            raise UserError(
                f"{file}, a copy of one in {self.remote}, cannot be written ({error}); free some "
                "space there, or set TMPDIR to another folder"
            ) from error
        self._uploaded[file] = _stamp(file)

    def upload(self) -> None:
        """Uploads what has changed, and returns when it is there.

        Raises:
          UserError: the store failed; the rest is tried again with the next call.
        """
        with self._lock:
            files = [path for path in self.local.rglob("*") if self._counts(path)]
            for file in sorted(files, key=lambda path: (path.name == self._last, path)):
                try:
                    # The stamp first: what is written while this is read counts as a change.
                    stamp = _stamp(file)
                    if self._uploaded.get(file) == stamp:
                        continue
                    content = file.read_bytes()
                except FileNotFoundError:
                    continue  # removed since it was listed
                target = self.remote / str(file.relative_to(self.local))
                with named_failures(target, "cannot be written"):
                    target.write_bytes(content)
                self._uploaded[file] = stamp

    def _counts(self, path: Path) -> bool:
        hidden = any(part.startswith(".") for part in path.relative_to(self.local).parts)
        return not hidden and path.is_file() and not path.is_symlink()

    def upload_soon(self, urgent: bool = False) -> None:
        """Has another thread upload what has changed, unless it did so a moment ago.

        A failure is only logged: the next upload makes up for it.

        Args:
          urgent: whether to upload even so, and the next time again.
        """
        now = time.monotonic()
        if not urgent and now < self._not_before:
            return
        self._not_before = now if urgent else now + UPLOAD_SECONDS
        # One that waits for its turn will see the files as they are then.
        if self._pending is None or self._pending.running() or self._pending.done():
            self._pending = self._worker.submit(self._try_to_upload)

    def _try_to_upload(self) -> None:
        try:
            self.upload()
        except UserError as error:
            logger.warning("%s; it is tried again soon", error)

    def close(self) -> None:
        """Uploads what is left.

        Raises:
          UserError: the store failed; names the local folder, which then stays.
        """
        self._worker.shutdown()
        try:
            self.upload()
        except UserError as error:
            self._removal.detach()
            raise UserError(f"{error}; what is not uploaded lies in {self.local}") from error


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_mtime_ns, status.st_size
