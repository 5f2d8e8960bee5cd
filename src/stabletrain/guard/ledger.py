"""What remembers rejected steps: the policy, the counts and the budget. It stands outside the transaction."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from typing import Any, Literal, get_args

from stabletrain.errors import ConfigurationError, UnstableTraining
from stabletrain.guard.spikes import FLOOR, SpikeWindow
from stabletrain.guard.verdict import Verdict

OnRejection = Literal["skip", "raise", "none", "salvage", "rollback"]


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
        spikes: whether a finite step far above recent ones is rejected.
        spike_window: updates that count as recent.
        spike_floor: by what factor a gradient norm must exceed the largest of late to be a spike.
        max_quarantined: share of the training data that may be found bad; more stops the training.
        scan: whether the trainer looks at all training data for NaN and Inf before the first step.
        quarantine: file with samples found bad by another run, to be left out from the start; None: none.
        max_incidents: rejected or salvaged steps kept on disk; 0: none.
        max_incident_bytes: size of all of them together; a state that doesn't fit is left out of its incident.
        on_bad_validation: what follows from a validation that isn't finite: `warn`, `rollback` or `stop`.
        diverged_factor: a loss this many times above its best for `diverged_updates` leads to a rollback.
        diverged_updates: updates over which that is seen.
        snapshot_every: updates between two copies of the state to return to.
        backoff: factor on the learning rate for each rollback.
        rewarm: updates over which the learning rate rises again after a rollback.
        recover: calm updates after which one `backoff` is taken back.
        max_rollbacks: rollbacks allowed in the run; one more stops it.

    Raises:
        ConfigurationError: for a value outside its range.

    Example:
        >>> Policy(max_rejected=0).window
        100
    """

    on_rejection: OnRejection = "skip"
    max_rejected: int = 10
    window: int = 100
    max_variance_growth: float = 1000.0
    check_state_every: int = 100
    spikes: bool = False
    spike_window: int = 128
    spike_floor: float = FLOOR
    max_quarantined: float = 0.05
    scan: bool = False
    quarantine: str | None = None
    max_incidents: int = 20
    max_incident_bytes: int = 2 << 30
    on_bad_validation: Literal["warn", "rollback", "stop"] = "warn"
    diverged_factor: float = 3.0
    diverged_updates: int = 50
    snapshot_every: int = 50
    backoff: float = 0.5
    rewarm: int = 20
    recover: int = 500
    max_rollbacks: int = 5

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("on_rejection", self.on_rejection, get_args(OnRejection)),
            ("on_bad_validation", self.on_bad_validation, ("warn", "rollback", "stop")),
        ):
            if value not in allowed:
                raise ConfigurationError(f"guard.{name} is {value!r}; allowed: {', '.join(allowed)}.")
        for name, number, least in (
            ("check_state_every", self.check_state_every, 1),
            ("max_incidents", self.max_incidents, 0),
            ("snapshot_every", self.snapshot_every, 1),
            ("rewarm", self.rewarm, 0),
            ("recover", self.recover, 1),
            ("max_rollbacks", self.max_rollbacks, 0),
        ):
            if number < least:
                raise ConfigurationError(f"guard.{name} is {number}; it must be at least {least}.")
        if not 0 <= self.max_quarantined <= 1:
            raise ConfigurationError(f"guard.max_quarantined is {self.max_quarantined}; it must be from 0 to 1.")
        if not 0 < self.backoff <= 1:
            raise ConfigurationError(f"guard.backoff is {self.backoff}; it must be above 0 and at most 1.")
        if self.max_rejected < 0 or self.window < 1:
            raise ConfigurationError(
                f"guard.max_rejected is {self.max_rejected} and guard.window {self.window}; "
                "the first must be at least 0 and the second at least 1."
            )
        SpikeWindow(self.spike_window, floor=self.spike_floor)  # refuses what it can't use
        if not self.max_variance_growth > 1:
            raise ConfigurationError(f"guard.max_variance_growth is {self.max_variance_growth}; it must exceed 1.")


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
        self.salvaged = 0  # of the applied ones
        self.reasons: Counter[str] = Counter()
        self._recent: deque[int] = deque(maxlen=policy.window)  # 1: rejected and counted against the budget

    @property
    def rejected(self) -> int:
        """Rejected steps, for any reason."""
        return sum(self.reasons.values())

    def record(self, verdict: Verdict) -> None:
        """Count a decided step; an overflow that lowers the loss scale brings it to its level and costs no budget."""
        self.steps += 1
        self._recent.append(int(verdict.reason not in (None, "overflow") or verdict.facts.scale_held))
        if verdict.reason is None:
            self.applied += 1
        else:
            self.reasons[verdict.reason] += 1

    def take_back(self, verdict: Verdict) -> None:
        """Count the step recorded last, which was rejected, as applied after all: it was salvaged."""
        assert verdict.reason is not None
        self.reasons -= Counter({verdict.reason: 1})
        self._recent[-1] = 0
        self.applied += 1
        self.salvaged += 1

    def correct(self, verdict: Verdict, corrected: Verdict) -> None:
        """Count the step recorded last as rejected for another reason, which costs budget."""
        assert verdict.reason is not None and corrected.reason is not None
        self.reasons -= Counter({verdict.reason: 1})
        self.reasons[corrected.reason] += 1
        self._recent[-1] = 1

    def check(self, verdict: Verdict) -> None:
        """See whether training may go on after this verdict, which was recorded.

        Raises:
            UnstableTraining: at once under `raise`; else when the budget is exceeded.
        """
        if verdict.reason is None:
            return
        if self.policy.on_rejection == "raise" and verdict.reason != "overflow":
            raise UnstableTraining(f"rejected for its {verdict.reason}: {verdict.detail}", verdict)
        if sum(self._recent) > self.policy.max_rejected:
            raise UnstableTraining(
                f"{sum(self._recent)} of the last {len(self._recent)} steps were rejected, more than the "
                f"{self.policy.max_rejected} allowed; the last one for its {verdict.reason}: {verdict.detail}.",
                verdict,
                more=f"Reasons so far: {', '.join(f'{name} {count}' for name, count in sorted(self.reasons.items()))}. "
                "Model and optimizer are as the last applied step left them.",
            )

    def forgive(self) -> None:
        """Begin the budget anew, after a rollback."""
        self._recent.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return counts and budget."""
        return {
            "steps": self.steps,
            "applied": self.applied,
            "salvaged": self.salvaged,
            "reasons": dict(self.reasons),
            "recent": list(self._recent),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over counts and budget; a smaller window keeps the latest steps."""
        self.steps, self.applied = int(state["steps"]), int(state["applied"])
        self.salvaged = int(state["salvaged"])
        self.reasons = Counter({str(name): int(count) for name, count in state["reasons"].items()})
        self._recent = deque((int(flag) for flag in state["recent"]), maxlen=self.policy.window)
