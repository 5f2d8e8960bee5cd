"""Schedules against their formulas and torch's, and what none of them may do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stabletrain import ConfigurationError
from stabletrain.schedule import (
    Constant,
    Cosine,
    CosineRestarts,
    InverseSqrt,
    Linear,
    OneCycle,
    Plateau,
    Polynomial,
    WarmupStableDecay,
)

FALLING: list[Callable[..., Any]] = [Constant, Cosine, InverseSqrt, Linear, OneCycle, Plateau, Polynomial]
FALLING += [WarmupStableDecay]
ALL = [*FALLING, CosineRestarts]
NAN = math.nan


@settings(max_examples=30, deadline=None)
@given(
    total=st.integers(4, 500),
    share=st.floats(0, 0.99),
    start=st.floats(0, 1),
    final=st.floats(0, 1),
    updates=st.lists(st.integers(0, 1500), min_size=8, max_size=8),
    seed=st.integers(0, 2),
)
def test_factors_stay_between_0_and_1_and_rise_only_in_the_warm_up(
    total: int, share: float, start: float, final: float, updates: list[int], seed: int
) -> None:
    warmup = min(int(share * total), total - 4)
    own = [
        (Constant, {}),
        (Cosine, {"final": final}),
        (Linear, {"final": final}),
        (Polynomial, {"final": final, "power": 0.5 + seed}),
        (InverseSqrt, {"timescale": [None, 1, 100][seed]}),
        (
            WarmupStableDecay,
            {"final": final, "decay_share": (share + 0.01) / 1.1, "decay": ("linear", "cosine", "sqrt")[seed]},
        ),
        (OneCycle, {"final": final, "anneal": ("cosine", "linear")[seed % 2]}),
        (Plateau, {"minimum": final}),
        (CosineRestarts, {"final": final, "cycles": 1 + seed, "growth": 1.0 + share / 4}),
    ]
    for make, options in own:
        schedule = make(total_updates=total, updates_per_epoch=10, warmup_updates=warmup, warmup_from=start, **options)
        for update in (*updates, warmup, total - 1, total):
            here, after = schedule(update), schedule(update + 1)
            assert 0.0 <= here <= 1.0, (make, update)
            if update < warmup:
                assert after >= here - 1e-12, (make, update)
            elif make is not CosineRestarts or update >= total - 1:
                assert after <= here + 1e-12, (make, update)
        assert schedule(total + 1000) == schedule(total), make


def torchs(make: Callable[..., Any], count: int, **options: Any) -> list[float]:
    """Return the rates of a scheduler of torch's for updates from 0, as factors on its base or largest rate."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = make(optimizer, **options)
    found = []
    for _ in range(count):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        reference.step()
    return found


def ours(schedule: Callable[[int], float], count: int) -> list[float]:
    return [schedule(update) for update in range(count)]


def test_where_torch_is_right_they_are_torchs() -> None:
    scheduler = torch.optim.lr_scheduler
    common: dict[str, Any] = {"total_updates": 50, "updates_per_epoch": 10}
    pairs = [
        (Cosine(**common), torchs(scheduler.CosineAnnealingLR, 51, T_max=50)),
        (Cosine(**common, final=0.1), torchs(scheduler.CosineAnnealingLR, 51, T_max=50, eta_min=0.1)),
        (Linear(**common, final=0.2), torchs(scheduler.LinearLR, 60, start_factor=1.0, end_factor=0.2, total_iters=50)),
        (Polynomial(**common, power=2.5), torchs(scheduler.PolynomialLR, 60, total_iters=50, power=2.5)),
        (
            CosineRestarts(**common, cycles=5, final=0.05),
            torchs(scheduler.CosineAnnealingWarmRestarts, 50, T_0=10, eta_min=0.05),
        ),
        (
            CosineRestarts(total_updates=70, updates_per_epoch=10, cycles=3, growth=2.0),
            torchs(scheduler.CosineAnnealingWarmRestarts, 70, T_0=10, T_mult=2),
        ),
    ]
    for anneal, word in (("cosine", "cos"), ("linear", "linear")):
        # Torch counts from the first update to the last one; here the end is the update that isn't made any more.
        settings = {"max_lr": 1.0, "total_steps": 51, "pct_start": 16 / 51, "anneal_strategy": word}
        pairs.append(
            (
                OneCycle(**common, warmup_updates=15, anneal=anneal),  # type: ignore[arg-type]
                torchs(scheduler.OneCycleLR, 50, **settings, cycle_momentum=False),
            )
        )
    for schedule, expected in pairs:
        assert ours(schedule, len(expected)) == pytest.approx(expected, abs=1e-9), schedule


