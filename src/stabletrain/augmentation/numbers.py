"""Numbers that augmentations are given, checked."""

from __future__ import annotations

import math

from stabletrain.errors import ConfigurationError


def number(what: str, value: float, *, below: float = math.inf, most: float = math.inf) -> float:
    """Return a finite number from 0, below `below` and at most `most`.

    Raises:
        ConfigurationError: for anything else; `what` says whose number it is.

    Example:
        >>> number("std of the noise", 1)
        1.0
    """
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or not 0 <= value < math.inf or value >= below or value > most:
        bound = f" to below {below:g}" if below < math.inf else f" to {most:g}" if most < math.inf else ""
        raise ConfigurationError(f"{what} is {value!r}; a finite number from 0{bound} is allowed.")
    return float(value)


def whole(what: str, value: int, least: int) -> int:
    """Return a whole number of at least `least`.

    Raises:
        ConfigurationError: for anything else; `what` says whose number it is.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(f"{what} is {value!r}; a whole number from {least} is allowed.")
    return value
