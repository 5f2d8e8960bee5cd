"""The ledger: what remembers rejected steps, and the budget for them."""

from __future__ import annotations

import math

import pytest

from stabletrain.errors import ConfigurationError, UnstableTraining
from stabletrain.guard import Ledger, Policy, Reason, Verdict
from stabletrain.guard.verdict import Facts


def verdict(reason: Reason | None) -> Verdict:
    return Verdict(Facts(reason, 1.0, 2.0, "" if reason is None else "what was found"))


def decide(ledger: Ledger, reason: Reason | None) -> None:
    """Count a step and ask whether training may go on, as a guard in a plain loop does."""
    ledger.record(verdict(reason))
    ledger.check(verdict(reason))


def test_counts() -> None:
    ledger = Ledger(Policy())
    for reason in (None, "loss", None, "buffer", "loss", "overflow"):
        decide(ledger, reason)  # type: ignore[arg-type]
    assert (ledger.steps, ledger.applied, ledger.rejected) == (6, 2, 4)
    assert ledger.reasons == {"loss": 2, "buffer": 1, "overflow": 1}


def test_the_budget_is_exact() -> None:
    ledger = Ledger(Policy(max_rejected=2, window=5))
    for reason in ("loss", "loss", None, None, None, "loss", "loss"):
        decide(ledger, reason)  # type: ignore[arg-type]
    with pytest.raises(UnstableTraining, match=r"3 of the last 5 steps .* for its gradient: what was found") as stop:
        decide(ledger, "gradient")
    assert "gradient 1, loss 4" in str(stop.value)


def test_a_budget_of_none_stops_at_the_first_rejected_step() -> None:
    with pytest.raises(UnstableTraining):
        decide(Ledger(Policy(max_rejected=0)), "loss")


@pytest.mark.parametrize("on_rejection", ["skip", "raise"])
def test_overflows_cost_nothing(on_rejection: str) -> None:
    ledger = Ledger(Policy(on_rejection=on_rejection, max_rejected=0))  # type: ignore[arg-type]
    for _ in range(20):
        decide(ledger, "overflow")
    assert ledger.rejected == 20


def test_raise_stops_at_once() -> None:
    ledger = Ledger(Policy(on_rejection="raise"))
    decide(ledger, None)
    with pytest.raises(UnstableTraining, match="rejected for its buffer: what was found"):
        decide(ledger, "buffer")
    assert ledger.rejected == 1


def test_round_trip() -> None:
    policy = Policy(max_rejected=3, window=4)
    ledger = Ledger(policy)
    for reason in ("loss", "overflow", None, "loss", "loss"):
        decide(ledger, reason)  # type: ignore[arg-type]
    copied = Ledger(policy)
    copied.load_state_dict(ledger.state_dict())
    assert copied.state_dict() == ledger.state_dict()
    decide(ledger, "loss")
    decide(copied, "loss")
    assert copied.state_dict() == ledger.state_dict()
    for one in (ledger, copied):
        with pytest.raises(UnstableTraining):
            decide(one, "loss")


def test_a_smaller_window_keeps_the_latest_steps() -> None:
    ledger = Ledger(Policy(window=10))
    for reason in ("loss", "loss", "loss", None, "loss"):
        decide(ledger, reason)  # type: ignore[arg-type]
    smaller = Ledger(Policy(window=2))
    smaller.load_state_dict(ledger.state_dict())
    assert smaller.state_dict()["recent"] == [0, 1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"on_rejection": "stop"}, "allowed: skip, raise, none"),
        ({"max_rejected": -1}, "at least 0"),
        ({"window": 0}, "at least 1"),
        ({"max_variance_growth": 1.0}, "exceed 1"),
        ({"max_variance_growth": math.nan}, "exceed 1"),
        ({"check_state_every": 0}, "at least 1"),
    ],
)
def test_a_policy_out_of_range_is_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Policy(**settings)  # type: ignore[arg-type]


def test_a_verdict_reads_its_facts_once() -> None:
    reads: list[int] = []

    def read() -> Facts:
        reads.append(1)
        return Facts("loss", math.nan, math.nan, "the loss is nan")

    late = Verdict(read)
    assert not reads
    assert (late.applied, late.reason, late.detail) == (False, "loss", "the loss is nan") and math.isnan(late.grad_norm)
    assert len(reads) == 1 and "rejected: loss" in repr(late) and "applied" in repr(verdict(None))


def test_a_salvaged_step_counts_as_applied_and_costs_nothing() -> None:
    ledger = Ledger(Policy(on_rejection="salvage", max_rejected=0))
    ledger.record(verdict("loss"))
    ledger.take_back(verdict("loss"))
    assert (ledger.steps, ledger.applied, ledger.salvaged, ledger.rejected) == (1, 1, 1, 0)
    copied = Ledger(ledger.policy)
    copied.load_state_dict(ledger.state_dict())
    assert copied.salvaged == 1
    ledger.check(verdict("loss"))
    ledger.record(verdict("spike"))
    with pytest.raises(UnstableTraining):
        ledger.check(verdict("spike"))
    ledger.forgive()
    ledger.check(verdict("spike"))
