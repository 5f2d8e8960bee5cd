"""Trouble that isn't NaN: a finite step far above recent history, and a loss that climbs and stays up."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from typing import Any

from stabletrain.errors import ConfigurationError

LEAST = 10  # values before there is a limit: fewer say too little about their spread
DEVIATIONS = 6.0  # median absolute deviations, on the log scale; about 4 standard deviations of a normal distribution
LARGEST_FACTOR = 1000.0  # times the median is the highest limit that a wide spread alone can set
HALF_LIFE = 500.0  # applied steps after which half of a peak is forgotten
FLOOR = 10.0  # for gradient norms: one in 30,000 healthy steps goes further beyond its peak (docs/guard.md)
LOSS_FLOOR = 5.0  # for losses: healthy ones stay below 3 times their peak
LARGEST_LOGARITHM = 709.0  # its exponential is still a float


class LogSeries:
    """The latest positive numbers on a log scale, in order of arrival and in order of size, and their fading peak.

    Adding costs two searches and two shifts of a short list; median and spread are read off it in O(log n).

    Args:
        size: how many of the latest values are kept.

    Example:
        >>> series = LogSeries(3)
        >>> for value in (1.0, 10.0, 1000.0, 100.0):
        ...     series.add(value)
        >>> median, deviation = series.median_and_deviation()
        >>> round(math.exp(median)), round(math.exp(deviation))
        (100, 10)
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._arrived: deque[float] = deque()
        self._sorted: list[float] = []
        self.peak = -math.inf  # the largest logarithm so far, which fades

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, value: float) -> None:
        """Take in `value` and drop the oldest if there are too many; unless it is finite and positive, do nothing."""
        if 0.0 < value < math.inf:
            self._enter(math.log(value))
            self.peak = max(self.peak - math.log(2) / HALF_LIFE, self._arrived[-1])

    def median_and_deviation(self) -> tuple[float, float]:
        """Return the median of the logarithms and their median absolute deviation from it.

        The values closest to the median are neighbours in the sorted list: where the slice of them begins is found
        by bisection.
        """
        ordered, count = self._sorted, len(self._sorted)
        half = count // 2
        median = ordered[half] if count % 2 else (ordered[half - 1] + ordered[half]) / 2
        starts = range(count - half - 1)
        low = bisect_left(starts, True, key=lambda i: median - ordered[i] <= ordered[i + half + 1] - median)
        below, above = median - ordered[low], ordered[low + half] - median
        if count % 2:
            return median, max(below, above)
        if below > above:
            return median, (below + max(median - ordered[low + 1], above)) / 2
        return median, (above + max(median - ordered[low], ordered[low + half - 1] - median)) / 2

    def state_dict(self) -> dict[str, Any]:
        """Return the logarithms, oldest first, and the peak."""
        return {"logarithms": list(self._arrived), "peak": self.peak}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; of too many logarithms the latest are kept."""
        self._arrived.clear()
        self._sorted.clear()
        for logarithm in state["logarithms"]:
            self._enter(float(logarithm))
        self.peak = float(state["peak"])

    def _enter(self, logarithm: float) -> None:
        if len(self._arrived) == self.size:
            del self._sorted[bisect_left(self._sorted, self._arrived.popleft())]
        self._arrived.append(logarithm)
        insort(self._sorted, logarithm)


class SpikeWindow:
    """What loss and gradient norm were like lately, and the largest values that don't stand out from that.

    A limit is the median times e to the power of 6 median absolute deviations of the logarithms, at most 1000 times
    the median. It has a floor: some multiple of the peak, which is the largest value so far and fades by half in 500
    applied steps. Gradient norms of healthy steps differ by factors, not by amounts, hence the log scale. The floor is
    for networks that have learned their data: the median falls to a millionth, until one sample that they still get
    wrong brings back the gradient of old. Only applied steps are told to the window, so a spike never raises the limit
    for the next one; values that are zero, negative or not finite mean nothing on a log scale and leave it as it is.

    Args:
        size: applied steps that the window looks back on.
        floor: by what factor a gradient norm must exceed its peak to be a spike.
        loss_floor: the same for the loss.

    Raises:
        ConfigurationError: for a value outside its range.

    Example:
        >>> window = SpikeWindow()
        >>> for step in range(10):
        ...     window.accept(loss=2.0, grad_norm=0.5)
        >>> [round(limit, 6) for limit in window.limits()] == [2.0 * window.loss_floor, 0.5 * window.floor]
        True
    """

    def __init__(self, size: int = 128, *, floor: float = FLOOR, loss_floor: float = LOSS_FLOOR) -> None:
        if size < LEAST:
            raise ConfigurationError(f"guard.spike_window is {size}; it must be at least {LEAST}.")
        for name, factor in (("spike_floor", floor), ("spike_loss_floor", loss_floor)):
            if not 1.0 <= factor < math.inf:
                raise ConfigurationError(f"guard.{name} is {factor}; it must be a finite number of at least 1.")
        self.floor = floor
        self.loss_floor = loss_floor
        self._losses = LogSeries(size)
        self._norms = LogSeries(size)
        self._limits: tuple[float, float] | None = None  # of the values in the window, once asked for

    def accept(self, *, loss: float, grad_norm: float) -> None:
        """Take in an applied step.

        Args:
            loss: mean loss of the step, before any loss scaling.
            grad_norm: Euclidean norm of all gradients, before clipping.
        """
        self._losses.add(loss)
        self._norms.add(grad_norm)
        self._limits = None

    def limits(self) -> tuple[float, float]:
        """Return the largest loss and the largest gradient norm that are no spikes; Inf while too little is known."""
        if self._limits is None:
            self._limits = _limit(self._losses, self.loss_floor), _limit(self._norms, self.floor)
        return self._limits

    def state_dict(self) -> dict[str, Any]:
        """Return what is known of losses and of gradient norms."""
        return {"losses": self._losses.state_dict(), "norms": self._norms.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; a smaller window keeps the latest values."""
        self._losses.load_state_dict(state["losses"])
        self._norms.load_state_dict(state["norms"])
        self._limits = None


