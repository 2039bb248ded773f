"""How many windows each step has: a batch that doubles at some steps, up to its full size."""

import dataclasses

import numpy as np
from jaxtyping import Int

from layerskip_jax.config import TrainingConfig


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """The windows of each step, from 0.

    Attributes:
      full: B, the size after the last doubling.
      doublings: the steps from which on a batch has twice the windows, ascending.
    """

    full: int
    doublings: tuple[int, ...] = ()

    @classmethod
    def of(cls, training: TrainingConfig) -> "BatchSizes":
        """Returns those of a run."""
        return cls(training.batch_size, training.batch_ramp)

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """The first step, and the size, of each stretch of equal batches."""
        count = len(self.doublings)
        firsts = (0, *self.doublings)
        return tuple((first, self.full >> (count - i)) for i, first in enumerate(firsts))

    def at(self, step: int) -> int:
        """Returns the windows of a step."""
        return next(size for first, size in reversed(self.stages) if step >= first)

    def before(self, step: int) -> int:
        """Returns the windows of all steps before `step`."""
        total = 0
        for (first, size), last in zip(self.stages, (*self.doublings, step), strict=True):
            total += size * max(min(last, step) - first, 0)
        return total

    def between(self, first: int, last: int) -> Int[np.ndarray, "T"]:
        """Returns the windows of each of the steps first..last-1."""
        firsts, sizes = np.array(self.stages).T
        return sizes[np.searchsorted(firsts, np.arange(first, last), side="right") - 1]

    def steps_for(self, windows: float | int) -> int:
        """Returns the fewest steps that have so many windows together."""
        for (first, size), last in zip(self.stages, (*self.doublings, None), strict=True):
            steps = first + int(-(-(windows - self.before(first)) // size))
            if last is None or steps <= last:
                return steps
        raise AssertionError("the last stretch has no end")

    def within(self, first: int, last: int) -> list[int]:
        """Returns the sizes that the steps first..last-1 have, ascending."""
        ends = (*self.doublings, last)
        return [
            size
            for (begin, size), end in zip(self.stages, ends, strict=True)
            if max(begin, first) < min(end, last)
        ]
