"""A guard that decides within `optimizer.step`: the same transaction, in a loop that calls that itself."""

from __future__ import annotations

import gc
import itertools
import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabletrain.errors import ConfigurationError, UnstableTraining
from stabletrain.guard import Policy, StepGuard

from .worlds import OPTIMIZERS, Case, Poison, World, differences, nonfinite

NAN, INF = math.nan, math.inf


def attached(case: Case, **settings: Any) -> World:
    world = World(case, **settings)
    world.guard.attach()
    return world


def step(world: World, position: int, poison: Poison | None = None, way: str = "seen") -> None:
    """Run one step of a loop that knows of no guard; only `seen` hands the loss over."""

    def evaluate() -> Tensor:
        for optimizer in world.optimizers:
            optimizer.zero_grad()
        for index in range(world.accumulate):
            bad = 0 if "first" in world.case.accumulation else world.accumulate - 1
            loss = world._forward(position, index, poison if index == bad else None)
            if way == "seen":
                world.guard.observe(loss)
            with world._spoiled_gradient(poison if index == bad else None):
                scaled = loss / world.accumulate
                (scaled if world.scaler is None else world.scaler.scale(scaled)).backward()
        return loss

    if way.startswith("closure"):
        for optimizer in world.optimizers:
            optimizer.step(evaluate) if way == "closure" else optimizer.step(closure=evaluate)
        return
    evaluate()
    if world.scaler is None:
        for optimizer in world.optimizers:
            optimizer.step()
        return
    if way == "unscaled" or len(world.optimizers) > 1:
        for optimizer in world.optimizers:
            world.scaler.unscale_(optimizer)
    for optimizer in world.optimizers:
        world.scaler.step(optimizer)
    world.scaler.update()


def end(world: World) -> dict[str, Any]:
    """Return the state, less the gradients, which the loop drops."""
    found = world.state()
    del found["gradients"]
    return found


CASES = [
    *(("seen", Case(Poison("loss", NAN), optimizer=name)) for name in OPTIMIZERS),
    *(("unseen", Case(Poison("input", NAN), "batch norm and dropout", name)) for name in ("adamw fused", "sgd fused")),
    *(("unseen", Case(Poison("gradient", INF), clipping=name)) for name in ("none", "value")),
    ("closure", Case(Poison("label", INF), "batch norm and dropout", "adamw loop", ema=True)),
    ("closure by name", Case(Poison("input", NAN), "embedding with max_norm", "stable adamw")),
    ("seen", Case(Poison("input", NAN), "batch norm", accumulation="4, the first bad")),
    ("unseen", Case(Poison("input", NAN), "parameter changed through .data", accumulation="4, the last bad")),
    ("seen", Case(Poison("backward", NAN), "outside state", parameters="two optimizers", moment="first")),
    ("unseen", Case(Poison("forward", 1e30), "batch norm", parameters="two groups")),
    *(
        (way, Case(Poison(place, value), "batch norm", optimizer, "fp16"))
        for optimizer in ("adamw fused", "adamw foreach", "stable adamw")
        for way, place, value in (("seen", "input", NAN), ("unscaled", "gradient", NAN), ("unseen", "gradient", INF))
    ),
    ("seen", Case(Poison("loss", NAN), "dropout", "sgd momentum", "fp16", parameters="two optimizers")),
    ("unseen", Case(Poison("forward", 1e30), "batch norm", "sgd momentum", "fp16")),
]


