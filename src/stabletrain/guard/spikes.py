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
LEAST_ALLOWANCE = math.log(1.5)  # for the error of the mean of a run's first losses
FIRST_LOSSES = 3  # of a run, which are those of the weights that it begins with
BETTER = 0.9  # times the best level: what a training that was thrown off must reach
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
    `updates` applied steps in a row, the training has diverged. What is thrown off before it has learned much often
    ends with the loss of a guess, which isn't far above. So as long as the average was never below half of the first
    losses, it must not exceed its best by `factor` even for a moment, unless it is better than ever within
    2 * `updates` steps; by the root of `factor` where a detector is `wary`. Losses that are zero, negative or not
    finite are left out: there is no such factor for them.

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
        self.wary = False  # whether there was trouble before, so that less is needed to speak of it again
        self._seen = 0  # losses that entered the average
        self._average = 0.0  # of the logarithms, weighted towards the latest
        self._square = 0.0  # of their squares, likewise
        self._best = math.inf  # the lowest average so far
        self._above = 0  # updates in a row that were above the best by the factor
        self._first = math.nan  # mean of the first logarithms
        self._lost = 0  # updates since the average rose before much was learned; 0 once it has reached the goal
        self._goal = -math.inf  # a little below the best at that time

    @property
    def at_ease(self) -> bool:
        """Whether the loss is near its best, so that the state now is one to return to."""
        return self._above == 0 and self._lost == 0

    def is_near_best(self, loss: float) -> bool:
        """Whether training goes well and this loss is within the factor of the best level."""
        return self.at_ease and (loss <= 0.0 or math.log(loss) <= self._best + math.log(self.factor))

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
        self._square += (math.log(loss) ** 2 - self._square) / count
        self._best = min(self._best, self._average + self._allowance(count))
        self._above = self._above + 1 if self._average > self._best + math.log(self.factor) else 0
        lost = self._is_lost()
        if self._above >= self.updates:
            said = (
                f"has been above {self.factor:g} times its best level of {math.exp(self._best):.4g} for {self._above}"
            )
        elif lost:
            goal = math.exp(self._goal)
            said = f"rose before it had halved, and hasn't come down to {goal:.4g}, below its best, for {self._lost}"
        else:
            return None
        return f"the loss {said} updates; it is at {math.exp(self._average):.4g}"

    def _is_lost(self) -> bool:
        """Note whether training was thrown off before it had learned much; return whether that has lasted."""
        if self._seen == FIRST_LOSSES:
            self._first = self._average
        if self._seen <= FIRST_LOSSES or self._best < self._first - math.log(2):
            self._lost = 0
        elif self._lost > 0:
            self._lost = self._lost + 1 if self._average > self._goal else 0
        elif self._average > self._best + math.log(self.factor) * (0.5 if self.wary else 1.0):
            self._lost, self._goal = 1, min(self._first, self._best) + math.log(BETTER)
        return self._lost >= 2 * self.updates

    def _allowance(self, count: int) -> float:
        """Return by how much the mean of a few logarithms may be off.

        A training that explodes at once has no other level than that of its first losses, so they count too. Their
        error falls with the root of their number. From the third on it is taken from their spread, if that is less.
        """
        unknown = math.log(self.updates / count) / 2
        if count < FIRST_LOSSES:
            return unknown
        variance = max(self._square - self._average**2, 0.0) * count / (count - 1)
        return min(unknown, max(LEAST_ALLOWANCE, 2 * math.sqrt(variance / count)))

    def state_dict(self) -> dict[str, Any]:
        """Return averages, best and counts."""
        return {
            "seen": self._seen,
            "average": self._average,
            "square": self._square,
            "best": self._best,
            "above": self._above,
            "first": self._first,
            "lost": self._lost,
            "goal": self._goal,
            "wary": self.wary,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; from an older version, some of it is missing."""
        state = {**Divergence(factor=self.factor, updates=self.updates).state_dict(), **state}
        self._seen, self._above = int(state["seen"]), int(state["above"])
        self._average, self._square = float(state["average"]), float(state["square"])
        self._best = float(state["best"])
        self._first, self._goal, self._lost = float(state["first"]), float(state["goal"]), int(state["lost"])
        self.wary = bool(state["wary"])
