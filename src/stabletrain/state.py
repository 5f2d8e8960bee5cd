"""What can be saved, and where a run stands."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Stateful(Protocol):
    """Anything with memory: what it returns restores it, bit for bit."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the object remembers, as tensors and plain containers."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Take over what `state_dict` returned."""
        ...


@dataclass(kw_only=True)
class Progress:
    """Where a run stands: its position in the data and what was done so far.

    Example:
        >>> progress = Progress(epoch=2, step=7, steps=85, updates=84)
        >>> other = Progress()
        >>> other.load_state_dict(progress.state_dict())
        >>> other == progress
        True
    """

    epoch: int = 0  # current epoch, from 0
    step: int = 0  # steps taken within the epoch, applied or not
    steps: int = 0  # steps taken over the whole run, applied or not
    updates: int = 0  # steps that were applied; the schedule counts these
    samples: int = 0  # samples that applied steps have seen

    def state_dict(self) -> dict[str, int]:
        """Return the five counts."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the five counts."""
        for name in asdict(self):
            setattr(self, name, int(state[name]))


@dataclass(kw_only=True)
class EpochTotals:
    """Sums over the steps of the current epoch; rejected steps enter no mean.

    Example:
        >>> totals = EpochTotals()
        >>> totals.add(loss=2.0, grad_norm=1.0)
        >>> totals.rejected += 1
        >>> totals.means()
        (2.0, 1.0)
    """

    loss: float = 0.0  # sum over applied steps
    grad_norm: float = 0.0  # sum over applied steps, before clipping
    applied: int = 0
    rejected: int = 0
    salvaged: int = 0  # of the applied ones

    def add(self, *, loss: float, grad_norm: float) -> None:
        """Count an applied step."""
        self.loss += loss
        self.grad_norm += grad_norm
        self.applied += 1

    def means(self) -> tuple[float, float]:
        """Return mean loss and mean gradient norm of the applied steps; NaN without any."""
        if self.applied == 0:
            return float("nan"), float("nan")
        return self.loss / self.applied, self.grad_norm / self.applied

    def state_dict(self) -> dict[str, float]:
        """Return the sums."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the sums."""
        self.loss, self.grad_norm = float(state["loss"]), float(state["grad_norm"])
        self.applied, self.rejected = int(state["applied"]), int(state["rejected"])
        self.salvaged = int(state["salvaged"])
