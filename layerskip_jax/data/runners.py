"""Who does the units: this process, several of this machine, or an engine Apache Beam knows."""

import collections
import concurrent.futures
import dataclasses
import errno
import itertools
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, runtime_checkable

from layerskip_jax.data.units import Job, Task, UnitRecord
from layerskip_jax.schema import UserError

logger = logging.getLogger(__name__)

ATTEMPTS = 3  # at a unit, of which all but the first are after a failure that may pass
PAUSE_SECONDS = 1.0  # before the second attempt, twice as long before the third
REPORT_SECONDS = 10.0
DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE,
)  # fmt: skip

# Does a part of the work: `make_unit` or `scan_unit`.
Work = Callable[[Job, Task], Any]


@dataclasses.dataclass(frozen=True)
class Failure:
    """A unit that was not done.

    Attributes:
      task: the unit.
      reason: what went wrong at last.
      is_input: whether its input is at fault, so that no further attempt could help.
      is_disk: whether the disk that is written to is full, or fails.
    """

    task: Task
    reason: str
    is_input: bool = False
    is_disk: bool = False


@runtime_checkable
class Runner(Protocol):
    """Does units in any order."""

    def run(
        self, work: Work, job: Job, tasks: Sequence[Task], done: Callable[[Task, Any], None],
        failed: Callable[[Failure], None],
    ) -> None:  # fmt: skip
        """Does every task, telling of each that is done or failed for good.

        `failed` may raise, which ends the work as soon as may be.
        """
        ...


def attempt(work: Work, job: Job, task: Task) -> Any | Failure:
    """Does one unit, again where a failure may pass, and returns its result or the failure."""
    for number in itertools.count(1):
        try:
            return work(job, task)
        except UserError as error:
            return Failure(task, str(error), is_input=True)
        except Exception as error:  # of whatever reads the files
            reason = f"{type(error).__name__}: {error}"
            is_disk = is_of_disk(error)
            if number == ATTEMPTS or is_disk:
                return Failure(task, str(error) if is_disk else reason, is_disk=is_disk)
            logger.warning("%s: %s; trying again", task.unit, reason)
            time.sleep(PAUSE_SECONDS * 2 ** (number - 1))


def is_of_disk(error: Exception) -> bool:
    """Returns whether a disk is full or fails; libraries say so in errors of their own."""
    return any(os.strerror(code) in str(error) for code in DISK_ERRORS)


@dataclasses.dataclass(frozen=True)
class Processes:
    """Workers of this machine; one is this process.

    Attributes:
      workers: how many; 0 is one a core.
    """

    workers: int = 0

    def run(self, work, job, tasks, done, failed) -> None:
        """See `Runner`."""
        progress = _Progress(tasks)

        def tell(task: Task, result: Any) -> None:
            if isinstance(result, Failure):
                failed(result)
            else:
                done(task, result)
            progress.add(task, result)

        count = min(self.workers or cores(), len(tasks))
        if count <= 1:
            for task in tasks:
                tell(task, attempt(work, job, task))
            return
        _Pool(count, work, job, tell).run(tasks)


def cores() -> int:
    """Returns how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Pool:
    """Processes that are started anew where one of them is killed, as for the memory it took."""

    def __init__(self, count: int, work: Work, job: Job, tell: Callable[[Task, Any], None]):
        self._count, self._work, self._job, self._tell = count, work, job, tell

    def run(self, tasks: Sequence[Task]) -> None:
        """Does all tasks."""
        waiting, suspects = collections.deque(tasks), []
        while waiting:
            suspects += self._round(waiting, self._count)
        # Alone, so that the one that is at fault is known.
        for task in suspects:
            for _ in range(ATTEMPTS - 1):
                if not self._round(collections.deque([task]), 1):
                    break
            else:
                self._tell(task, Failure(task, "its worker was killed, as for want of memory"))

    def _round(self, waiting: collections.deque[Task], count: int) -> list[Task]:
        """Does what waits; returns what was under way when a worker was killed, if one was."""
        context = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(
            count, mp_context=context, initializer=_begin_worker
        )
        under_way: dict[concurrent.futures.Future, Task] = {}
        try:
            while waiting or under_way:
                # One more than there are workers, so that none waits for its next.
                while waiting and len(under_way) <= count:
                    task = waiting[0]
                    under_way[pool.submit(attempt, self._work, self._job, task)] = task
                    waiting.popleft()
                finished, _ = concurrent.futures.wait(
                    under_way, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in finished:
                    result = future.result()
                    self._tell(under_way.pop(future), result)
        except BrokenProcessPool:
            logger.warning("a worker was killed; what was under way is tried again")
            return list(under_way.values())
        finally:
            _end(pool)
        return []


def _end(pool: concurrent.futures.ProcessPoolExecutor) -> None:
    """Ends the workers, those in the middle of a unit too."""
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()


def _begin_worker() -> None:
    """Prepares a worker: one core, no Ctrl-C of its own, and no life beyond its parent's."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class _Progress:
    """Says now and then how far the units are, how fast they go and how long the rest takes."""

    def __init__(self, tasks: Sequence[Task]):
        self._total = len(tasks)
        self._bytes_total = sum(map(_bytes_of, tasks))
        self._begun = self._said = time.monotonic()
        self._units = self._bytes = self._tokens = 0

    def add(self, task: Task, result: Any) -> None:
        """Counts one unit more."""
        self._units += 1
        self._bytes += _bytes_of(task)
        if isinstance(result, UnitRecord):
            self._tokens += result.train.tokens + result.held_out.tokens
        now = time.monotonic()
        if now - self._said < REPORT_SECONDS or self._units == self._total:
            return
        self._said = now
        passed = now - self._begun
        left = passed * (self._bytes_total - self._bytes) / max(self._bytes, 1)
        rate = f", {self._tokens / passed:,.0f} tokens/s" if self._tokens else ""
        logger.info(
            "%d of %d units, %.1f MB/s%s, about %s left",
            self._units, self._total, self._bytes / passed / 1e6, rate, _time(left),
        )  # fmt: skip


def _bytes_of(task: Task) -> int:
    return sum(piece.bytes for piece in task.unit.pieces)


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
