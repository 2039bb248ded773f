"""Where a run's time goes, what each process says and whether it lives, and traces on request."""

import json
import logging
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import jax

from layerskip_jax.run_folder.atomic import named_writes, write_json
from layerskip_jax.run_folder.paths import RunFolder

T = TypeVar("T")
logger = logging.getLogger(__name__)

STEPS = "steps"


class Clock:
    """Books every second since it was made to steps or to what kept the run from them.

    The rest is booked by cause: `start` (restoring and compiling), `data` (waiting for a batch),
    `checkpoint` (what a save keeps the loop from going on) and `evaluation`.
    """

    def __init__(self):
        self._seconds: dict[str, float] = defaultdict(float)
        self._cause, self._since = "start", time.monotonic()

    def _switch(self, cause: str) -> str:
        now, before = time.monotonic(), self._cause
        self._seconds[before] += now - self._since
        self._cause, self._since = cause, now
        return before

    def steps_begin(self) -> None:
        """From here on time goes to steps, unless a cause is named."""
        self._switch(STEPS)

    @contextmanager
    def cause(self, name: str) -> Iterator[None]:
        """Books the body to a cause."""
        before = self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def each(self, items: Iterable[T], cause: str) -> Iterator[T]:
        """Yields the items and books the waiting for them to a cause."""
        iterator = iter(items)
        while True:
            with self.cause(cause):
                item = next(iterator, iterator)
            if item is iterator:
                return
            yield item

    def report(self) -> tuple[float, dict[str, float]]:
        """Returns the goodput, the share of all time that went to steps, and the other seconds."""
        self._switch(self._cause)
        seconds = dict(self._seconds)
        total = sum(seconds.values())
        return seconds.pop(STEPS, 0.0) / max(total, 1e-9), seconds


class _JsonLines(logging.Handler):
    """Appends each log record to a file as a JSON object."""

    def __init__(self, file: Path):
        super().__init__(logging.INFO)
        self._file, self._failed = file.open("a", encoding="utf-8"), False

    def emit(self, record: logging.LogRecord) -> None:
        fields = {
            "time": round(record.created, 3),
            "process": jax.process_index(),
            "level": record.levelname,
            "where": record.name,
            "message": record.getMessage(),
        }
        try:
            self._file.write(json.dumps(fields) + "\n")
            self._file.flush()
        except OSError as error:
            self._say(error)

    def _say(self, error: OSError) -> None:
        """Says once that the file fails: what is logged goes to standard error too."""
        if not self._failed:
            print(f"{self._file.name} cannot be written ({error.strerror})", file=sys.stderr)
        self._failed = True

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            self._say(error)
        super().close()


@contextmanager
def process_log(folder: RunFolder) -> Iterator[None]:
    """Writes what this process logs to a file of its own in `RunFolder.logs`.

    Of several processes, each keeps there as well, in `errors_file`, what native libraries write to
    standard error: when one is lost, pages in each of the others. Python goes on writing to the
    terminal.
    """
    with named_writes(folder.logs), ExitStack() as opened:
        folder.logs.mkdir(exist_ok=True)
        handler = _JsonLines(folder.logs / f"process-{jax.process_index()}.jsonl")
        if jax.process_count() > 1:
            opened.enter_context(_native_errors_to(errors_file(folder)))
        kept = opened.pop_all()
    package = logging.getLogger("layerskip_jax")
    package.addHandler(handler)
    try:
        with kept:
            yield
    finally:
        package.removeHandler(handler)
        handler.close()


def errors_file(folder: RunFolder) -> Path:
    """Returns where native libraries write their errors in a run of several processes."""
    return folder.logs / f"process-{jax.process_index()}.stderr"


@contextmanager
def _native_errors_to(file: Path) -> Iterator[None]:
    """Appends to a file what is written to standard error other than by `sys.stderr`."""
    native, before = 2, sys.stderr
    before.flush()
    with file.open("ab") as errors, ExitStack() as back:
        terminal = back.enter_context(
            os.fdopen(os.dup(native), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
        )
        handlers = [
            handler
            for handler in logging.root.handlers
            if isinstance(handler, logging.StreamHandler) and handler.stream is before
        ]

        def show(stream) -> None:
            sys.stderr = stream
            for handler in handlers:
                handler.setStream(stream)

        show(terminal)
        back.callback(show, before)
        os.dup2(errors.fileno(), native)
        back.callback(os.dup2, terminal.fileno(), native)
        yield


def heartbeat(folder: RunFolder, step: int) -> None:
    """Leaves the step and the time (seconds since 1970) where a monitor finds them."""
    file = folder.logs / f"heartbeat-{jax.process_index()}.json"
    write_json(file, {"step": step, "time": round(time.time(), 3)})


class Profiler:
    """Traces some steps with `jax.profiler`: from a set step on, or from SIGUSR1 on.

    The traces lie in `RunFolder.profiles`, for TensorBoard or Perfetto.
    """

    def __init__(self, folder: RunFolder, first_step: int, steps: int):
        """Takes the step to begin at (0: only on a signal) and how many to trace."""
        self._folder, self._first, self._steps = folder, first_step, steps
        self._asked = False
        self._ends: int | None = None

    def before(self, step: int) -> None:
        """Begins a trace if one is due; `step` is the count that the step brings the run to."""
        if self._ends is None and (self._asked or step == self._first):
            self._asked = False
            self._ends = step + self._steps
            jax.profiler.start_trace(str(self._folder.profiles / f"step-{step}"))
        elif step == self._ends:
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._ends = None
        logger.info("wrote a trace of the device to %s", self._folder.shown(self._folder.profiles))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes SIGUSR1 as the request for a trace, and ends a trace when the body is left."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals can only be caught in the main thread
            return

        def ask(number, frame):
            self._asked = True

        old = signal.signal(signal.SIGUSR1, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGUSR1, old)
            if self._ends is not None:
                self._stop()
