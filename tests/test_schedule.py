"""Schedules against their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stabletrain import ConfigurationError
from stabletrain.schedule import constant, warmup_cosine, warmup_linear

ALL: list[Callable[..., Any]] = [constant, warmup_cosine, warmup_linear]


@pytest.mark.parametrize("make", ALL)
@given(
    total=st.integers(2, 500),
    share=st.floats(0, 0.99),
    start=st.floats(0, 1),
    update=st.integers(0, 2000),
)
def test_factors_stay_between_0_and_1_and_rise_only_in_the_warm_up(
    make: Callable[..., Any], total: int, share: float, start: float, update: int
) -> None:
    warmup = min(int(share * total), total - 1)
    schedule = make(total_updates=total, updates_per_epoch=10, warmup_updates=warmup, warmup_from=start)
    here, after = schedule(update), schedule(update + 1)
    assert 0.0 <= here <= 1.0
    if update < warmup:
        assert after >= here - 1e-12
    else:
        assert after <= here + 1e-12


@given(total=st.integers(2, 300), warmup=st.integers(0, 100), final=st.floats(0, 1))
def test_cosine_follows_its_formula(total: int, warmup: int, final: float) -> None:
    warmup = min(warmup, total - 1)
    schedule = warmup_cosine(
        total_updates=total, updates_per_epoch=1, warmup_updates=warmup, warmup_from=0.1, final=final
    )
    for update in range(total + 5):
        if update < warmup:
            expected = 0.1 + 0.9 * update / warmup
        else:
            progress = min((update - warmup) / (total - warmup), 1.0)
            expected = final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
        assert schedule(update) == pytest.approx(expected, abs=1e-12)


def test_without_warm_up_cosine_is_torchs() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    schedule = warmup_cosine(total_updates=50, updates_per_epoch=10, warmup_epochs=0)
    for update in range(51):
        assert schedule(update) == pytest.approx(reference.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        reference.step()


def test_linear_and_constant_follow_their_formulas() -> None:
    linear = warmup_linear(total_updates=20, updates_per_epoch=5, warmup_epochs=1, warmup_from=0.0, final=0.5)
    assert [linear(update) for update in (0, 1, 5, 20, 99)] == pytest.approx([0.0, 0.2, 1.0, 0.5, 0.5])
    assert linear(10) == pytest.approx(1 - 0.5 / 3)
    flat = constant(total_updates=20, updates_per_epoch=5, warmup_updates=2, warmup_from=0.5)
    assert [flat(update) for update in (0, 1, 2, 1000)] == pytest.approx([0.5, 0.75, 1.0, 1.0])


@pytest.mark.parametrize("make", ALL)
def test_more_warm_up_than_updates_is_refused(make: Callable[..., Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"3.0 epochs of 10 updates = 30 updates, but the run has 20"):
        make(total_updates=20, updates_per_epoch=10, warmup_epochs=3.0)
    with pytest.raises(ConfigurationError, match="-1 updates"):
        make(total_updates=20, updates_per_epoch=10, warmup_updates=-1)
    with pytest.raises(ConfigurationError, match=r"warmup_from is 1.5; it must be a number from 0 to 1"):
        make(total_updates=20, updates_per_epoch=10, warmup_from=1.5)
    with pytest.raises(ConfigurationError, match="warmup_from is nan"):
        make(total_updates=20, updates_per_epoch=10, warmup_from=math.nan)
