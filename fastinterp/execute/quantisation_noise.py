"""How much of a difference of models that are stored in few bits is signal, and how much rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass

NOISY = 0.7  # a share of signal below this is a warning
_MEAN_ABS = 0.8  # mean |d| of normally distributed d, in standard deviations


@dataclass
class RoundedDelta:
    """Sums over elements of the difference d of two models, of which one or both were rounded to steps q.

    rounded  number of elements
    sum_dd   sum of d^2
    steps    sum of q: from the value of a code to the next; of two models, that of either, as they are about equal
    steps2   sum of q^2
    both     whether both models are rounded
    """

    rounded: int = 0
    sum_dd: float = 0.0
    steps: float = 0.0
    steps2: float = 0.0
    both: bool = True

    def add(self, count: int, dd: float, steps: float, steps2: float, both: bool) -> None:
        """Add `count` more elements."""
        self.rounded += count
        self.sum_dd += dd
        self.steps += steps
        self.steps2 += steps2
        self.both &= both

    @property
    def signal(self) -> float | None:
        """Estimated cosine of d with the difference before rounding. None, if nothing is rounded, or d is 0.

        A small change c moves an element by a whole step q with probability |c|/q, so E d^2 = |c|*q where both models
        are rounded; where one is, its rounding adds q^2/12.
        """
        if not self.rounded or self.sum_dd <= 0 or not math.isfinite(self.sum_dd) or not self.steps2:
            return None
        mean = self.sum_dd / self.rounded
        if self.both:
            return min(1.0, math.sqrt(mean) / (_MEAN_ABS * self.steps / self.rounded))
        return math.sqrt(max(0.0, mean - self.steps2 / self.rounded / 12) / mean)

    @property
    def is_noise(self) -> bool:
        """Whether it is mostly rounding."""
        return self.signal is not None and self.signal < NOISY