@settings(max_examples=20, deadline=None)
@given(total=st.integers(5, 300), warmup=st.integers(1, 100), final=st.floats(0, 1), share=st.floats(0.01, 1))
def test_they_follow_their_formulas(total: int, warmup: int, final: float, share: float) -> None:
    warmup = min(warmup, total - 1)
    common: dict[str, Any] = {"total_updates": total, "updates_per_epoch": 1, "warmup_updates": warmup}
    common["warmup_from"] = 0.1
    fall = min(max(1, round(share * total)), total - warmup)
    for update in range(total + 5):
        done = min((update - warmup) / (total - warmup), 1.0)
        last = min(max(0.0, (update - (total - fall)) / fall), 1.0)
        shapes = {
            Constant(**common): 1.0,
            Cosine(**common, final=final): final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)),
            Linear(**common, final=final): 1 - (1 - final) * done,
            Polynomial(**common, final=final, power=3.0): final + (1 - final) * (1 - max(0.0, done)) ** 3,
            InverseSqrt(**common): math.sqrt(warmup / min(max(update, warmup), total)),
            InverseSqrt(**common, timescale=7): math.sqrt(7 / (7 + max(0, min(update, total) - warmup))),
            WarmupStableDecay(**common, decay_share=share, final=final): 1 - (1 - final) * last,
            WarmupStableDecay(**common, decay_share=share, decay="sqrt"): 1 - math.sqrt(last),
            WarmupStableDecay(**common, decay_share=share, decay="cosine"): 0.5 * (1 + math.cos(math.pi * last)),
        }
        for schedule, after in shapes.items():
            expected = 0.1 + 0.9 * update / warmup if update < warmup else after
            assert schedule(update) == pytest.approx(expected, abs=1e-12), (schedule, update)


@pytest.mark.parametrize("make", ALL)
def test_a_warm_up_in_updates_in_epochs_or_as_a_share(make: Callable[..., Any]) -> None:
    share = {"warmup_share": None} if make is OneCycle else {}  # it has a share by default
    common: dict[str, Any] = {"total_updates": 40, "updates_per_epoch": 10, "warmup_from": 0.2}
    same = [
        make(**common, warmup_updates=10),
        make(**common, warmup_epochs=1.0, **share),
        make(**common, warmup_share=0.25),
        make(**common, warmup_updates=10, warmup_epochs=3.0),
    ]
    for schedule in same:
        assert schedule.warmup == 10
        assert ours(schedule, 45) == ours(same[0], 45)
        assert schedule(0) == pytest.approx(0.2) and schedule(10) == 1.0


