"""Schedules that warm up and never rise after that; `Planned` has the arguments that they share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from stabletrain.schedule.base import Planned, check_count, check_factor, check_number, check_word, half_cosine


@dataclass(frozen=True, kw_only=True)
class Constant(Planned):
    """Warm up, then stay at the base rate.

    Example:
        >>> Constant(total_updates=100, updates_per_epoch=10)(50)
        1.0
    """


@dataclass(frozen=True, kw_only=True)
class Falling(Planned):
    """Warm up, then fall from the base rate to a share of it.

    Args:
        final: factor at the end, from 0 to 1.
    """

    final: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_factor("schedule.final", self.final)


@dataclass(frozen=True, kw_only=True)
class Linear(Falling):
    """Warm up, then fall along a straight line: final + (1 - final) * (1 - progress).

    Args:
        final: factor at the end, from 0 to 1.

    Source:
        Goyal et al. 2017, "Accurate, Large Minibatch SGD" (arXiv 1706.02677), for the warm-up; the fall is BERT's.

    Example:
        >>> schedule = Linear(total_updates=110, updates_per_epoch=10, warmup_epochs=1)
        >>> [round(schedule(update), 3) for update in (0, 10, 60, 110, 500)]
        [0.1, 1.0, 0.5, 0.0, 0.0]
    """

    def after(self, update: int, length: int) -> float:
        """Return the factor of an update after the warm-up."""
        return self.final + (1.0 - self.final) * (1.0 - update / length)


@dataclass(frozen=True, kw_only=True)
class Cosine(Falling):
    """Warm up, then fall along half a cosine: final + (1 - final) * (1 + cos(pi * progress)) / 2.

    Args:
        final: factor at the end, from 0 to 1.

    Source:
        Loshchilov, Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts" (arXiv 1608.03983), without
        restarts.

    Example:
        >>> schedule = Cosine(total_updates=110, updates_per_epoch=10, warmup_epochs=1)
        >>> [round(schedule(update), 3) for update in (0, 10, 60, 110, 500)]
        [0.1, 1.0, 0.5, 0.0, 0.0]
    """

    def after(self, update: int, length: int) -> float:
        """Return the factor of an update after the warm-up."""
        return self.final + (1.0 - self.final) * half_cosine(update / length)


@dataclass(frozen=True, kw_only=True)
class Polynomial(Falling):
    """Warm up, then fall along a power: final + (1 - final) * (1 - progress)^power.

    Args:
        power: the exponent; 1: a straight line, above 1: fast first.
        final: factor at the end, from 0 to 1.

    Source:
        Liu, Rabinovich, Berg 2015, "ParseNet: Looking Wider to See Better" (arXiv 1506.04579), the "poly" policy.

    Example:
        >>> schedule = Polynomial(total_updates=100, updates_per_epoch=10, power=2.0)
        >>> [schedule(update) for update in (0, 50, 100)]
        [1.0, 0.25, 0.0]
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("schedule.power", self.power, least=1e-6)

    def after(self, update: int, length: int) -> float:
        """Return the factor of an update after the warm-up."""
        return self.final + (1.0 - self.final) * math.pow(1.0 - update / length, self.power)


@dataclass(frozen=True, kw_only=True)
class InverseSqrt(Planned):
    """Warm up, then fall as sqrt(timescale / (timescale + updates since the warm-up)).

    With a timescale as long as the warm-up this is sqrt(warm-up / updates), as for the Transformer.

    Args:
        timescale: updates after the warm-up until the factor is sqrt(1/2); null: the warm-up's length, or a tenth of
            the run where there is none.

    Source:
        Vaswani et al. 2017, "Attention Is All You Need" (arXiv 1706.03762); Zhai et al. 2022, "Scaling Vision
        Transformers" (arXiv 2106.04560), for the timescale.

    Example:
        >>> schedule = InverseSqrt(total_updates=1000, updates_per_epoch=10, warmup_updates=10)
        >>> [schedule(update) for update in (10, 40, 1000, 5000)]
        [1.0, 0.5, 0.1, 0.1]
    """

    timescale: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timescale is not None:
            check_count("schedule.timescale", self.timescale, least=1)

    def after(self, update: int, length: int) -> float:
        """Return the factor of an update after the warm-up."""
        timescale = self.timescale or self.warmup or max(1, self.total_updates // 10)
        return math.sqrt(timescale / (timescale + update))


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(Falling):
    """Warm up, stay at the base rate, and fall only over the last part of the run.

    With x the share of that part that is done, the fall is 1 - x (`linear`), (1 + cos(pi x)) / 2 (`cosine`) or
    1 - sqrt(x) (`sqrt`), scaled to end at `final`.

    Args:
        decay_share: length of the fall as a share of all updates, above 0 and at most 1; it never reaches into the
            warm-up.
        decay: shape of the fall: linear, cosine or sqrt.
        final: factor at the end, from 0 to 1.

    Source:
        Hu et al. 2024, "MiniCPM" (arXiv 2404.06395); Haegele et al. 2024, "Scaling Laws and Compute-Optimal Training
        Beyond Fixed Training Durations" (arXiv 2405.18392), for the square root and a share of 0.2.

    Example:
        >>> schedule = WarmupStableDecay(total_updates=100, updates_per_epoch=10, warmup_updates=10)
        >>> [round(schedule(update), 3) for update in (0, 10, 80, 90, 100)]
        [0.1, 1.0, 1.0, 0.5, 0.0]
    """

    decay_share: float = 0.2
    decay: Literal["linear", "cosine", "sqrt"] = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("schedule.decay_share", self.decay_share, least=1e-9, below=math.nextafter(1.0, 2.0))
        check_word("schedule.decay", self.decay, ("linear", "cosine", "sqrt"))

    def after(self, update: int, length: int) -> float:
        """Return the factor of an update after the warm-up."""
        fall = min(length, max(1, round(self.decay_share * self.total_updates)))
        progress = max(0, update - (length - fall)) / fall
        left = {
            "linear": 1.0 - progress,
            "cosine": half_cosine(progress),
            "sqrt": 1.0 - math.sqrt(progress),
        }[self.decay]
        return self.final + (1.0 - self.final) * left
