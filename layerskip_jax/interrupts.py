"""Ctrl-C ends a verb wherever it comes, also where the exception that it raises gets lost.

Python raises KeyboardInterrupt in whatever the main thread is at. Within a callback of a native
library it may be dropped: the library takes it for the end of what it reads, or prints it and goes
on. So it is remembered, and raised again until it has arrived; and what has to be whole is put in
its place only after `raise_if_interrupted`.
"""

import atexit
import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator

# Until it is looked whether the interrupt has arrived, and each time after.
AGAIN_SECONDS = 0.3
_came = threading.Event()


def interrupted() -> bool:
    """Returns whether Ctrl-C came, since `interrupts_remembered` was entered."""
    return _came.is_set()


def raise_if_interrupted() -> None:
    """Raises KeyboardInterrupt if Ctrl-C came and was lost since."""
    if _came.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def interrupts_remembered(end: Callable[[], None]) -> Iterator[None]:
    """Has Ctrl-C raise KeyboardInterrupt in the body until nothing has swallowed it.

    While it is being handled, and something tidied up, it is not raised again. From the first one
    on, threads and callbacks that fail print no traceback, and other packages log nothing. A
    process that was started to ignore Ctrl-C goes on ignoring it.

    Args:
      end: ends the process at once, for a second Ctrl-C, or one after the body.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def first(number, frame):
        if _came.is_set():
            end()
        _came.set()
        _silence()
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS, AGAIN_SECONDS)
        raise KeyboardInterrupt

    def again(number, frame):
        if not _is_being_handled():
            raise KeyboardInterrupt

    # Once all is done, and Python gives the signal back to the system, which would kill.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    before = signal.signal(signal.SIGALRM, again)
    signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, lambda number, frame: end())
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _is_being_handled() -> bool:
    """Whether the interrupted code runs in an `except` or `finally` of a KeyboardInterrupt."""
    error = sys.exception()
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _silence() -> None:
    """Keeps quiet what others would say of work that ends in its middle."""

    def nothing(*_):
        """Native libraries print by these what their callbacks raise."""

    sys.excepthook = sys.unraisablehook = threading.excepthook = nothing
    for name in list(logging.root.manager.loggerDict):
        if name.split(".")[0] != __package__:
            logging.getLogger(name).disabled = True
