"""The time of a run, booked by a clock that the test turns."""

import os
import signal
import time

import jax
import pytest

from layerskip_jax.run_folder.paths import RunFolder
from layerskip_jax.training.observe import Clock, Profiler


@pytest.fixture
def turn(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def forward(seconds):
        now[0] += seconds

    return forward


def test_every_second_is_booked_once(turn):
    clock = Clock()
    turn(4)  # restoring, compiling
    clock.steps_begin()

    def batches():
        for item in "ab":
            turn(1)
            yield item

    for _ in clock.each(batches(), "data"):
        turn(5)
        with clock.cause("checkpoint"):
            turn(2)
            with clock.cause("evaluation"):
                turn(0.5)
    goodput, lost = clock.report()
    assert lost == {"start": 4, "data": 2, "checkpoint": 4, "evaluation": 1}
    assert goodput == pytest.approx(10 / 21)


def test_a_clock_that_was_never_started_has_no_goodput(turn):
    clock = Clock()
    turn(3)
    assert clock.report() == (0, {"start": 3})


def test_a_signal_asks_for_a_trace(tmp_path):
    folder = RunFolder(tmp_path)
    profiler = Profiler(folder, first_step=0, steps=1)
    with profiler.listening():
        for step in range(1, 5):
            profiler.before(step)
            jax.numpy.zeros(3).block_until_ready()
            if step == 2:
                os.kill(os.getpid(), signal.SIGUSR1)
    (trace,) = folder.profiles.iterdir()
    assert trace.name == "step-3"
    assert list(trace.rglob("*.xplane.pb"))
