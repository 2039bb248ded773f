"""One training at a time in a folder.

On a disk the operating system keeps the lock, which ends with the process that holds it, however
that ends. An object store keeps none: there the lock is an object, made only where there is none,
that its holder renews. One that was not renewed for a while was left behind and is taken over.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
from etils import epath

from layerskip_jax.distributed.processes import end_for_restart
from layerskip_jax.run_folder.atomic import is_alive
from layerskip_jax.run_folder.object_store import named_failures
from layerskip_jax.run_folder.paths import RunFolder
from layerskip_jax.schema import UserError

logger = logging.getLogger(__name__)

# A process that was killed may take a moment to end while the next one begins already.
GRACE_SECONDS = 10.0
RENEW_SECONDS, LEASE_SECONDS = 20.0, 60.0


@contextlib.contextmanager
def locked(folder: RunFolder) -> Iterator[None]:
    """Keeps every other `locked` folder of the same place out while the body runs.

    Args:
      folder: made if it does not exist.

    Raises:
      UserError: another process has it; names the process and its host.
      OSError: the folder cannot be written.
    """
    if folder.spool is None:
        folder.path.mkdir(parents=True, exist_ok=True)
        lock = _lock_file(folder.path / ".lock")
    else:
        lock = _lock_object(folder.spool.remote)
    with lock:
        yield


def _holder() -> dict:
    """Returns what a lock says of its holder."""
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return {"host": socket.gethostname(), "process": os.getpid(), "since": since}


def _refused(place: Path | epath.Path, holder: dict) -> UserError:
    return UserError(
        f"--workdir={place} is being trained by {_words(holder)}; wait for it, end it, or take "
        "another folder"
    )


def _words(holder: dict) -> str:
    if not holder:
        return "another process"
    return f"process {holder['process']} on {holder['host']} since {holder['since']}"


def _wait_until(try_it: Callable[[], bool], seconds: float, what: str) -> bool:
    """Tries until it works or the time is over, and returns whether it worked."""
    ends, said = time.monotonic() + seconds, False
    while not try_it():
        if time.monotonic() > ends:
            return False
        if not said:
            logger.warning("waiting up to %.0f s for %s", seconds, what)
            said = True
        time.sleep(min(0.5, seconds / 5))
    return True


@contextlib.contextmanager
def _lock_file(file: Path) -> Iterator[None]:
    with file.open("a+", encoding="utf-8") as lock:

        def take() -> bool:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        try:
            taken = _wait_until(take, GRACE_SECONDS, f"the process that trains in {file.parent}")
        except OSError as error:
            # Some network file systems have no locks.
            logger.warning(
                "%s cannot be locked (%s); see to it that no other process trains there",
                file.parent, error.strerror,
            )  # fmt: skip
            yield
            return
        if not taken:
            raise _refused(file.parent, _read(file.read_text(encoding="utf-8")))
        _write(lock, json.dumps(_holder()))
        try:
            yield
        finally:
            _write(lock, "")


def _write(file, text: str) -> None:
    file.truncate(0)
    file.write(text)
    file.flush()


def _read(text: str | bytes) -> dict:
    """Returns what a lock says, and nothing of one that is about to be written."""
    try:
        holder = json.loads(text)
    except ValueError:
        return {}
    known = isinstance(holder, dict) and {"host", "process", "since"} <= holder.keys()
    return holder if known else {}


class _LockObject:
    """The object that is a folder's lock on a store."""

    def __init__(self, home: epath.Path):
        self._home, self.path = home, home / ".lock"
        self._filesystem, self._name = fsspec.core.url_to_fs(str(self.path))
        self._ours = {**_holder(), "id": uuid.uuid4().hex}
        self.first = self.read()

    def read(self) -> dict | None:
        """Returns what the lock says, None where there is none."""
        with self._failures(), contextlib.suppress(FileNotFoundError):
            return _read(self._filesystem.cat_file(self._name))
        return None

    def write(self, **how: str) -> None:
        content = json.dumps({**self._ours, "renewed": time.time()})
        self._filesystem.pipe_file(self._name, content.encode(), **how)

    def remove(self) -> None:
        with self._failures(), contextlib.suppress(FileNotFoundError):
            self._filesystem.rm_file(self._name)

    def take(self) -> bool:
        """Takes a lock that is free, or was left by a process of this host that is gone.

        Raises:
          UserError: its holder has renewed it since the first look, or just taken it.
        """
        holder = self.read()
        if holder and holder["host"] == self._ours["host"] and not is_alive(holder["process"]):
            self.remove()
            holder = None
        if holder is None:
            return self.create()
        if holder != self.first:
            raise _refused(self._home, holder)
        return False

    def create(self) -> bool:
        """Makes it where there is none; returns False where another process was first."""
        try:
            self.write(mode="create")
        # Each package raises kinds of its own, and some stores know no such write.
        except Exception:
            if self.read() is not None:
                return False
            with self._failures():
                self.write()
        return True

    def is_ours(self) -> bool:
        """Returns whether no other process has taken it over."""
        holder = self.read()
        return holder is not None and holder.get("id") == self._ours["id"]

    def refused(self) -> UserError:
        return _refused(self._home, self.read() or {})

    def _failures(self) -> contextlib.AbstractContextManager:
        return named_failures(self.path, "cannot be read or written")


@contextlib.contextmanager
def _lock_object(home: epath.Path) -> Iterator[None]:
    lock = _LockObject(home)
    if not _wait_until(lock.take, LEASE_SECONDS, f"a sign of life of {_words(lock.first or {})}"):
        lock.remove()
        if not lock.create():
            raise lock.refused()
    done = threading.Event()

    def renew() -> None:
        while not done.wait(RENEW_SECONDS):
            try:
                ours = lock.is_ours()
                if ours:
                    lock.write()
            except Exception as error:  # each package raises kinds of its own
                logger.warning("%s is not renewed (%s); it is tried again soon", lock.path, error)
                continue
            if not ours:
                end_for_restart(f"another process has taken over {home}")

    thread = threading.Thread(target=renew, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if lock.is_ours():
            lock.remove()
