"""A rate that falls when validation stops getting better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from stabletrain.schedule.base import Planned, check_count, check_factor, check_number, check_word


@dataclass(frozen=True, kw_only=True)
class Plateau(Planned):
    """Warm up, then multiply the rate by `factor` each time that more than `patience` validations brought no progress.

    Progress is a metric below best * (1 - threshold) (above best * (1 + threshold) with `mode=max`; with a negative
    best the same distance further on). A metric of NaN or Inf is missing: it is neither progress nor its lack. A
    validation counts nothing for `cooldown` validations after a cut. What it remembers is saved, and goes back with a
    rollback; rejected steps don't touch it.

    Args:
        metric: which of the validation's metrics: loss, accuracy, or another that the task measures.
        mode: whether it is to be small (min) or large (max).
        factor: on the rate at each cut, from 0 to 1.
        patience: validations without progress that are borne.
        threshold: least progress, as a share of the best.
        cooldown: validations after a cut that count nothing.
        minimum: least factor on the base rate, from 0 to 1.

    Source:
        torch's ReduceLROnPlateau, which takes NaN for a validation without progress: ten of them and the rate is cut.

    Example:
        >>> schedule = Plateau(total_updates=100, updates_per_epoch=10, factor=0.5, patience=1)
        >>> said = [schedule.observe({"loss": loss}) for loss in (1.0, 0.9, float("nan"), 0.95, 0.92)]
        >>> said[-1]
        'no progress of validation loss in 2 validations: the rate is now at 0.5 of its plan'
        >>> schedule(50)
        0.5
    """

    metric: str = "loss"
    mode: Literal["min", "max"] = "min"
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    cooldown: int = 0
    minimum: float = 0.0
    _memory: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_word("schedule.mode", self.mode, ("min", "max"))
        check_number("schedule.factor", self.factor, least=0.0, below=1.0)
        check_count("schedule.patience", self.patience, least=0)
        check_number("schedule.threshold", self.threshold, least=0.0, below=1.0)
        check_count("schedule.cooldown", self.cooldown, least=0)
        check_factor("schedule.minimum", self.minimum)
        self._memory.update(level=1.0, best=None, without_progress=0, cooling=0)

    def after(self, update: int, length: int) -> float:
        """Return the level that is left."""
        return float(self._memory["level"])

    def __call__(self, update: int) -> float:
        """Return the factor of an update, counted from 0; a cut during the warm-up counts at once."""
        if update >= self.warmup:
            return self.after(update, 0)
        return super().__call__(update) * float(self._memory["level"])

    def observe(self, metrics: Mapping[str, float | None], /) -> str | None:
        """Take in what a validation measured; a metric that isn't there, or isn't finite, changes nothing.

        Returns:
            A line for the log, if the rate is cut.
        """
        value = metrics.get(self.metric)
        if value is None or not math.isfinite(value):
            return None
        memory = self._memory
        if self._is_progress(float(value)):
            memory["best"], memory["without_progress"] = float(value), 0
        else:
            memory["without_progress"] += 1
        if memory["cooling"] > 0:
            memory["cooling"], memory["without_progress"] = memory["cooling"] - 1, 0
        if memory["without_progress"] <= self.patience:
            return None
        lower = max(self.minimum, memory["level"] * self.factor)
        memory["cooling"], memory["without_progress"] = self.cooldown, 0
        if lower >= memory["level"]:
            return None
        memory["level"] = lower
        count = self.patience + 1
        return (
            f"no progress of validation {self.metric} in {count} validation{'s' if count > 1 else ''}: the rate is now "
            f"at {lower:.3g} of its plan"
        )

    def _is_progress(self, value: float) -> bool:
        best = self._memory["best"]
        if best is None:
            return True
        step = self.threshold * abs(best)
        return bool(value < best - step if self.mode == "min" else value > best + step)

    def state_dict(self) -> dict[str, Any]:
        """Return level, best and counts."""
        return {**self._memory, "metric": self.metric, "mode": self.mode}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Take over what `state_dict` returned; of another metric, the level alone."""
        memory = {name: state[name] for name in self._memory}
        if (state["metric"], state["mode"]) != (self.metric, self.mode):
            memory |= {"best": None, "without_progress": 0, "cooling": 0}
        self._memory.update(memory)