def describe(loss: float, grad_norm: float, limits: tuple[float, float]) -> str | None:
    """Say which of loss and gradient norm lies above its limit, with numbers; None if neither does.

    Example:
        >>> describe(1.0, 50.0, (20.0, 12.5))
        'the gradient norm is 50, above 12.5, the limit from recent updates'
    """
    found = [
        f"the {name} is {value:.4g}, above {limit:.4g}, the limit from recent updates"
        for name, value, limit in zip(("gradient norm", "loss"), (grad_norm, loss), reversed(limits), strict=True)
        if value > limit
    ]
    return " and ".join(found) or None


def _limit(series: LogSeries, floor: float) -> float:
    if len(series) < LEAST:
        return math.inf
    median, deviation = series.median_and_deviation()
    usual = median + min(DEVIATIONS * deviation, math.log(LARGEST_FACTOR))
    return math.exp(min(max(usual, series.peak + math.log(floor)), LARGEST_LOGARITHM))


class Divergence:
    """Notices a loss that has left its best level behind for good, though no single step stands out.

    The loss is averaged exponentially on the log scale, over about `updates` applied steps, so that one step counts
    little and a factor means the same at every level. When the average has been above its own best by `factor` for
    `updates` applied steps in a row, the training has diverged. Losses that are zero, negative or not finite are left
    out: there is no such factor for them.

    Args:
        factor: by how much the average loss may exceed its best.
        updates: applied steps in a row for which it must.

    Raises:
        ConfigurationError: for a value outside its range.

    Example:
        >>> detector = Divergence(factor=3.0, updates=10)
        >>> all(detector.observe(1.0) is None for step in range(50))
        True
        >>> said = [detector.observe(20.0) for step in range(30)]
        >>> next(index for index, words in enumerate(said) if words is not None)
        13
    """

    def __init__(self, *, factor: float = 3.0, updates: int = 50) -> None:
        if not 1.0 < factor < math.inf:
            raise ConfigurationError(f"guard.diverged_factor is {factor}; it must be a finite number above 1.")
        if updates < 1:
            raise ConfigurationError(f"guard.diverged_updates is {updates}; it must be at least 1.")
        self.factor = factor
        self.updates = updates
        self.reset()

    def reset(self) -> None:
        """Forget everything, as after a rollback."""
        self._seen = 0  # losses that entered the average
        self._average = 0.0  # of the logarithms, weighted towards the latest
        self._best = math.inf  # the lowest average so far
        self._above = 0  # updates in a row that were above the best by the factor

    @property
    def at_ease(self) -> bool:
        """Whether the loss is near its best, so that the state now is one to return to."""
        return self._above == 0

    def observe(self, loss: float) -> str | None:
        """Take in the loss of an applied step.

        Args:
            loss: mean loss of the step.

        Returns:
            What is wrong, in words; None while nothing is.
        """
        if not 0.0 < loss < math.inf:
            return None
        self._seen += 1
        count = min(self._seen, self.updates)  # a plain mean until there are enough
        self._average += (math.log(loss) - self._average) / count
        # The mean of a few counts as a level too, with an allowance for its error, which falls with their root: a
        # training that explodes at once has no other level.
        self._best = min(self._best, self._average + math.log(self.updates / count) / 2)
        self._above = self._above + 1 if self._average > self._best + math.log(self.factor) else 0
        if self._above < self.updates:
            return None
        now, best = math.exp(self._average), math.exp(self._best)
        return (
            f"the loss has been above {self.factor:g} times its best level of {best:.4g} for {self._above} updates; "
            f"it is at {now:.4g}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return average, best and counts."""
        return {"seen": self._seen, "average": self._average, "best": self._best, "above": self._above}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._seen, self._above = int(state["seen"]), int(state["above"])
        self._average, self._best = float(state["average"]), float(state["best"])
