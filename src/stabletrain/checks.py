"""Numbers that a config gives, checked: one sentence for whoever gave another one."""

from __future__ import annotations

import math
from typing import Any

from stabletrain.errors import ConfigurationError


def whole(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """Return a whole number.

    Args:
        name: whose number it is, for the message.
        value: what was given.
        least: smallest number that is allowed.
        most: largest one; None = no limit.

    Raises:
        ConfigurationError: for anything else.

    Example:
        >>> whole("model.layers", 2)
        2
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        end = "" if most is None else f" to {most}"
        raise ConfigurationError(f"{name} is {value!r}; a whole number from {least}{end} is allowed.")
    return value


def number(
    name: str,
    value: Any,
    *,
    least: float = 0.0,
    below: float = math.inf,
    most: float | None = None,
    above: bool = False,
) -> float:
    """Return a number as a float.

    Args:
        name: whose number it is, for the message.
        value: what was given.
        least: smallest number that is allowed.
        below: first number that isn't allowed any more.
        most: largest number that is allowed, instead.
        above: whether `least` itself isn't allowed either.

    Raises:
        ConfigurationError: for anything else.

    Example:
        >>> number("std of the noise", 1)
        1.0
    """
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = real and (least < value if above else least <= value) and (value < below if most is None else value <= most)
    if not fits:
        begin = f"above {least:g}" if above else f"from {least:g}"
        end = f" to {most:g}" if most is not None else f" to below {below:g}" if below < math.inf else ""
        raise ConfigurationError(f"{name} is {value!r}; a {'' if end else 'finite '}number {begin}{end} is allowed.")
    return float(value)
