"""Raising batch size and learning rate step by step once training is stable: `schedule.ramp`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from stabletrain.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What changes at the start of an epoch.

    Args:
        epoch: the first epoch that may begin with it, counted from 0; at least 1.
        batch_size: samples per step from then on; None: as before.
        lr: factor on the scheduled learning rate from then on; None: as before.
    """

    epoch: int
    batch_size: int | None = None
    lr: float | None = None


class Ramp:
    """Enters stages of larger batches and higher rates, one at a time, each after an epoch without trouble.

    A stage is entered at the start of the first epoch from its own on whose epoch before had no rejected step and no
    rollback; until then it waits, and so do those behind it. An overflow that lowers the loss scale is no trouble. So
    batch size and factor are constant within an epoch, and a position (epoch, step) says which samples it sees.

    Args:
        stages: in the order of their epochs, as `Stage` or as mappings with its names.

    Raises:
        ConfigurationError: for stages that can't be used.

    Source:
        Goyal et al. 2017, "Accurate, Large Minibatch SGD", for the rate that grows with the batch; Smith et al. 2018,
        "Don't Decay the Learning Rate, Increase the Batch Size".

    Example:
        >>> ramp = Ramp([{"epoch": 1, "batch_size": 64, "lr": 2.0}, {"epoch": 2, "batch_size": 128}])
        >>> ramp.factor, ramp.batch_size
        (1.0, None)
        >>> ramp.enter(1)
        'epoch 1: 64 samples per step, 2 times the scheduled learning rate'
        >>> ramp.disturb()
        >>> ramp.enter(2)
        'epoch 2: 128 samples per step wait for an epoch without a rejected step'
        >>> ramp.enter(3), ramp.factor, ramp.batch_size
        ('epoch 3: 128 samples per step, 2 times the scheduled learning rate', 2.0, 128)
    """

    def __init__(self, stages: Sequence[Stage | Mapping[str, Any]] = ()) -> None:
        self.stages: list[Stage] = []
        for number, given in enumerate(stages):
            self.stages.append(_stage(f"schedule.ramp[{number}]", given, self.stages[-1] if self.stages else None))
        self.reached = 0  # stages entered
        self._disturbed = False  # in this epoch
        self._said = False  # that a stage waits

    @property
    def batch_size(self) -> int | None:
        """Samples per step now; None: as configured."""
        return self.stages[self.reached - 1].batch_size if self.reached else None

    @property
    def factor(self) -> float:
        """Factor on the scheduled learning rate now."""
        return (self.stages[self.reached - 1].lr or 1.0) if self.reached else 1.0

    def disturb(self) -> None:
        """Note a rejected step or a rollback in this epoch."""
        self._disturbed = True

    def enter(self, epoch: int) -> str | None:
        """Enter the next stage if it is its turn; called between two epochs.

        Args:
            epoch: the one that begins.

        Returns:
            A line for the log: what is entered, or, once for each stage, that it waits; None if there is nothing new.
        """
        disturbed, self._disturbed = self._disturbed, False
        if self.reached == len(self.stages) or epoch < self.stages[self.reached].epoch:
            return None
        if not disturbed:
            self.reached, self._said = self.reached + 1, False
            return f"epoch {epoch}: {_described(self.stages[self.reached - 1])}"
        said, self._said = self._said, True
        waiting = _described(self.stages[self.reached], rate=False)
        return None if said else f"epoch {epoch}: {waiting} wait for an epoch without a rejected step"

    def planned(self, epochs: int, steps_with: Callable[[int | None], int]) -> int:
        """Return the steps of a run whose stages are all entered in time.

        Args:
            epochs: of the run.
            steps_with: steps of an epoch with this batch size; None: as configured.
        """
        sizes: list[int | None] = [None] * epochs
        for stage in self.stages:
            sizes[stage.epoch :] = [stage.batch_size] * (epochs - stage.epoch)
        return sum(map(steps_with, sizes))

    def check(self, epochs: int, samples: int) -> None:
        """See whether every stage fits a run of so many epochs over so many samples.

        Raises:
            ConfigurationError: names the stage and what is allowed.
        """
        for number, stage in enumerate(self.stages):
            if stage.epoch >= epochs:
                raise ConfigurationError(
                    f"schedule.ramp[{number}] begins at epoch {stage.epoch}, but the run has {epochs}, counted from 0: "
                    "choose an earlier epoch or raise epochs."
                )
            if stage.batch_size is not None and stage.batch_size > samples:
                raise ConfigurationError(
                    f"schedule.ramp[{number}].batch_size is {stage.batch_size}, but the training part has {samples} "
                    f"samples: choose a batch_size from 1 to {samples}."
                )

    def description(self) -> list[dict[str, Any]]:
        """Return the stages as plain data."""
        return [asdict(stage) for stage in self.stages]

    def state_dict(self) -> dict[str, Any]:
        """Return how far the ramp is."""
        return {"reached": self.reached, "disturbed": self._disturbed, "said": self._said}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.reached = int(state["reached"])
        self._disturbed, self._said = bool(state["disturbed"]), bool(state["said"])


def _stage(name: str, given: Any, before: Stage | None) -> Stage:
    """Return the stage that was given, with what it leaves out as in the one before it."""
    values = asdict(given) if isinstance(given, Stage) else given
    known = [one.name for one in fields(Stage)]
    if not isinstance(values, Mapping) or "epoch" not in values or not set(values) <= set(known):
        raise ConfigurationError(f"{name} is {given!r}; it must be like {{epoch: 10, batch_size: 64, lr: 2.0}}.")
    stage = Stage(**values)
    least = before.epoch + 1 if before is not None else 1
    if not _is_whole(stage.epoch, least):
        raise ConfigurationError(
            f"{name}.epoch is {stage.epoch!r}; it must be a whole number from {least}, since stages rise one by one."
        )
    if stage.batch_size is None and stage.lr is None:
        raise ConfigurationError(f"{name} changes nothing: give it a batch_size, an lr, or both.")
    if stage.batch_size is not None and not _is_whole(stage.batch_size, 1):
        raise ConfigurationError(f"{name}.batch_size is {stage.batch_size!r}; it must be a whole number from 1.")
    if stage.lr is not None and not (_is_number(stage.lr) and stage.lr > 0):
        raise ConfigurationError(f"{name}.lr is {stage.lr!r}; it must be a factor above 0 on the scheduled rate.")
    size, rate = (before.batch_size, before.lr) if before is not None else (None, None)
    return Stage(
        epoch=stage.epoch,
        batch_size=size if stage.batch_size is None else stage.batch_size,
        lr=rate if stage.lr is None else float(stage.lr),
    )


def _described(stage: Stage, *, rate: bool = True) -> str:
    size = f"{stage.batch_size} samples per step" if stage.batch_size is not None else ""
    factor = f"{stage.lr or 1.0:g} times the scheduled learning rate" if rate or not size else ""
    return ", ".join(filter(None, (size, factor)))


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
