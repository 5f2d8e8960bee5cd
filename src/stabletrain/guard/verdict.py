"""The guard's decision about one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

Reason = Literal["loss", "gradient", "buffer", "optimizer", "spike", "overflow"]
FAULTS: tuple[Reason, ...] = ("loss", "overflow", "gradient", "buffer", "optimizer", "spike")  # the first one decides


class Facts(NamedTuple):
    """What a verdict says, on the host."""

    reason: Reason | None  # why the step was rejected; None: it was applied
    loss: float  # mean of the microbatches' losses, before any loss scaling
    grad_norm: float  # Euclidean norm of all gradients before clipping; NaN when the loss alone decided
    detail: str  # for a rejected step: what was found, in words; else empty
    scale_held: bool = False  # for an overflow: whether the loss scale stayed where it is
    rank: int = 0  # for a rejected step: which process found it first


class Verdict:
    """What was decided about a step. On an accelerator, reading it waits for the device; it need not be read.

    Example:
        >>> verdict = Verdict(Facts("loss", float("nan"), float("nan"), "the loss is nan"))
        >>> verdict.applied, verdict.reason
        (False, 'loss')
    """

    __slots__ = ("_facts", "_read")

    def __init__(self, facts: Facts | Callable[[], Facts]) -> None:
        """Hold the facts, or the function that waits for them."""
        self._facts = None if callable(facts) else facts
        self._read = facts if callable(facts) else None

    @property
    def facts(self) -> Facts:
        """All that was found; waits for the device the first time."""
        if self._facts is None:
            assert self._read is not None
            self._facts, self._read = self._read(), None
        return self._facts

    @property
    def pending(self) -> bool:
        """Whether the decision is still on the device."""
        return self._facts is None

    @property
    def applied(self) -> bool:
        """Whether the step was applied to the parameters."""
        return self.facts.reason is None

    @property
    def reason(self) -> Reason | None:
        """Why the step was rejected; None for an applied one."""
        return self.facts.reason

    @property
    def loss(self) -> float:
        """Mean of the microbatches' losses, before any loss scaling."""
        return self.facts.loss

    @property
    def grad_norm(self) -> float:
        """Euclidean norm of all gradients, before clipping."""
        return self.facts.grad_norm

    @property
    def detail(self) -> str:
        """What was found, in words; empty for an applied step."""
        return self.facts.detail

    def __repr__(self) -> str:
        """Show the facts."""
        outcome = "applied" if self.applied else f"rejected: {self.reason} ({self.detail})"
        return f"Verdict({outcome}, loss={self.loss:.6g}, grad_norm={self.grad_norm:.6g})"