@pytest.mark.parametrize(("way", "case"), CASES)
def test_a_rejected_step_leaves_no_trace(way: str, case: Case) -> None:
    poisoned, holed = attached(case), attached(case)
    first = 2 if case.moment == "later" else 0
    scale: dict[str, Any] = {}
    for world in (poisoned, holed):
        torch.manual_seed(11)
        for position in range(first):
            step(world, position, way=way)
        if world is poisoned:
            step(world, 2, case.poison, way)
            reasons = world.guard.stats.reasons
            seen = way == "seen" or way.startswith("closure")
            assert sum(reasons.values()) == 1
            assert reasons["loss"] == (seen and case.poison.place in ("loss", "input", "label"))
            if reasons["overflow"]:
                assert world.scaler is not None
                scale = world.scaler.state_dict()
                assert scale["scale"] == 256.0  # grown once, halved once
        elif scale:
            assert world.scaler is not None
            world.scaler.load_state_dict(scale)
        step(world, 3, way=way)
        assert world.guard.stats.applied == first + 1
    assert not nonfinite(end(poisoned))
    assert not differences(end(poisoned), end(holed))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("parameters", ["one group", "two optimizers"])
def test_it_ends_where_a_loop_that_calls_the_guard_ends(precision: str, parameters: str) -> None:
    case = Case(Poison("loss", NAN), "batch norm and dropout", precision=precision, parameters=parameters)
    policy = Policy(spikes=True, check_state_every=2)
    one, other = attached(case, policy=policy), World(case, policy=policy)
    for position in range(14):
        poison = case.poison if position in (3, 7) else None
        torch.manual_seed(position)
        step(one, position, poison)
        torch.manual_seed(position)
        other.step(position, poison)
    assert not differences(end(one), end(other))
    assert one.guard.state_dict() == other.guard.state_dict()
    assert one.guard._until_state_check == other.guard._until_state_check
    assert one.guard._buffer_sizes == other.guard._buffer_sizes and one.guard._buffers.seen_data


def test_the_scale_falls_to_1_at_the_lowest_and_is_right_when_it_is_saved() -> None:
    world = attached(Case(Poison("gradient", NAN), precision="fp16"))
    assert world.scaler is not None
    step(world, 0)
    world.scaler.update(1.0)
    step(world, 1, Poison("input", NAN))
    assert world.scaler.get_scale() == 0.5  # the loop's scaler took it for an overflow
    world.guard.state_dict()
    assert world.scaler.get_scale() == 1.0 and world.scaler.state_dict()["_growth_tracker"] == 1
    world.scaler.update(1.5)
    step(world, 2, Poison("gradient", NAN))
    assert world.scaler.get_scale() == 0.75 and world.guard.stats.reasons == {"loss": 1, "overflow": 1}
    step(world, 3, Poison("gradient", NAN))  # at a scale of 1 it is no overflow
    assert world.guard.stats.reasons == {"loss": 1, "overflow": 1, "gradient": 1}
    step(world, 4)
    assert world.scaler.get_scale() == 1.0 and world.guard.stats.applied == 2


def test_a_scaler_that_the_guard_was_not_given_still_steps_through_it() -> None:
    world = attached(Case(Poison("gradient", NAN), "batch norm", "adamw foreach", "fp16"), scaler=None)
    step(world, 0)
    before = world.state()["model.first.weight"]
    step(world, 1, Poison("gradient", NAN))
    assert world.guard.stats.reasons == {"overflow": 1} and world.guard.stats.applied == 1
    assert torch.equal(before, world.model.first.weight)
    assert float(world.model.middle[0].num_batches_tracked) == 1  # type: ignore[index, arg-type, union-attr]
    step(world, 2)
    assert world.guard.stats.applied == 2


def test_a_policy_that_only_measures_lets_the_scaler_skip_overflows() -> None:
    for precision, reasons in (("fp16", {"overflow": 1}), ("fp32", {})):
        world = attached(Case(Poison("gradient", NAN), precision=precision), policy=Policy(on_rejection="none"))
        step(world, 0, Poison("gradient", NAN))
        assert world.guard.stats.reasons == reasons
        assert bool(torch.isfinite(world.model.first.weight).all()) == bool(reasons)


