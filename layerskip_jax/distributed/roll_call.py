"""Who is lost, when the processes of a run can no longer work together.

A process that is killed takes the others with it: some see a collective fail, and others wait in it
for ever. The coordinator itself notices only after 100 seconds. So whoever sees a failure calls the
roll, each process answers from a thread of its own, and who does not answer is lost. The caller
says so; then all of them end, for the launcher to start anew. Where nobody sees a failure, since
all wait, the launcher or the watchdog ends them.
"""

import atexit
import contextlib
import itertools
import json
import logging
import os
import queue
import sys
import threading
import time
import traceback
from typing import NoReturn

import jax
from jax.errors import JaxRuntimeError

logger = logging.getLogger(__name__)

# A thread answers at once, unless its process is stopped or its machine overloaded.
_ANSWER_SECONDS = 5.0
_TOLD_SECONDS = 10.0  # for the caller to say who is lost
_LOOK_SECONDS = 0.1
_FOREVER = 10**9  # milliseconds
_CRASH = 1  # exit code


class RollCall:
    """Answers calls of the roll in a thread, and calls it.

    Attributes:
      number: of this process.
    """

    def __init__(self, client, number: int, count: int, coordinator: str, host: str):
        """Begins to answer.

        Args:
          client: of the coordinator, which lives in process 0.
          number: of this process.
          count: of processes.
          coordinator: the host of process 0.
          host: of this process, as the launcher's engine calls it.
        """
        self.number = number
        self._client, self._count, self._coordinator = client, count, coordinator
        self._answered = 0
        self._leaving = False
        self._missing: queue.Queue[tuple[int, list[int]]] = queue.Queue()
        client.key_value_set(_host_key(number), host)
        self._thread = threading.Thread(target=self._answer, name="roll call", daemon=True)
        self._thread.start()

    def missing(self) -> list[int]:
        """Calls the roll and returns the numbers of those that do not answer.

        Where another process has found that some are lost, or the coordinator is, this one ends.
        """
        call = self._answered
        # Refused if another process was first, or the coordinator is gone: the thread hears it.
        with contextlib.suppress(JaxRuntimeError):
            self._client.key_value_set(f"{_call_key(call)}/caller", str(self.number))
        while (answered := self._missing.get())[0] < call:
            pass  # of a call before
        return answered[1]

    def name(self, number: int) -> str:
        """Returns how to call a process: its number, and its host where that is known."""
        host = self._coordinator
        if number > 0:
            try:
                host = self._client.key_value_try_get(_host_key(number))
            except JaxRuntimeError:
                return f"process {number} of {self._count}"  # it was lost before it said so
        return f"process {number} of {self._count} (on {host})"

    def told(self) -> None:
        """Lets the others end, now that it is said who is lost.

        Process 0 takes the coordinator with it, and the caller too if that were still speaking.
        """
        with contextlib.suppress(JaxRuntimeError):  # the coordinator is gone
            self._client.key_value_set(f"{_call_key(self._answered - 1)}/told", "")

    def leave(self) -> None:
        """Answers no more; the processes of a run end together, or after this."""
        self._leaving = True
        jax.distributed.shutdown()
        self._thread.join()

    def _answer(self) -> None:
        for call in itertools.count():
            key = _call_key(call)
            try:
                caller = int(self._client.blocking_key_value_get(f"{key}/caller", _FOREVER))
            except JaxRuntimeError:
                if not self._leaving:
                    logger.error("%s", _lost(self.name(0)))
                    end_at_once()
                return
            try:
                missing = self._found(key, is_caller=caller == self.number)
            except JaxRuntimeError:
                end_at_once()  # as the others have: the coordinator is gone, or who called
            if missing and caller != self.number:
                with contextlib.suppress(JaxRuntimeError):  # the caller is gone too, or slow
                    self._client.blocking_key_value_get(f"{key}/told", int(1000 * _TOLD_SECONDS))
                end_at_once()
            self._answered = call + 1
            self._missing.put((call, missing))

    def _found(self, key: str, is_caller: bool) -> list[int]:
        """Answers a call, and returns who does not."""
        self._client.key_value_set(f"{key}/present/{self.number}", "")
        if not is_caller:
            patience = int(4000 * _ANSWER_SECONDS)
            return json.loads(self._client.blocking_key_value_get(f"{key}/missing", patience))
        missing, until = set(range(self._count)), time.monotonic() + _ANSWER_SECONDS
        while missing and time.monotonic() < until:
            time.sleep(_LOOK_SECONDS)
            present = self._client.key_value_dir_get(f"{key}/present/")
            missing -= {int(name.rpartition("/")[2]) for name, _ in present}
        self._client.key_value_set(f"{key}/missing", json.dumps(sorted(missing)))
        return sorted(missing)


def _host_key(number: int) -> str:
    return f"layerskip/host/{number}"


def _call_key(call: int) -> str:
    return f"layerskip/roll_call/{call}"


def _lost(names: str, more: str = "") -> str:
    return f"lost {names}; this process ends, so that the launcher restarts the run{more}"


def end_at_once() -> NoReturn:
    """Ends this process as crashed, without waiting for the others as at a usual end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_CRASH)


_roll_call: RollCall | None = None


def begin_roll_calls(client, number: int, count: int, coordinator: str) -> None:
    """Takes part in roll calls from now on, and ends at once where an error is not caught.

    Otherwise it would wait at its end for the others, who wait for it in a collective.
    """
    global _roll_call
    host = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
    _roll_call = RollCall(client, number, count, coordinator, host)
    atexit.register(_roll_call.leave)

    def end(kind, error, trace) -> None:
        end_if_others_are_lost(error)
        sys.__excepthook__(kind, error, trace)
        end_at_once()

    sys.excepthook = end


def end_if_others_are_lost(error: BaseException, log: str = "") -> None:
    """Ends this process if others of its run are lost; says who is, in one line.

    Args:
      error: what failed here; its traceback goes to where native libraries write their errors.
      log: that place, to be named.
    """
    if _roll_call is None or not (missing := _roll_call.missing()):
        return
    names = ", ".join(_roll_call.name(number) for number in missing)
    logger.error("%s", _lost(names, f"; what it saw is in {log}" if log else ""))
    # By its number: sys.stderr may still be the terminal.
    os.write(2, "".join(traceback.format_exception(error)).encode(errors="replace"))
    _roll_call.told()
    end_at_once()
