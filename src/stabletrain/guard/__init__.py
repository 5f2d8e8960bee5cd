"""The step guard: a training step is a transaction that is committed or undone without a trace."""

from __future__ import annotations

from stabletrain.guard.ledger import Ledger, Policy
from stabletrain.guard.snapshot import Snapshot
from stabletrain.guard.step_guard import StepGuard
from stabletrain.guard.verdict import Reason, Verdict

__all__ = ["Ledger", "Policy", "Reason", "Snapshot", "StepGuard", "Verdict"]