def test_the_budget_ends_training_within_the_optimizers_step(caplog: pytest.LogCaptureFixture) -> None:
    world = attached(Case(Poison("loss", NAN)), policy=Policy(max_rejected=1))
    step(world, 0)
    before = world.state()
    with caplog.at_level(logging.WARNING):
        step(world, 1, world.case.poison)
    assert "step 1 was rejected for its loss: the loss is nan" in caplog.text
    with pytest.raises(UnstableTraining, match="2 of the last 3 steps"):
        step(world, 2, world.case.poison)
    assert not differences(before, {**world.state(), "gradients": before["gradients"]})


def make(*, optimizers: int = 1) -> tuple[nn.Module, list[torch.optim.Optimizer], StepGuard]:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    parameters = [list(part.parameters()) for part in model] if optimizers == 2 else [list(model.parameters())]
    made: list[torch.optim.Optimizer] = [torch.optim.SGD(part, lr=0.1) for part in parameters]
    return model, made, StepGuard(model, made).attach()


def test_each_optimizer_steps_once_on_a_decision() -> None:
    model, (one, other), guard = make(optimizers=2)
    model(torch.ones(2, 3)).sum().backward()
    one.step()
    assert guard.ledger.steps == 1 and guard.ledger.applied == 1
    other.step()
    assert guard.ledger.steps == 1
    with pytest.raises(ConfigurationError, match="no forward pass"):
        other.step()


def test_optimizers_that_take_turns_get_a_decision_each_turn() -> None:
    model, (one, other), guard = make(optimizers=2)
    for turn, optimizer in enumerate(itertools.islice(itertools.cycle([one, other]), 6)):
        inputs = torch.full((2, 3), NAN if turn == 3 else 1.0)
        before = [parameter.clone() for parameter in model.parameters()]
        model(inputs).sum().backward()
        optimizer.step()
        same = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        moved = range(4) if turn == 3 else range(2, 4) if optimizer is one else range(2)
        assert all(same[index] for index in moved) and all(same) == (turn == 3)
        one.zero_grad()
        other.zero_grad()
    assert (guard.stats.applied, guard.stats.rejected) == (5, 1)
    assert guard._until_state_check == guard.policy.check_state_every - 4  # the last isn't noted yet


def test_a_decision_made_early_holds_for_the_step() -> None:
    model, [optimizer], guard = make()
    assert guard.attachment is not None
    for value, applied in ((1.0, True), (NAN, False)):
        before = [parameter.clone() for parameter in model.parameters()]
        model(torch.full((2, 3), value)).sum().backward()
        assert guard.attachment.decide().applied == applied
        optimizer.step(lambda: torch.ones(()))
        assert guard.attachment.losses == []
        changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert all(changed) if applied else not any(changed)
        optimizer.zero_grad()
    assert guard.stats.steps == 2


def test_an_early_decision_that_was_never_carried_out_is_no_excuse() -> None:
    model, [optimizer], guard = make()
    assert guard.attachment is not None
    model(torch.ones(2, 3)).sum().backward()
    guard.attachment.decide()
    model(torch.full((2, 3), NAN)).sum().backward()
    optimizer.step()
    assert guard.stats.rejected == 1 and all(bool(torch.isfinite(p).all()) for p in model.parameters())


class Twice(torch.optim.SGD):
    """Evaluates the loss twice."""

    def step(self, closure: Any = None) -> Any:
        closure()
        return super().step(closure)


def test_an_optimizer_that_evaluates_the_loss_again_is_refused() -> None:
    model = nn.Linear(3, 1)

    def evaluate() -> Tensor:
        loss: Tensor = model(torch.ones(2, 3)).sum()
        loss.backward()
        return loss

    optimizer = Twice(model.parameters(), lr=0.1)
    StepGuard(model, optimizer).attach()
    with pytest.raises(ConfigurationError, match="Twice evaluates the loss more than once"):
        optimizer.step(evaluate)
    with pytest.raises(ConfigurationError, match="LBFGS evaluates the loss several times"):
        StepGuard(model, torch.optim.LBFGS(model.parameters())).attach()


