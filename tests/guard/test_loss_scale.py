"""The loss scale of float16: down at once while it finds its level, and later not for a lone overflow."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import AdamW

from stabletrain.errors import ConfigurationError, UnstableTraining
from stabletrain.guard import Policy, StepGuard, Verdict
from stabletrain.precision import LossScaler

INF, NAN = math.inf, math.nan


class Rule:
    """The rule in plain numbers."""

    def __init__(self, scale: float, interval: int, hysteresis: int) -> None:
        self.scale, self.interval, self.hysteresis = scale, interval, hysteresis
        self.finding, self.alone, self.healthy = True, 0, 0

    def overflow(self) -> bool:
        """Return whether the scale stays."""
        self.healthy = 0
        if not self.finding and self.alone + 1 < self.hysteresis:
            self.alone += 1
            return True
        self.scale, self.finding, self.alone = max(self.scale / 2, 1.0), True, 0
        return False

    def applied(self) -> None:
        self.healthy += 1
        self.finding = False
        if self.healthy == self.interval:
            self.scale, self.healthy, self.finding, self.alone = self.scale * 2, 0, True, 0


def guarded(keep_on_device: bool, policy: Policy | None = None, **options: Any) -> tuple[nn.Module, StepGuard]:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = AdamW(model.parameters(), lr=1e-3, fused=True)
    scaler = LossScaler("cpu", **{"init_scale": 2.0**10, "growth_interval": 5, **options})
    policy = policy or Policy(max_rejected=1000)
    return model, StepGuard(model, optimizer, scaler=scaler, policy=policy, keep_on_device=keep_on_device)


def step(model: nn.Module, guard: StepGuard, gradient: float = 0.0, inputs: float = 1.0) -> Verdict:
    loss = model(torch.full((3, 4), inputs)).square().mean()
    assert guard.scaler is not None
    guard.scaler.scale(loss).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.view(-1)[0] += gradient
    return guard.step(loss)


def decided(model: nn.Module, guard: StepGuard, *gradients: float) -> None:
    """Take some steps, and wait for what was decided about the last one."""
    for gradient in gradients:
        step(model, guard, gradient)
    guard.settle()


@pytest.mark.parametrize("keep_on_device", [False, True])
@settings(max_examples=40)
@given(events=st.lists(st.sampled_from("aaaoon"), max_size=40), hysteresis=st.integers(1, 3))
def test_the_scale_follows_the_rule(keep_on_device: bool, events: list[str], hysteresis: int) -> None:
    """Overflows, applied steps and steps whose loss is NaN in any order; saved and loaded on the way."""
    model, guard = guarded(keep_on_device, hysteresis=hysteresis)
    rule = Rule(2.0**10, 5, hysteresis)
    for number, event in enumerate(events):
        verdict = step(model, guard, gradient=INF if event == "o" else 0.0, inputs=NAN if event == "n" else 1.0)
        scaler = guard.scaler
        assert scaler is not None
        if event == "o" and rule.scale > 1:
            assert (verdict.reason, verdict.facts.scale_held) == ("overflow", rule.overflow())
        elif event == "o":
            assert verdict.reason == "gradient"
        elif event == "n":
            assert verdict.reason == "loss"
        else:
            assert verdict.applied
            rule.applied()
        assert scaler.get_scale() == rule.scale, f"after {events[: number + 1]}"
        if number % 7 == 3:
            guard.scaler = LossScaler("cpu", growth_interval=5, hysteresis=hysteresis)
            guard.scaler.load_state_dict(scaler.state_dict())


@pytest.mark.parametrize("keep_on_device", [False, True])
def test_an_overflow_that_leaves_the_scale_costs_budget(keep_on_device: bool) -> None:
    """One that lowers it does not: the scale can't fall for ever, so that in the end every one costs."""
    model, guard = guarded(keep_on_device, Policy(max_rejected=2))
    for _ in range(5):
        assert step(model, guard, INF).reason == "overflow"  # finding its level
    assert step(model, guard).applied
    for _ in range(6):
        assert step(model, guard, INF).reason == "overflow"
    assert guard.stats.state_dict()["recent"] == [0] * 6 + [1] + [0] * 5
    assert step(model, guard, INF).reason == "gradient"  # the scale is at its floor
    with pytest.raises(UnstableTraining, match="3 of the last 14 steps were rejected"):
        decided(model, guard, INF)


@pytest.mark.parametrize("keep_on_device", [False, True])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_persistent_nan_ends_by_the_budget(keep_on_device: bool, every: int, value: float) -> None:
    model, guard = guarded(keep_on_device, Policy(), init_scale=2.0**16, growth_interval=2000)
    gradients = [value if position >= 20 and position % every == 0 else 0.0 for position in range(200)]
    with pytest.raises(UnstableTraining, match="of the last"):
        decided(model, guard, *gradients)
    assert guard.scaler is not None and 1.0 <= guard.scaler.get_scale() <= 2.0**16
    assert guard.ledger.steps < 150
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


@pytest.mark.parametrize("keep_on_device", [False, True])
@pytest.mark.parametrize("healthy", [0, 1, 2])
def test_what_proves_no_overflow_leaves_the_scaler_as_it_was(keep_on_device: bool, healthy: int) -> None:
    model, guard = guarded(keep_on_device)
    for _ in range(healthy):
        step(model, guard)
    scaler = guard.scaler
    assert scaler is not None
    scaler.scale(torch.zeros(1))
    before = scaler.state_dict()
    verdict = step(model, guard, NAN)
    guard.settle()
    corrected = guard.call_no_overflow(verdict)
    assert scaler.state_dict() == before
    assert (corrected.reason, corrected.detail, guard.ledger.reasons) == ("gradient", verdict.detail, {"gradient": 1})
    assert guard.ledger.state_dict()["recent"] == [0] * healthy + [1]


@pytest.mark.parametrize("keep_on_device", [False, True])
def test_the_scale_is_never_lowered_below_one(keep_on_device: bool) -> None:
    model, guard = guarded(keep_on_device, init_scale=1.5)
    assert step(model, guard, INF).reason == "overflow"
    assert guard.scaler is not None and guard.scaler.get_scale() == 1.0


def test_torchs_own_scaler_lowers_at_once() -> None:
    model, guard = guarded(False)
    guard.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert step(model, guard).applied
    verdict = step(model, guard, INF)
    assert not verdict.facts.scale_held and guard.scaler.get_scale() == 4.0


def test_the_state_of_torchs_own_scaler_is_taken_over() -> None:
    scaler = LossScaler("cpu")
    scaler.load_state_dict({**torch.amp.GradScaler("cpu", init_scale=8.0).state_dict()})
    assert (scaler.get_scale(), scaler.state_dict()["patience"]) == (8.0, -1)


@pytest.mark.parametrize("hysteresis", [0, -1, 1.5, True])
def test_the_hysteresis_is_a_number_of_overflows(hysteresis: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"precision\.hysteresis is"):
        LossScaler("cpu", hysteresis=hysteresis)
