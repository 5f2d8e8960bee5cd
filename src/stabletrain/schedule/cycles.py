"""Schedules that rise on purpose: restarts, and one cycle."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from stabletrain.errors import ConfigurationError
from stabletrain.schedule.base import Planned, check_count, check_factor, check_number, check_word, half_cosine


@dataclass(frozen=True, kw_only=True)
class CosineRestarts(Planned):
    """Warm up, then fall along half a cosine `cycles` times, each time from the base rate.

    Each cycle is `growth` times as long as the one before, and the last one ends with the run. In a cycle:
    final + (1 - final) * (1 + cos(pi * progress)) / 2.

    Args:
        cycles: falls, at least 1.
        growth: length of a cycle over that of the one before, at least 1.
        final: factor at the end of each, from 0 to 1.

    Raises:
        ConfigurationError: also if a cycle has no update.

    Source:
        Loshchilov, Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts" (arXiv 1608.03983).

    Example:
        >>> schedule = CosineRestarts(total_updates=70, updates_per_epoch=10, cycles=3, growth=2.0)
        >>> [round(schedule(update), 3) for update in (0, 5, 10, 20, 30, 50, 70, 99)]
        [1.0, 0.5, 1.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """

    cycles: int = 3
    growth: float = 1.0
    final: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("schedule.cycles", self.cycles, least=1)
        check_number("schedule.growth", self.growth, least=1.0)
        check_factor("schedule.final", self.final)
        starts = self._starts(self.total_updates - self.warmup)
        if any(end <= start for start, end in pairwise(starts)):
            raise ConfigurationError(
                f"schedule.cycles is {self.cycles} with schedule.growth {self.growth}, but after the warm-up the run "
                f"has {self.total_updates - self.warmup} updates, so that a cycle would have none. Lower either."
            )

    def _starts(self, length: int) -> list[int]:
        """Return the update at which each cycle starts, and that at which the last one ends."""
        weights = [self.growth ** (number - self.cycles + 1) for number in range(self.cycles)]  # of at most 1
        whole = math.fsum(weights)
        return [round(length * math.fsum(weights[:number]) / whole) for number in range(self.cycles + 1)]

    def after(self, update: int, length: int) -> float:
        """Return the factor of an update after the warm-up."""
        starts = self._starts(length)
        number = next(n for n in reversed(range(self.cycles)) if update >= starts[n])
        progress = (update - starts[number]) / (starts[number + 1] - starts[number])
        return self.final + (1.0 - self.final) * half_cosine(progress)


@dataclass(frozen=True, kw_only=True)
class OneCycle(Planned):
    """Rise to the base rate over a large share of the run, then fall far below where it began.

    The warm-up is the rise, from `warmup_from` along half a cosine; from its end the factor falls to `final` along
    half a cosine, or a straight line. Momentum stays as it is: cycling it is not part of this schedule.

    Args:
        warmup_share: share of the run that rises, where `warmup_updates` isn't given.
        warmup_from: factor of the first update, from 0 to 1.
        final: factor at the end, from 0 to 1.
        anneal: shape of rise and fall: cosine or linear.

    Source:
        Smith, Topin 2018, "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates"
        (arXiv 1708.07120); the numbers are those of torch's OneCycleLR: 1/25 at first, 1/25 of 1e-4 of it at the end.

    Example:
        >>> schedule = OneCycle(total_updates=100, updates_per_epoch=10)
        >>> [round(schedule(update), 3) for update in (0, 15, 30, 65, 100)]
        [0.04, 0.52, 1.0, 0.5, 0.0]
    """

    warmup_share: float | None = 0.3
    warmup_from: float = 0.04
    final: float = 4e-6
    anneal: Literal["cosine", "linear"] = "cosine"

    def __post_init__(self) -> None:
        if self.warmup_updates is not None:
            object.__setattr__(self, "warmup_share", None)
        super().__post_init__()
        check_factor("schedule.final", self.final)
        check_word("schedule.anneal", self.anneal, ("cosine", "linear"))

    def rise(self, progress: float) -> float:
        """Return how far the rise is."""
        return progress if self.anneal == "linear" else 1.0 - half_cosine(progress)

    def after(self, update: int, length: int) -> float:
        """Return the factor of an update after the rise."""
        left = 1.0 - update / length if self.anneal == "linear" else half_cosine(update / length)
        return self.final + (1.0 - self.final) * left