def test_optimizers_that_decide_together_must_be_unscaled() -> None:
    world = attached(Case(Poison("loss", NAN), precision="fp16", parameters="two optimizers"))
    assert world.scaler is not None
    world.scaler.scale(world._forward(0, 0, None)).backward()
    with pytest.raises(ConfigurationError, match=r"call scaler\.unscale_"):
        world.scaler.step(world.optimizers[0])


def test_what_an_attached_guard_refuses() -> None:
    model, _, guard = make()
    model(torch.ones(2, 3)).sum().backward()
    with pytest.raises(ConfigurationError, match=r"decides within optimizer\.step"):
        guard.step(torch.ones(()))
    with pytest.raises(ConfigurationError, match="attached already"):
        guard.attach()
    guard.remove()
    with pytest.raises(ConfigurationError, match="isn't attached"):
        guard.observe(torch.ones(()))


def test_a_removed_guard_leaves_the_loop_as_it_was() -> None:
    world = attached(Case(Poison("loss", NAN), optimizer="adamw foreach", precision="fp16"))
    [optimizer] = world.optimizers
    assert world.guard.scaler is None and optimizer._step_supports_amp_scaling  # type: ignore[attr-defined]
    step(world, 0)
    world.guard.remove()
    assert world.guard.scaler is world.scaler and not hasattr(optimizer, "_step_supports_amp_scaling")
    before = world.state()
    step(world, 1, Poison("input", NAN), "unseen")
    assert world.guard.stats.steps == 1
    assert float(world.model.middle[0].num_batches_tracked) == 2  # type: ignore[index, arg-type, union-attr]
    assert torch.equal(before["model.first.weight"], world.model.first.weight)  # the scaler's own skip
    step(world, 2, way="unseen")
    assert world.guard.stats.steps == 1
    world.guard.attach()
    assert world.guard.attachment is not None


def test_a_fused_optimizer_keeps_its_own_way_with_the_scale() -> None:
    world = attached(Case(Poison("loss", NAN), optimizer="adamw fused", precision="fp16"))
    world.guard.remove()
    assert world.optimizers[0]._step_supports_amp_scaling  # type: ignore[attr-defined]


class Counting(torch.optim.SGD):
    """Counts its steps in the group, in a tensor and a number, with or without gradients."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
            group["lr"].mul_(0.5)
        return loss


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("way", ["closure", "step"])
def test_a_step_that_calls_its_parents_is_one_step_and_counts_nothing_when_it_is_bad(bad: int, way: str) -> None:
    torch.optim.SGD([torch.zeros(1)])  # from now on torch runs the hooks for the parent's step too
    model = nn.Linear(3, 1)
    rate = torch.tensor(1.0)
    optimizer = Counting(model.parameters(), lr=rate)
    told: list[bool] = []
    guard = StepGuard(model, optimizer).attach(after_step=lambda verdict: told.append(verdict.applied))
    for position in range(3):
        optimizer.zero_grad()

        def evaluate(position: int = position) -> Tensor:
            loss: Tensor = model(torch.full((2, 3), NAN if position == bad else 1.0)).sum()
            loss.backward()
            return loss

        if way == "closure":
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()
        if position == 0:
            assert ("steps" in optimizer.param_groups[0]) == (bad != 0)
    [group] = optimizer.param_groups
    assert group["steps"] == 2 and group["lr"] is rate and float(rate) == 0.25
    assert told == [position != bad for position in range(3)]
    assert (guard.stats.applied, guard.stats.rejected) == (2, 1)


def test_the_optimizer_keeps_the_guard_alive() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    StepGuard(model, optimizer).attach()
    gc.collect()
    model(torch.full((2, 3), NAN)).sum().backward()
    optimizer.step()
    assert bool(torch.isfinite(model.weight).all())


def test_the_loop_is_told_when_a_step_is_over() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    told: list[bool] = []
    StepGuard(model, optimizer).attach(after_step=lambda verdict: told.append(verdict.applied))
    for value in (1.0, NAN, 1.0):
        model(torch.full((2, 3), value)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert told == [True, False, True]
