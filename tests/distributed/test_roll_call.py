"""Calling the roll, with a dictionary as coordinator; real processes are in tests/multihost."""

import queue
import threading

import pytest
from jax.errors import JaxRuntimeError

from layerskip_jax.distributed import roll_call
from layerskip_jax.distributed.roll_call import RollCall


class Coordinator:
    """What the client of jax's coordinator does with keys."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value):
        with self.changed:
            if key in self.values:
                raise JaxRuntimeError(f"ALREADY_EXISTS: {key}")
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key, milliseconds):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, milliseconds / 1000):
                raise JaxRuntimeError(f"DEADLINE_EXCEEDED: {key}")
            return self.values[key]

    def key_value_dir_get(self, folder):
        with self.changed:
            return [(k, v) for k, v in self.values.items() if k.startswith(folder)]

    def key_value_try_get(self, key):
        if key not in self.values:
            raise JaxRuntimeError(f"NOT_FOUND: {key}")
        return self.values[key]


@pytest.fixture
def ended(monkeypatch):
    """The threads that would have ended their process."""
    threads = queue.Queue()

    def end():
        threads.put(threading.current_thread())
        threading.Event().wait()

    monkeypatch.setattr(roll_call, "end_at_once", end)
    return threads


def begin(coordinator, *numbers, count=3):
    return [RollCall(coordinator, n, count, "head", f"node{n}") for n in numbers]


def test_nobody_is_missing_where_all_answer(ended):
    """And so again: the roll may be called any number of times, by anyone."""
    processes = begin(Coordinator(), 0, 1, 2)
    for caller in (0, 2, 1):
        assert processes[caller].missing() == []
    assert ended.empty()


def test_who_does_not_answer_is_missing_and_the_others_end(ended, monkeypatch):
    monkeypatch.setattr(roll_call, "_ANSWER_SECONDS", 0.3)
    coordinator = Coordinator()
    first, second = begin(coordinator, 0, 1)
    assert first.missing() == [2]
    with pytest.raises(queue.Empty):
        ended.get(timeout=0.5)  # not before it is said: process 0 is what the others hear through
    first.told()
    assert ended.get(timeout=10) is second._thread and ended.empty()
    assert first.name(1) == "process 1 of 3 (on node1)"
    assert first.name(2) == "process 2 of 3"  # it never said where it is
    assert first.name(0) == "process 0 of 3 (on head)"


def test_the_others_end_too_where_the_caller_never_says_it(ended, monkeypatch):
    monkeypatch.setattr(roll_call, "_ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(roll_call, "_TOLD_SECONDS", 0.3)
    first, second = begin(Coordinator(), 0, 1)
    assert second.missing() == [2]
    assert ended.get(timeout=10) is first._thread and ended.empty()


def test_without_a_coordinator_each_ends(ended, caplog):
    class Gone(Coordinator):
        def blocking_key_value_get(self, key, milliseconds):
            raise JaxRuntimeError("UNAVAILABLE: Socket closed")

    (process,) = begin(Gone(), 1)
    assert ended.get(timeout=10) is process._thread
    assert caplog.messages == [
        "lost process 0 of 3 (on head); this process ends, so that the launcher restarts the run"
    ]
