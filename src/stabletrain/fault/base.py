"""What every fault is built on: when it happens, what it remembers, and where the trainer asks it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from stabletrain.checks import whole
from stabletrain.errors import ConfigurationError

DEFAULT_AT = 100  # step of a fault that is not told when


class Samples(Protocol):
    """What a fault sees of a microbatch: its data and which samples these are."""

    @property
    def data(self) -> Any:
        """A tree of tensors; in supervised tasks the pair (inputs, targets)."""
        ...

    @property
    def indices(self) -> Tensor:
        """Positions in the data set, int64 [n]."""
        ...


M = TypeVar("M", bound=Samples)


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a fault is told about the run that it is to happen in.

    Attributes:
        model: to be trained.
        total_steps: steps of the whole run.
        batch_size: samples per step.
        loss_scale: whether the run scales its loss (float16).
        folder: where the run leaves its files; None: it leaves none.
    """

    model: nn.Module
    total_steps: int
    batch_size: int
    loss_scale: bool = False
    folder: Path | None = None


class Fault:
    """What can go bad, and when: the places at which the trainer asks. Here nothing ever does.

    `steps` is the number of a step over the whole run, from 0. A step that is run again keeps its number.
    """

    def check(self, run: Surroundings) -> list[str]:
        """See whether the fault can happen in this run, before anything is written.

        Args:
            run: what there is to harm.

        Returns:
            What the user should read about it.

        Raises:
            ConfigurationError: it can't happen there.
        """
        return []

    def before_step(self, steps: int, microbatches: list[M]) -> list[M]:
        """Return the microbatches that the step is to use.

        Args:
            steps: number of the step.
            microbatches: as they were read, for the first time or again; they are not changed.
        """
        return microbatches

    def loss(self, steps: int, loss_sum: Tensor) -> Tensor:
        """Return the loss of a microbatch, shape [], to go backward from."""
        return loss_sum

    def after_backward(self, steps: int, model: nn.Module) -> None:
        """Change gradients or buffers before the step is judged."""

    def after_update(self, steps: int, model: nn.Module, optimizer: Optimizer) -> None:
        """Change the state after the step was decided."""

    def validation(self, steps: int, metrics: dict[str, float]) -> dict[str, float]:
        """Return the metrics of a validation that was made when so many steps were done."""
        return metrics

    def close(self) -> None:
        """Put back what the fault changed outside the model; called when the run ends, however it ends."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the fault remembers."""
        return {"kind": type(self).__name__}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what a fault of the same kind remembered; of another kind, nothing."""


class NoFault(Fault):
    """Nothing goes bad on purpose.

    What tells a fault when to happen is accepted, so that a sweep can compare runs with and without one.

    Args:
        at: of no effect, which a note in the run says.
        times: the same.
        samples: the same.

    Example:
        >>> NoFault().validation(40, {"loss": 0.5})
        {'loss': 0.5}
    """

    def __init__(self, at: int | None = None, times: int | None = None, samples: int | None = None) -> None:
        given = {"at": at, "times": times, "samples": samples}
        self._given = [f"fault.{name}={value}" for name, value in given.items() if value is not None]

    def check(self, run: Surroundings) -> list[str]:
        """Say if it was told when to happen; see `Fault.check`."""
        if not self._given:
            return []
        return [
            f"{' '.join(self._given)} was given without a fault, so nothing will happen; choose one: fault=<option>"
        ]


class Planned(Fault):
    """A fault that happens in some steps, once in each.

    Args:
        at: the step, counted over the run from 0; None: step 100, or never in a run that is shorter.
        times: how many steps, from there on.

    Raises:
        ConfigurationError: for numbers that make no sense.
    """

    def __init__(self, at: int | None = None, times: int = 1) -> None:
        if at is not None:
            whole("fault.at", at, 0)
        whole("fault.times", times, 1)
        self.at = DEFAULT_AT if at is None else at
        self.times = times
        self._told = at is not None
        self._last = -1  # step of the last time it happened

    def check(self, run: Surroundings) -> list[str]:
        """See whether the fault can happen in this run; see `Fault.check`."""
        if self.at < run.total_steps:
            self._check_possible(run)
            return []
        if self._told:
            raise ConfigurationError(
                f"fault.at is {self.at}, but the run has {run.total_steps} steps: choose a step from 0 to "
                f"{run.total_steps - 1}, or a longer run (epochs)."
            )
        return [f"the run has {run.total_steps} steps and ends before the fault at step {self.at}; fault.at moves it"]

    def _check_possible(self, run: Surroundings) -> None:
        """Raise ConfigurationError where the run has nothing that this fault could harm."""

    def _in_time(self, steps: int) -> bool:
        return self.at <= steps < self.at + self.times

    def _happens(self, steps: int) -> bool:
        """Whether the fault happens now; it is over once asked."""
        if not self._in_time(steps) or steps <= self._last:
            return False
        self._last = steps
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the last time it happened; -1 before."""
        return {**super().state_dict(), "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what a fault of the same kind remembered; of another kind, nothing."""
        if state.get("kind") == type(self).__name__:
            self._last = int(state["last"])


def check_factor(name: str, value: Any) -> float:
    """Return the value as a number; raise ConfigurationError unless it is finite and above 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 < value < math.inf:
        raise ConfigurationError(f"fault.{name} is {value!r}; a finite number above 1 is allowed.")
    return float(value)
