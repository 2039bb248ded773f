"""What watches over a run: steps that are not finite, spikes of the loss, steps that hang."""

import collections
import faulthandler
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np

from layerskip_jax.config import SPIKE_WINDOW, GuardsConfig
from layerskip_jax.schema import UserError
from layerskip_jax.training.step import StepMetrics

T = TypeVar("T")
logger = logging.getLogger(__name__)


class RollBack(Exception):
    """Asks to go back before some steps and to leave their batches out.

    Attributes:
      first: the first of the steps, from 1.
      last: the last of them.
    """

    def __init__(self, first: int, last: int):
        super().__init__(f"steps {first} to {last} were not finite")
        self.first, self.last = first, last


class Guards:
    """Reads the metrics of each step, in order, for what must not go on unseen.

    A step whose loss or gradient was not finite has changed nothing on the devices (see
    `make_train_step`); here such steps are counted, and too many in a row end the run.
    """

    def __init__(
        self,
        config: GuardsConfig,
        windows: Callable[[int], list[int]],
        last_checkpoint: Callable[[], int | None],
        roll_backs_done: int = 0,
    ):
        """Begins with nothing seen.

        Args:
          config: the limits.
          windows: numbers of the training windows in the batch of a step, from 0.
          last_checkpoint: the step of the newest one, or None.
          roll_backs_done: how often the run went back so far.
        """
        self._config = config
        self._windows, self._last_checkpoint = windows, last_checkpoint
        self._losses: collections.deque[float] = collections.deque(maxlen=SPIKE_WINDOW)
        self._roll_backs_left = config.roll_backs - roll_backs_done
        self.in_a_row = 0

    def check(self, step: int, metrics: StepMetrics) -> None:
        """Takes the metrics, on the host, of the step that brought the count to `step`.

        Raises:
          UserError: more steps in a row were not finite than the limit allows.
          RollBack: the same, and a roll-back is left.
        """
        loss = float(metrics.loss)
        if metrics.skipped:
            self.in_a_row += 1
            logger.warning(
                "step %d: loss %s, gradient norm %s: skipped, parameters and optimizer are as "
                "before; batch %08x, windows %s", step, loss, float(metrics.gradient_norm),
                int(metrics.batch), self._windows(step - 1),
            )  # fmt: skip
            if self.in_a_row > self._config.nonfinite_limit:
                self._stop(step)
            return
        self.in_a_row = 0
        if len(self._losses) == SPIKE_WINDOW and self._config.spike_deviations:
            mean, deviation = np.mean(self._losses), np.std(self._losses)
            if loss > mean + self._config.spike_deviations * deviation:
                logger.warning(
                    "step %d: loss %.4f is a spike: %.4f +- %.4f over the %d steps before; "
                    "batch %08x, windows %s", step, loss, mean, deviation, SPIKE_WINDOW,
                    int(metrics.batch), self._windows(step - 1),
                )  # fmt: skip
        self._losses.append(loss)

    def _stop(self, step: int) -> None:
        first, saved = step - self.in_a_row + 1, self._last_checkpoint()
        if self._roll_backs_left > 0:
            raise RollBack(first, step)
        batches = "\n".join(f"  step {s}: {self._windows(s - 1)}" for s in range(first, step + 1))
        raise UserError(
            f"{self.in_a_row} steps in a row, {first} to {step}, had a loss or gradient that is "
            f"not finite (config.guards.nonfinite_limit={self._config.nonfinite_limit}); they "
            f"changed nothing. Their batches hold the training windows\n{batches}\n"
            + ("No checkpoint is saved. " if saved is None else f"Last checkpoint: step {saved}. ")
            + "Lower config.optimizer.learning_rate, lengthen warmup_steps, or look at those "
            "windows; a run with other settings takes a new --workdir, with "
            "--config.init_from=THIS_RUN to start from its last checkpoint"
        )


class Watchdog:
    """Ends the process when a step takes too long, after writing every thread's stack.

    The timer is the interpreter's own and needs no lock of Python, so it fires even where a
    collective waits for ever. The process ends with exit code 1, a crash to any launcher.
    """

    def __init__(self, limit: float):
        """Takes the limit in seconds; 0 never fires."""
        self._limit = limit

    def beat(self) -> None:
        """Starts the time anew."""
        if self._limit:
            faulthandler.dump_traceback_later(self._limit, exit=True, file=sys.__stderr__)

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """Yields the items, with a beat before each: none may take longer than the limit."""
        for item in items:
            self.beat()
            yield item
        self.beat()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Beats once, and is off when the body is left."""
        self.beat()
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
