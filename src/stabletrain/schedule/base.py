"""What a schedule is, and the warm-up that each of them begins with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from stabletrain.errors import ConfigurationError

Schedule = Callable[[int], float]  # from the number of updates done to the factor for the next one


@runtime_checkable
class Observing(Protocol):
    """A schedule that is told how validation goes; the trainer saves what it remembers (`state_dict`)."""

    def observe(self, metrics: Mapping[str, float | None], /) -> str | None:
        """Take in what a validation measured; return a line for the log if that changes the rate."""
        ...


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A rise from `warmup_from` to 1 over the warm-up, then what `after` says; past the end of the run it stays there.

    The warm-up's length is `warmup_updates`, or `warmup_share` of the run, or else `warmup_epochs`.

    Args:
        total_updates: planned updates of the run.
        updates_per_epoch: updates in an epoch.
        warmup_epochs: length of the warm-up in epochs, fractions allowed; 0: none.
        warmup_updates: length in updates, in place of epochs.
        warmup_share: length as a share of all updates, at least 0 and below 1, in place of epochs.
        warmup_from: factor of the first update, from 0 to 1.

    Raises:
        ConfigurationError: if the warm-up is negative or as long as the run, or is given in two ways.

    Example:
        >>> schedule = Planned(total_updates=100, updates_per_epoch=10, warmup_share=0.04, warmup_from=0.2)
        >>> [round(schedule(update), 3) for update in (0, 2, 4, 500)]
        [0.2, 0.6, 1.0, 1.0]
    """

    total_updates: int
    updates_per_epoch: int
    warmup_epochs: float = 0.0
    warmup_updates: int | None = None
    warmup_share: float | None = None
    warmup_from: float = 0.1
    warmup: int = field(init=False, default=0)  # its length in updates

    def __post_init__(self) -> None:
        check_factor("schedule.warmup_from", self.warmup_from)
        length, spelled = self._length()
        if not _is_whole(length) or not 0 <= length < self.total_updates:
            raise ConfigurationError(
                f"the warm-up takes {spelled}{length} updates, but the run has {self.total_updates}; it must be at "
                "least 0 and shorter than the run. Lower schedule.warmup_epochs, schedule.warmup_updates or "
                "schedule.warmup_share, or raise epochs."
            )
        object.__setattr__(self, "warmup", length)

    def _length(self) -> tuple[int, str]:
        """Return the warm-up's length, and how it was given."""
        updates, share, epochs = self.warmup_updates, self.warmup_share, self.warmup_epochs
        if updates is not None and share is not None:
            raise ConfigurationError(
                f"schedule.warmup_updates is {updates} and schedule.warmup_share {share}; give one of them."
            )
        if updates is not None:
            return updates, ""
        if share is not None:
            check_number("schedule.warmup_share", share, least=0.0, below=1.0)
            return round(share * self.total_updates), f"a share of {share} = "
        check_number("schedule.warmup_epochs", epochs)
        return round(epochs * self.updates_per_epoch), f"{epochs} epochs of {self.updates_per_epoch} updates = "

    def __call__(self, update: int) -> float:
        """Return the factor of an update, counted from 0."""
        if update < self.warmup:
            return self.warmup_from + (1.0 - self.warmup_from) * self.rise(update / self.warmup)
        return self.after(min(update, self.total_updates) - self.warmup, self.total_updates - self.warmup)

    def rise(self, progress: float) -> float:
        """Return how far the warm-up is, from 0 to 1, when this share of it is done."""
        return progress

    def after(self, update: int, length: int) -> float:
        """Return the factor of an update after the warm-up.

        Args:
            update: counted from the end of the warm-up, from 0 to `length`.
            length: updates from there to the end of the run, at least 1.
        """
        return 1.0


def half_cosine(progress: float) -> float:
    """Return (1 + cos(pi * progress)) / 2, which falls from 1 to 0.

    Example:
        >>> [round(half_cosine(progress), 3) for progress in (0.0, 0.5, 1.0)]
        [1.0, 0.5, 0.0]
    """
    return (1.0 + math.cos(math.pi * progress)) / 2.0


def check_factor(name: str, value: Any) -> None:
    """Refuse what isn't a number from 0 to 1.

    Raises:
        ConfigurationError: names the key and the value.
    """
    if not (_is_number(value) and 0.0 <= value <= 1.0):
        raise ConfigurationError(f"{name} is {value!r}; it must be a number from 0 to 1.")


def check_number(name: str, value: Any, *, least: float = -math.inf, below: float = math.inf) -> None:
    """Refuse what isn't a finite number of at least `least` and below `below`.

    Raises:
        ConfigurationError: names the key and the value.
    """
    if not (_is_number(value) and math.isfinite(value) and least <= value < below):
        bounds = f" of at least {least:g}" if math.isfinite(least) else ""
        bounds += f" and below {below:g}" if math.isfinite(below) else ""
        raise ConfigurationError(f"{name} is {value!r}; it must be a finite number{bounds}.")


def check_word(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Refuse what isn't one of the words.

    Raises:
        ConfigurationError: names the key, the value and the words.
    """
    if value not in allowed:
        raise ConfigurationError(f"{name} is {value!r}; allowed: {', '.join(allowed)}.")


def check_count(name: str, value: Any, least: int) -> None:
    """Refuse what isn't a whole number of at least `least`.

    Raises:
        ConfigurationError: names the key and the value.
    """
    if not (_is_whole(value) and value >= least):
        raise ConfigurationError(f"{name} is {value!r}; it must be a whole number, {least} or more.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