@pytest.mark.parametrize("make", ALL)
def test_a_warm_up_that_does_not_fit_is_refused(make: Callable[..., Any]) -> None:
    share = {"warmup_share": None} if make is OneCycle else {}
    run: dict[str, Any] = {"total_updates": 20, "updates_per_epoch": 10}
    with pytest.raises(ConfigurationError, match=r"3.0 epochs of 10 updates = 30 updates, but the run has 20"):
        make(**run, warmup_epochs=3.0, **share)
    with pytest.raises(ConfigurationError, match="-1 updates"):
        make(**run, warmup_updates=-1)
    with pytest.raises(ConfigurationError, match=r"warmup_share is 1.0; it must be a finite number of at least 0 and"):
        make(**run, warmup_share=1.0)
    with pytest.raises(ConfigurationError, match=r"warmup_from is 1.5; it must be a number from 0 to 1"):
        make(**run, warmup_from=1.5)
    with pytest.raises(ConfigurationError, match="warmup_from is nan"):
        make(**run, warmup_from=NAN)
    if make is not OneCycle:
        with pytest.raises(ConfigurationError, match=r"warmup_updates is 3 and schedule.warmup_share 0.5; give one"):
            make(**run, warmup_updates=3, warmup_share=0.5)


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (Cosine, {"final": -0.1}, "schedule.final is -0.1"),
        (Linear, {"final": 2}, "schedule.final is 2"),
        (Polynomial, {"power": 0.0}, "schedule.power is 0.0"),
        (InverseSqrt, {"timescale": 0}, "schedule.timescale is 0"),
        (WarmupStableDecay, {"decay": "steep"}, "schedule.decay is 'steep'; allowed: linear, cosine, sqrt"),
        (WarmupStableDecay, {"decay_share": 0.0}, "schedule.decay_share is 0.0"),
        (WarmupStableDecay, {"decay_share": 1.1}, "schedule.decay_share is 1.1"),
        (CosineRestarts, {"cycles": 0}, "schedule.cycles is 0"),
        (CosineRestarts, {"cycles": 21}, "after the warm-up the run has 20 updates, so that a cycle would have none"),
        (CosineRestarts, {"growth": 0.5}, "schedule.growth is 0.5"),
        (OneCycle, {"anneal": "cos"}, "schedule.anneal is 'cos'; allowed: cosine, linear"),
        (Plateau, {"factor": 1.0}, "schedule.factor is 1.0"),
        (Plateau, {"patience": -1}, "schedule.patience is -1"),
        (Plateau, {"mode": "up"}, "schedule.mode is 'up'; allowed: min, max"),
        (Plateau, {"minimum": NAN}, "schedule.minimum is nan"),
    ],
)
def test_other_bad_settings_are_refused(make: Callable[..., Any], options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        make(total_updates=20, updates_per_epoch=10, **options)


# ------------------------------------------------------------------------------------------------------ the plateau


@settings(max_examples=40, deadline=None)
@given(
    losses=st.lists(st.floats(0.01, 2.0), min_size=1, max_size=60),
    patience=st.integers(0, 4),
    cooldown=st.integers(0, 3),
    mode=st.sampled_from(["min", "max"]),
    minimum=st.sampled_from([0.0, 0.2]),
)
def test_with_finite_metrics_the_plateau_is_torchs(
    losses: list[float], patience: int, cooldown: int, mode: Any, minimum: float
) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode=mode, factor=0.5, patience=patience, threshold=0.01, cooldown=cooldown, min_lr=minimum, eps=0.0
    )
    schedule = Plateau(
        total_updates=100, updates_per_epoch=1, factor=0.5, patience=patience, threshold=0.01, cooldown=cooldown,
        mode=mode, minimum=minimum,
    )  # fmt: skip
    for loss in losses:
        reference.step(loss)
        before = schedule(50)
        said = schedule.observe({"loss": loss, "accuracy": NAN})
        assert schedule(50) == pytest.approx(optimizer.param_groups[0]["lr"])
        assert (said is not None) == (schedule(50) < before)


def test_a_metric_of_nan_is_missing() -> None:
    losses = [1.0, 0.8, 0.9, 0.85, 0.95, 0.7, 0.75, 0.71, 0.9, 0.8]
    clean, fed = (Plateau(total_updates=99, updates_per_epoch=1, patience=2, factor=0.5) for _ in range(2))
    for number, loss in enumerate(losses):
        clean.observe({"loss": loss})
        fed.observe({"loss": loss})
        missing: Any = [{"loss": NAN}, {"loss": math.inf}, {"loss": None}, {}, {"loss": -math.inf}][number % 5]
        assert fed.observe(missing) is None
        assert fed.state_dict() == clean.state_dict()
    assert fed(10) == clean(10) == 0.25
    # Torch takes it for a validation without progress: the trap that this is for.
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=2)
    for _ in range(4):
        reference.step(NAN)
    assert optimizer.param_groups[0]["lr"] < 1.0, "torch takes NaN for a missing metric now"


def test_a_plateau_goes_on_from_its_state() -> None:
    losses = [1.0, 0.8, 0.9, 0.85, 0.95, 0.7, 0.75, 0.71, 0.9, 0.8, 0.9, 0.9, 0.9]
    for cut in range(len(losses)):
        whole, first, second = (
            Plateau(total_updates=99, updates_per_epoch=1, patience=1, cooldown=1, factor=0.3) for _ in range(3)
        )
        for loss in losses:
            whole.observe({"loss": loss})
        for loss in losses[:cut]:
            first.observe({"loss": loss})
        second.load_state_dict(first.state_dict())
        for loss in losses[cut:]:
            second.observe({"loss": loss})
        assert second.state_dict() == whole.state_dict() and second(50) == whole(50)
    other = Plateau(total_updates=99, updates_per_epoch=1, metric="accuracy", mode="max")
    other.load_state_dict(whole.state_dict())
    assert other(50) == whole(50) < 1.0 and other.state_dict()["best"] is None
