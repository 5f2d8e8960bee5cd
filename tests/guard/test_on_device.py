"""The decision that stays on the device, shown on the CPU: the same results, and nobody asks what was decided."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stabletrain.clipping import AGC, AdaGC, AutoClip, Norm, Value, ZClip
from stabletrain.guard import Policy, StepGuard

from .worlds import FUSED, PLACES, VALUES, Case, Poison, World, differences, nonfinite

READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "item")


class Reads(TorchDispatchMode):
    """Counts the operations that would make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.counts["operations"] += 1
        if name in READS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


CLIPS = [None, Norm(0.5), Value(0.05)]
STEADY = [*itertools.product(("batch norm", "embedding with max_norm"), CLIPS, ("fp32", "fp16"))]
STEADY += [("batch norm", clip, "fp32") for clip in (AGC(), AutoClip(90.0), ZClip(), AdaGC(warmup=9))]


@pytest.mark.parametrize(("model", "clip", "precision"), STEADY)
def test_nothing_is_read_in_the_steady_state(model: str, clip: Any, precision: str) -> None:
    """200 steps, with buffers, clipping, loss scaling, a schedule and limits for spikes; four of them bad."""
    policy = Policy(max_rejected=1000, spikes=True)
    case = Case(Poison("input", math.nan), model, "fused adamw", precision)
    world = World(case, clip=clip, keep_on_device=True, policy=policy)
    bad = {50: case.poison, 51: case.poison, 100: Poison("loss", 1e6), 201: case.poison}
    if world.scaler is not None:
        world.scaler.set_growth_interval(1000)
    reads = Reads()
    verdicts = []
    for position in range(202):
        if position == 2:
            assert reads.counts["operations"] > 0
            reads.counts.clear()
        with reads:
            loss = world._forward(position, 0, bad.get(position))
            (loss if world.scaler is None else world.scaler.scale(loss)).backward()
            verdicts.append(world.guard.step(loss))
    assert {name for name in reads.counts if name in READS} == set(), reads.counts
    assert reads.counts["operations"] > 200
    assert [position for position, verdict in enumerate(verdicts) if not verdict.applied] == list(bad)
    assert world.guard.stats.reasons == {"loss": 3, "spike": 1} and world.schedule.last_epoch == 198
    assert not nonfinite(world.state())


