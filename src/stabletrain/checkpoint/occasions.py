"""When to save, and when to stop."""

from __future__ import annotations

import math
import re
import time
from typing import Any

from stabletrain.errors import ConfigurationError

_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}  # seconds
_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def seconds(duration: Any, name: str) -> float:
    """Return the seconds of a duration such as 3h30m.

    Args:
        duration: days, hours, minutes and seconds in that order, each a whole number with its letter; some may be
            missing.
        name: what to call it in an error.

    Raises:
        ConfigurationError: for anything else, 0 too.

    Example:
        >>> seconds("3h30m", "stop_after"), seconds("90s", "stop_after"), seconds("1d12h", "stop_after")
        (12600.0, 90.0, 129600.0)
    """
    found = _DURATION.fullmatch(duration) if isinstance(duration, str) else None
    parts = found.groups() if found is not None else ()
    total = sum(unit * int(part) for unit, part in zip(_UNITS.values(), parts, strict=False) if part is not None)
    if not total > 0:
        raise ConfigurationError(
            f"{name}={duration!r}: give a duration in days, hours, minutes or seconds, each with its letter, such as "
            "1d12h, 3h30m, 45m or 90s"
        )
    return total


class Occasions:
    """Says when a checkpoint is due: after so many updates or epochs, or so many minutes; and when the time is up.

    Updates and epochs are counted over the whole run, so those saves are the same however often it was resumed. The
    clock starts with the process.

    Args:
        every_updates: save after each so many updates; None for never.
        every_minutes: save when so many minutes have passed since the last time; None for never.
        every_epochs: save at the end of each so many epochs; 0 for never.
        stop_after: save and stop after this duration, such as 3h30m; None for never.

    Raises:
        ConfigurationError: something that can't be used.
    """

    def __init__(
        self,
        every_updates: int | None = None,
        every_minutes: float | None = None,
        every_epochs: int = 1,
        stop_after: str | None = None,
    ) -> None:
        require_count("checkpoint.every_epochs", every_epochs, 0)
        if every_updates is not None:
            require_count("checkpoint.every_updates", every_updates, 1)
        if every_minutes is not None and not _is_positive(every_minutes):
            raise ConfigurationError(f"checkpoint.every_minutes={every_minutes!r}: give a number above 0, or null")
        self.every_updates, self.every_epochs, self.stop_after = every_updates, every_epochs, stop_after
        self._interval = math.inf if every_minutes is None else 60.0 * every_minutes
        limit = math.inf if stop_after is None else seconds(stop_after, "checkpoint.stop_after")
        now = time.monotonic()
        self._end, self._next = now + limit, now + self._interval

    @property
    def any(self) -> bool:
        """Whether there is ever one."""
        return self.every_updates is not None or self.every_epochs > 0 or min(self._interval, self._end) < math.inf

    def due(self, *, updates: int, epoch_ended: bool, epoch: int) -> bool:
        """Return whether a checkpoint is due by the counts.

        Args:
            updates: updates so far, the last of them just made.
            epoch_ended: an epoch has just ended.
            epoch: the epoch that runs or has just ended, counted from 0.
        """
        if epoch_ended:
            return self.every_epochs > 0 and (epoch + 1) % self.every_epochs == 0
        return self.every_updates is not None and updates > 0 and updates % self.every_updates == 0

    @property
    def overdue(self) -> bool:
        """Whether so many minutes have passed since something was saved."""
        return time.monotonic() >= self._next

    @property
    def time_is_up(self) -> bool:
        """Whether the run should save and stop."""
        return time.monotonic() >= self._end

    def saved(self) -> None:
        """Note that something is saved now; the minutes count from here."""
        self._next = time.monotonic() + self._interval


def require_count(name: str, value: Any, least: int) -> None:
    """Raise ConfigurationError unless the value is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(f"{name}={value!r}: give a whole number, at least {least}")


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
