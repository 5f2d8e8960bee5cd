"""Clippings that remember, under the guard: what is rejected leaves no trace in them, and a checkpoint goes on."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabletrain.clipping import AGC, AdaGC, AutoClip, Norm, ZClip
from stabletrain.guard import Policy, StepGuard

NAN, INF = math.nan, math.inf
ADAPTIVE: dict[str, Any] = {
    "autoclip": lambda: AutoClip(percentile=50.0, history=16),
    "zclip": lambda: ZClip(warmup=5),
    "adagc": lambda: AdaGC(warmup=5),
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


class Line(nn.Module):
    """A linear layer whose gradient is the mean of its inputs times a factor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)
        self.late = nn.Linear(3, 2)
        self.late.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) + self.late(inputs)


def guarded(name: str, keep_on_device: bool, **policy: Any) -> tuple[Line, torch.optim.Optimizer, StepGuard]:
    model = Line()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    guard = StepGuard(
        model, optimizer, clip=ADAPTIVE[name](), keep_on_device=keep_on_device, policy=Policy(max_rejected=99, **policy)
    )
    return model, optimizer, guard


def take(model: Line, guard: StepGuard, number: int, factor: float = 1.0) -> Any:
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(number))
    loss = (model(inputs) * factor).square().mean()
    loss.backward()
    return guard.step(loss)


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("keep_on_device", [False, True])
def test_under_the_guard_rejected_steps_leave_no_trace_and_resumed_ones_go_on(name: str, keep_on_device: bool) -> None:
    clean, fed = (guarded(name, keep_on_device, spikes=True) for _ in range(2))
    for number in range(30):
        assert take(clean[0], clean[2], number).applied
        assert take(fed[0], fed[2], number).applied
        if number % 6 == 5:
            # The last is a spike: finite, and rejected for that.
            bad = [NAN, INF, 1e12, 1e16, 1e4][number // 6]
            assert not take(fed[0], fed[2], 100 + number, bad).applied, bad
    kept = [guard.state_dict()["clipping"] for _, _, guard in (clean, fed)]
    assert kept[0]["memory"] and same(*kept)
    assert same(clean[0].state_dict(), fed[0].state_dict())
    # A checkpoint of it goes on to the same bits.
    stored = io.BytesIO()
    torch.save([copy.deepcopy(part.state_dict()) for part in fed], stored)
    stored.seek(0)
    resumed = guarded(name, keep_on_device, spikes=True)
    for part, state in zip(resumed, torch.load(stored, weights_only=True), strict=True):
        part.load_state_dict(state)
    for number in range(30, 36):
        assert take(resumed[0], resumed[2], number).applied and take(fed[0], fed[2], number).applied
    assert same(resumed[0].state_dict(), fed[0].state_dict())
    assert same(resumed[2].state_dict(), fed[2].state_dict())


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_device_decides_as_the_host_does(name: str) -> None:
    host, device = guarded(name, False), guarded(name, True)
    for number in range(12):
        for model, _, guard in (host, device):
            take(model, guard, number, NAN if number == 7 else 1.0 + number)
    for one, other in zip(host[0].parameters(), device[0].parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert host[2].stats.applied == device[2].stats.applied == 11


def test_a_gradient_of_1e30_is_rejected_and_not_clipped() -> None:
    for name in ADAPTIVE:
        model, _, guard = guarded(name, False)
        verdict = take(model, guard, 0, 1e15)
        assert (verdict.reason, verdict.applied) == ("gradient", False), name


def test_a_checkpoint_of_another_clipping_is_passed_over() -> None:
    old, new = guarded("zclip", False), guarded("adagc", False)
    for number in range(6):
        take(old[0], old[2], number)
    empty = new[2].state_dict()["clipping"]
    new[2].load_state_dict(old[2].state_dict())
    assert same(new[2].state_dict()["clipping"], empty)


def test_what_has_no_memory_saves_none_and_still_clips() -> None:
    for clip in (AGC(), Norm(1e-3), None):
        model = Line()
        guard = StepGuard(model, torch.optim.SGD(model.parameters(), lr=1.0), clip=clip)
        before = model.layer.weight.detach().clone()
        assert take(model, guard, 0, 10.0).applied
        assert guard.state_dict()["clipping"] == {}
        moved = float((model.layer.weight.detach() - before).norm())
        # AGC leaves out the last linear layer, which is the frozen one here.
        assert (moved < 0.05) == (clip is not None), clip


def test_a_guard_begins_with_nothing_and_knows_the_parameters_by_name() -> None:
    clip = AdaGC(warmup=5)
    for _ in range(2):
        model = Line()
        guard = StepGuard(model, torch.optim.SGD(model.layer.parameters(), lr=0.1), clip=clip)
        assert guard.state_dict()["clipping"]["memory"]["names"] == []
        assert take(model, guard, 0).applied
        assert guard.state_dict()["clipping"]["memory"]["names"] == ["0.layer.weight", "0.layer.bias"]
