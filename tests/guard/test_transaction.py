"""A rejected step never happened: a run with a poisoned step equals the run that leaves the step out, bit for bit."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from . import models
from .worlds import (
    ACCUMULATIONS,
    CLIPPINGS,
    LARGEST_SQUARE,
    OPTIMIZERS,
    PARAMETERS,
    PLACES,
    PRECISIONS,
    VALUES,
    Case,
    Poison,
    World,
    differences,
    nonfinite,
)

FEWEST = 500
AXES: dict[str, tuple[Any, ...]] = {
    "poison": tuple(Poison(place, value) for place in PLACES for value in VALUES),
    "model": models.MODELS,
    "optimizer": tuple(OPTIMIZERS),
    "precision": PRECISIONS,
    "clipping": tuple(CLIPPINGS),
    "accumulation": ACCUMULATIONS,
    "ema": (False, True),
    "moment": ("first", "later"),
    "parameters": PARAMETERS,
}


def pairs(values: tuple[Any, ...]) -> set[tuple[int, Any, int, Any]]:
    return {(i, values[i], j, values[j]) for i, j in itertools.combinations(range(len(values)), 2)}


def sampled(count: int) -> Iterator[Case]:
    """Choose at least `count` different combinations so that every value of one axis meets every value of another."""
    choose = random.Random(0)
    axes = list(AXES.values())
    numbers = range(len(axes))
    missing = dict.fromkeys(
        (i, a, j, b) for i, j in itertools.combinations(numbers, 2) for a in axes[i] for b in axes[j]
    )
    chosen: set[tuple[Any, ...]] = set()
    while len(chosen) < count or missing:
        offers = [tuple(choose.choice(axis) for axis in axes) for _ in range(8)]
        if missing:
            i, a, j, b = next(iter(missing))
            offers.append(tuple(a if n == i else b if n == j else choose.choice(axis) for n, axis in enumerate(axes)))
        best = max(offers, key=lambda offer: (len(pairs(offer) & missing.keys()), offer not in chosen))
        if best not in chosen:
            chosen.add(best)
            for pair in pairs(best):
                missing.pop(pair, None)
            yield Case(**dict(zip(AXES, best, strict=True)))


def should_be(world: World, before: dict[str, Tensor]) -> str:
    """Say what the verdict must be, from float64 values of what the step left: losses, gradients, buffers."""
    if not all(bool(torch.isfinite(loss)) for loss in world.losses):
        return "loss"
    norm = torch.linalg.vector_norm(torch.cat([raw.flatten() for raw in world.raw]))
    if not bool(torch.isfinite(norm)):
        return "overflow" if world.scaler is not None else "gradient"
    if world.case.clipping == "none" and float(norm) > LARGEST_SQUARE:
        return "gradient"
    for name, buffer in world.buffers().items():
        if not buffer.is_floating_point():
            continue
        if name in before and torch.isfinite(before[name]).all() and not torch.isfinite(buffer).all():
            return "buffer"
        seen = world.case.moment == "later"
        if name.endswith("running_var") and seen and buffer.double().norm() > 1000 * before[name].double().norm():
            return "buffer"
    return "applied"


def as_clipped(world: World) -> list[Tensor]:
    """Return what the optimizers must have been given, by the formula in float64."""
    if world.case.clipping == "value":
        return [raw.clamp(-0.05, 0.05) for raw in world.raw]
    norm = torch.linalg.vector_norm(torch.cat([raw.flatten() for raw in world.raw]))
    factor = min(1.0, 0.5 / (float(norm) + 1e-6)) if world.case.clipping == "norm" else 1.0
    return [raw * factor for raw in world.raw]


def check(case: Case) -> str:
    """Run one combination in both worlds; return the verdict on its poisoned step."""
    poisoned, holed = World(case), World(case)
    torch.manual_seed(11)
    for position in range(2 if case.moment == "later" else 0):
        assert poisoned.step(position).applied, "a healthy step was rejected"
    poisoned.watch_applied()
    before = {name: buffer.clone() for name, buffer in poisoned.buffers().items()}
    seen: list[str] = []
    hook = poisoned.guard._judge  # the buffers must be read before they are put back

    def judge(loss: Any) -> Any:
        seen.append(should_be(poisoned, before))
        return hook(loss)

    poisoned.guard._judge = judge  # type: ignore[method-assign]
    verdict = poisoned.step(2, case.poison)
    del poisoned.guard._judge
    expected = seen[0]
    assert (verdict.reason or "applied") == expected, f"the verdict is {verdict}, it should be {expected}"
    if verdict.applied:
        assert poisoned.applied is not None
        for got, wanted in zip(poisoned.applied, as_clipped(poisoned), strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=2e-6, atol=1e-12)
    after = poisoned.scaler.state_dict() if poisoned.scaler is not None else {}
    assert poisoned.step(3).applied, "the healthy step after the poisoned one was rejected"
    assert not nonfinite(poisoned.state()), nonfinite(poisoned.state())
    if verdict.applied:
        return "applied"
    end = poisoned.state()

    torch.manual_seed(11)
    for position in range(2 if case.moment == "later" else 0):
        assert holed.step(position).applied
    if verdict.reason == "overflow":
        assert holed.scaler is not None and after["scale"] == 128.0 * (2 if case.moment == "later" else 1)
        holed.scaler.load_state_dict(after)
    assert holed.step(3).applied
    different = differences(end, holed.state())
    assert not different, f"traces of a step rejected for its {verdict.reason}: {different}"
    return expected


def test_a_rejected_step_leaves_no_trace(capsys: pytest.CaptureFixture[str], record_property: Any) -> None:
    """Over at least 500 combinations in which each pair of values meets."""
    outcomes: list[str] = []
    failures: list[str] = []
    for case in sampled(FEWEST + 20):
        try:
            outcomes.append(check(case))
        except Exception as problem:
            failures.append(f"{case}\n    {type(problem).__name__}: {problem}")
    counts = {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}
    record_property("combinations", len(outcomes))
    with capsys.disabled():
        print(f"\n{len(outcomes)} combinations of poison and training ran: {counts}")
    assert not failures, f"{len(failures)} combinations failed:\n" + "\n".join(failures[:20])
    assert len(outcomes) >= FEWEST
    assert {"applied", "loss", "gradient", "buffer", "overflow"} <= set(counts)


STEP = st.one_of(
    st.none(), st.builds(Poison, st.sampled_from(PLACES), st.sampled_from((*VALUES, -float("inf"), -1e30)))
)
FEW_MODELS = ("batch norm and dropout", "embedding with max_norm", "new spectral norm", "own buffer reassigned")


@given(
    steps=st.lists(STEP, min_size=2, max_size=6),
    model=st.sampled_from(FEW_MODELS),
    optimizer=st.sampled_from(tuple(OPTIMIZERS)),
    precision=st.sampled_from(PRECISIONS),
    clipping=st.sampled_from(tuple(CLIPPINGS)),
)
@settings(max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_sequence_equals_its_applied_steps(
    steps: list[Poison | None], model: str, optimizer: str, precision: str, clipping: str
) -> None:
    """Several bad steps, in a row or apart: what is left is the run of the applied steps alone."""
    case = Case(Poison("input", 0.0), model, optimizer, precision, clipping, ema=True)
    full, short = World(case), World(case)
    torch.manual_seed(11)
    kept: list[tuple[int, Poison | None, dict[str, Any]]] = []
    for position, poison in enumerate(steps):
        verdict = full.step(position, poison)
        scale = full.scaler.state_dict() if full.scaler is not None else {}
        kept.append((-1 if not verdict.applied else position, poison, scale if verdict.reason == "overflow" else {}))
    assert full.guard.stats.steps == len(steps)
    assert full.guard.stats.rejected == sum(position < 0 for position, _, _ in kept)
    end = full.state()
    assert not nonfinite(end)

    torch.manual_seed(11)
    for position, poison, scale in kept:
        if position >= 0:
            assert short.step(position, poison).applied
        elif scale:
            assert short.scaler is not None
            short.scaler.load_state_dict(scale)
    different = differences(end, short.state())
    assert not different, f"traces of rejected steps: {different}"
