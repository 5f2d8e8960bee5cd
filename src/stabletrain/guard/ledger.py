"""What remembers rejected steps: the policy, the counts and the budget. It stands outside the transaction."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from typing import Any, Literal

from stabletrain.errors import ConfigurationError, UnstableTraining
from stabletrain.guard.verdict import Verdict


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What counts as a bad step and what follows from one.

    Args:
        on_rejection: `skip` goes on within the budget, `raise` stops at the first rejected step, `none` applies
            every step and only measures (what a loop without a guard does; a loss scaler still skips overflows).
        max_rejected: rejected steps allowed among the last `window`; one more stops the training.
        window: steps that the budget looks back on.
        max_variance_growth: a running variance that grows by more than this factor in one step is a fault.
        check_state_every: updates between two checks that parameters and optimizer state are finite.

    Raises:
        ConfigurationError: for a value outside its range.

    Example:
        >>> Policy(max_rejected=0).window
        100
    """

    on_rejection: Literal["skip", "raise", "none"] = "skip"
    max_rejected: int = 10
    window: int = 100
    max_variance_growth: float = 1000.0
    check_state_every: int = 100

    def __post_init__(self) -> None:
        if self.on_rejection not in ("skip", "raise", "none"):
            raise ConfigurationError(f"guard.on_rejection is {self.on_rejection!r}; allowed: skip, raise, none.")
        if self.max_rejected < 0 or self.window < 1:
            raise ConfigurationError(
                f"guard.max_rejected is {self.max_rejected} and guard.window {self.window}; "
                "the first must be at least 0 and the second at least 1."
            )
        if not self.max_variance_growth > 1:
            raise ConfigurationError(f"guard.max_variance_growth is {self.max_variance_growth}; it must exceed 1.")
        if self.check_state_every < 1:
            raise ConfigurationError(f"guard.check_state_every is {self.check_state_every}; it must be at least 1.")


class Ledger:
    """Counts of what was decided, and the budget for rejected steps.

    Example:
        >>> from stabletrain.guard.verdict import Facts
        >>> ledger = Ledger(Policy(max_rejected=0))
        >>> ledger.record(Verdict(Facts(None, 1.0, 2.0, "")))
        >>> ledger.steps, ledger.applied, ledger.rejected
        (1, 1, 0)
    """

    def __init__(self, policy: Policy) -> None:
        """Begin with empty counts."""
        self.policy = policy
        self.steps = 0
        self.applied = 0
        self.reasons: Counter[str] = Counter()
        self._recent: deque[int] = deque(maxlen=policy.window)  # 1: rejected and counted against the budget

    @property
    def rejected(self) -> int:
        """Rejected steps, for any reason."""
        return sum(self.reasons.values())

    def record(self, verdict: Verdict) -> None:
        """Count a decided step.

        Loss-scale overflows are the scaler finding its level, so the budget doesn't count them.

        Raises:
            UnstableTraining: at once under `raise`; else when the budget is exceeded.
        """
        self.steps += 1
        self._recent.append(int(verdict.reason not in (None, "overflow")))
        if verdict.reason is None:
            self.applied += 1
            return
        self.reasons[verdict.reason] += 1
        if self.policy.on_rejection == "raise" and verdict.reason != "overflow":
            raise UnstableTraining(f"rejected for its {verdict.reason}: {verdict.detail}", verdict)
        if sum(self._recent) > self.policy.max_rejected:
            raise UnstableTraining(
                f"{sum(self._recent)} of the last {len(self._recent)} steps were rejected, more than the "
                f"{self.policy.max_rejected} allowed; the last one for its {verdict.reason}: {verdict.detail}. "
                f"Reasons so far: {', '.join(f'{name} {count}' for name, count in sorted(self.reasons.items()))}. "
                "Model and optimizer are as the last applied step left them.",
                verdict,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return counts and budget."""
        return {
            "steps": self.steps,
            "applied": self.applied,
            "reasons": dict(self.reasons),
            "recent": list(self._recent),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over counts and budget; a smaller window keeps the latest steps."""
        self.steps, self.applied = int(state["steps"]), int(state["applied"])
        self.reasons = Counter({str(name): int(count) for name, count in state["reasons"].items()})
        self._recent = deque((int(flag) for flag in state["recent"]), maxlen=self.policy.window)