MODELS = ("batch norm", "layer norm", "embedding with max_norm", "own buffer reassigned", "own buffer resized")
CASES = [
    Case(Poison(place, value), model, optimizer, precision, clipping, accumulation, moment=moment)
    for index, (optimizer, place, value) in enumerate(itertools.product(FUSED, PLACES, VALUES))
    for model, precision, clipping, accumulation, moment in [
        (
            MODELS[index % len(MODELS)],
            ("fp32", "fp16", "bf16", "fp16")[index % 4],
            ("norm", "none", "value")[index // 2 % 3],
            ("1", "1", "4, the last bad")[index // 3 % 3],
            ("first", "later")[index // 5 % 2],
        )
    ]
]  # fmt: skip


def check(case: Case) -> str:
    """Run one combination with the step and without it, and on the host; return the verdict on the poisoned step."""
    poisoned, holed = (World(case, keep_on_device=True) for _ in range(2))
    host = World(case, keep_on_device=False)
    for position in range(2 if case.moment == "later" else 0):
        for world in (poisoned, holed, host):
            world.step(position)
    verdict, expected = poisoned.step(2, case.poison), host.step(2, case.poison)
    assert verdict.reason == expected.reason, f"{verdict} on the device, {expected} on the host"
    assert verdict.loss == expected.loss or math.isnan(verdict.loss)
    if math.isfinite(expected.grad_norm):
        assert verdict.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    if verdict.reason == "overflow":
        assert holed.scaler is not None and poisoned.scaler is not None
        holed.scaler.load_state_dict(poisoned.scaler.state_dict())
    if verdict.applied:
        holed.step(2, case.poison)
    for world in (poisoned, holed, host):
        assert world.step(3).applied
        world.guard.settle()
    assert not nonfinite(poisoned.state()), nonfinite(poisoned.state())
    different = differences(poisoned.state(), holed.state())
    assert not different, f"traces of a step rejected for its {verdict.reason}: {different}"
    if "sgd" in case.optimizer and case.precision == "fp32":  # others enlarge what rounding leaves of a gradient of 0
        for name, tensor in host.model.state_dict().items():
            torch.testing.assert_close(poisoned.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    return verdict.reason or "applied"


@pytest.mark.parametrize("optimizer", FUSED)
def test_a_rejected_step_leaves_no_trace_on_the_device_either(optimizer: str) -> None:
    """Equal to the run that leaves the step out, and the same verdict as the decision on the host."""
    outcomes: Counter[str] = Counter()
    for case in (case for case in CASES if case.optimizer == optimizer):
        try:
            outcomes[check(case)] += 1
        except AssertionError as problem:
            raise AssertionError(str(case)) from problem
    assert {"applied", "loss", "gradient"} <= outcomes.keys(), outcomes


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_keeps_the_state_that_it_has_without_the_guard(momentum: float) -> None:
    layers = [torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)]
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1, momentum=momentum, fused=True) for layer in layers]
    guard = StepGuard(layers[0], optimizers[0], keep_on_device=True)
    losses = [layer(torch.ones(3, 4)).mean() for layer in layers]
    for loss in losses:
        loss.backward()
    guard.step(losses[0])
    optimizers[1].step()
    states = [[state.get("momentum_buffer") for state in optimizer.state.values()] for optimizer in optimizers]
    assert [sum(item is not None for item in state) for state in states] == [2 if momentum > 0 else 0] * 2


def test_a_verdict_from_before_loading_is_not_counted() -> None:
    world = World(Case(Poison("input", math.nan), optimizer="fused adamw"), keep_on_device=True)
    state = world.guard.state_dict()
    loss = world._forward(0, 0, None)
    loss.backward()
    world.guard.step(loss)
    world.guard.load_state_dict(state)
    assert world.guard.stats.steps == 0


class Norms(TorchDispatchMode):
    """Counts how often lists of tensors are measured."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ == "_foreach_norm"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("model", "keep_on_device", "passes"), [
    ("layer norm", False, 1), ("layer norm", True, 1), ("batch norm", False, 2), ("batch norm", True, 3),
])  # fmt: skip
def test_a_healthy_step_measures_gradients_once_and_buffers_once(model: str, keep_on_device: bool, passes: int) -> None:
    """On the device buffers are measured before and after; parameters and optimizer state are not, as a rule."""
    world = World(Case(Poison("input", 0.0), model, "fused adamw"), keep_on_device=keep_on_device)
    for position in range(5):
        loss = world._forward(position, 0, None)
        loss.backward()
        with Norms() as norms:
            world.guard.step(loss)
        assert norms.count == passes or position == 0
    world.guard.settle()


def test_the_scheduler_moves_at_the_next_step_and_only_for_applied_ones() -> None:
    world = World(Case(Poison("input", math.nan), optimizer="fused adamw"), keep_on_device=True)
    seen = [world.schedule.last_epoch]
    for position in range(4):
        loss = world._forward(position, 0, world.case.poison if position == 1 else None)
        loss.backward()
        world.guard.step(loss)
        seen.append(world.schedule.last_epoch)
    world.guard.settle()
    world.guard.settle()
    assert seen == [0, 0, 1, 1, 2] and world.schedule.last_epoch == 3


def test_verdicts_can_be_read_late_and_in_any_order() -> None:
    world = World(Case(Poison("label", math.inf), optimizer="fused adamw"), keep_on_device=True)
    verdicts = []
    for position in range(5):
        loss = world._forward(position, 0, world.case.poison if position == 3 else None)
        loss.backward()
        verdicts.append(world.guard.step(loss))
    assert [verdict.applied for verdict in reversed(verdicts)] == [True, False, True, True, True]
    assert "loss is inf" in verdicts[3].detail and verdicts[0].detail == ""
    state = world.guard.state_dict()["ledger"]
    assert (state["steps"], state["applied"], state["reasons"]) == (5, 4, {"loss": 1})


def test_what_cannot_be_undone_there_is_decided_on_the_host() -> None:
    world = World(Case(Poison("input", math.nan), "outside state", "fused adamw"), keep_on_device=True)
    assert world.step(0).applied and world.guard._pending is None
    assert not world.step(1, world.case.poison).applied
