"""Learning-rate schedules: pure functions of the number of updates, so there is nothing to save or resume.

Each option is built with the planned number of updates and returns a factor for the base rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from stabletrain.errors import ConfigurationError

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Warmup:
    """A straight rise from `start` to 1 over the first `updates` updates, then 1.

    Args:
        updates: length; 0: none.
        start: factor of the first update, from 0 to 1.

    Example:
        >>> warmup = Warmup(updates=4, start=0.2)
        >>> [round(warmup(update), 3) for update in (0, 2, 4, 9)]
        [0.2, 0.6, 1.0, 1.0]
    """

    updates: int
    start: float

    def __call__(self, update: int) -> float:
        """Return the factor of an update, counted from 0."""
        if update >= self.updates:
            return 1.0
        return self.start + (1.0 - self.start) * update / self.updates


def constant(
    *,
    total_updates: int,
    updates_per_epoch: int,
    warmup_epochs: float = 0.0,
    warmup_updates: int | None = None,
    warmup_from: float = 0.1,
) -> Schedule:
    """Warm up, then stay at the base rate.

    Args:
        total_updates: planned updates of the run.
        updates_per_epoch: updates in an epoch.
        warmup_epochs: length of the warm-up in epochs, fractions allowed.
        warmup_updates: length in updates; takes the place of `warmup_epochs`.
        warmup_from: factor of the first update, from 0 to 1.

    Returns:
        A function from the number of updates done to the factor for the next one.

    Raises:
        ConfigurationError: if the warm-up is negative or as long as the run.

    Example:
        >>> constant(total_updates=100, updates_per_epoch=10)(50)
        1.0
    """
    return _warmup(total_updates, updates_per_epoch, warmup_epochs, warmup_updates, warmup_from)


def warmup_cosine(
    *,
    total_updates: int,
    updates_per_epoch: int,
    warmup_epochs: float = 1.0,
    warmup_updates: int | None = None,
    warmup_from: float = 0.1,
    final: float = 0.0,
) -> Schedule:
    """Warm up, then fall along half a cosine: final + (1 - final) * (1 + cos(pi * progress)) / 2.

    Args:
        total_updates: planned updates of the run; past them the factor stays at `final`.
        updates_per_epoch: updates in an epoch.
        warmup_epochs: length of the warm-up in epochs, fractions allowed.
        warmup_updates: length in updates; takes the place of `warmup_epochs`.
        warmup_from: factor of the first update, from 0 to 1.
        final: factor at the end, from 0 to 1.

    Returns:
        A function from the number of updates done to the factor for the next one.

    Raises:
        ConfigurationError: if the warm-up is negative or as long as the run, or a factor is outside 0 to 1.

    Source:
        Loshchilov, Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts", without restarts.

    Example:
        >>> schedule = warmup_cosine(total_updates=110, updates_per_epoch=10, warmup_epochs=1)
        >>> [round(schedule(update), 3) for update in (0, 10, 60, 110, 500)]
        [0.1, 1.0, 0.5, 0.0, 0.0]
    """
    _check_factor("schedule.final", final)
    warmup = _warmup(total_updates, updates_per_epoch, warmup_epochs, warmup_updates, warmup_from)

    return _then_down(warmup, total_updates, final, lambda progress: (1.0 + math.cos(math.pi * progress)) / 2.0)


def warmup_linear(
    *,
    total_updates: int,
    updates_per_epoch: int,
    warmup_epochs: float = 1.0,
    warmup_updates: int | None = None,
    warmup_from: float = 0.1,
    final: float = 0.0,
) -> Schedule:
    """Warm up, then fall along a straight line to `final`; arguments as for `warmup_cosine`.

    Example:
        >>> schedule = warmup_linear(total_updates=110, updates_per_epoch=10, warmup_epochs=1)
        >>> [round(schedule(update), 3) for update in (0, 10, 60, 110, 500)]
        [0.1, 1.0, 0.5, 0.0, 0.0]
    """
    _check_factor("schedule.final", final)
    warmup = _warmup(total_updates, updates_per_epoch, warmup_epochs, warmup_updates, warmup_from)

    return _then_down(warmup, total_updates, final, lambda progress: 1.0 - progress)


def _then_down(warmup: Warmup, total_updates: int, final: float, shape: Callable[[float], float]) -> Schedule:
    """Warm up, then follow `shape`, which falls from 1 to 0 as the share of the way done rises from 0 to 1."""

    def factor(update: int) -> float:
        if update < warmup.updates:
            return warmup(update)
        progress = min(1.0, (update - warmup.updates) / (total_updates - warmup.updates))
        return final + (1.0 - final) * shape(progress)

    return factor


def _warmup(total_updates: int, updates_per_epoch: int, epochs: float, updates: int | None, start: float) -> Warmup:
    _check_factor("schedule.warmup_from", start)
    length = updates if updates is not None else round(epochs * updates_per_epoch)
    spelled = "" if updates is not None else f"{epochs} epochs of {updates_per_epoch} updates = "
    if length < 0 or length >= total_updates:
        raise ConfigurationError(
            f"the warm-up takes {spelled}{length} updates, but the run has {total_updates}; it must be at least 0 and "
            f"shorter than the run. Lower schedule.warmup_epochs or schedule.warmup_updates, or raise epochs."
        )
    return Warmup(length, start)


def _check_factor(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ConfigurationError(f"{name} is {value}; it must be a number from 0 to 1.")
