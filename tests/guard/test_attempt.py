"""A rejected step that is run again: judged without being counted, and committed only when that is wanted."""

from __future__ import annotations

import math

import pytest
import torch

from stabletrain.errors import ConfigurationError, UnstableTraining
from stabletrain.guard import Policy

from .worlds import Case, Poison, World, differences

NAN = math.nan
MODELS = ("batch norm", "embedding with max_norm", "parameter changed through .data")
POLICY = Policy(on_rejection="salvage", max_rejected=0, spikes=True)


def prepared(model: str = "batch norm", precision: str = "fp32") -> World:
    """Build a world that has made twelve steps."""
    world = World(Case(Poison("input", NAN), model, "fused adamw", precision), policy=POLICY)
    for position in range(12):
        assert world.step(position).applied
    return world


def run(world: World, position: int, poison: Poison | None = None) -> torch.Tensor:
    loss = world._forward(position, 0, poison)
    (loss if world.scaler is None else world.scaler.scale(loss)).backward()
    return loss.detach()


@pytest.mark.parametrize(
    ("poison", "reasons"),
    [
        (None, {None}),
        (Poison("input", NAN), {"loss"}),
        (Poison("gradient", NAN), {"gradient", "overflow"}),
        (Poison("loss", 1e6), {"spike"}),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("model", MODELS)
def test_an_attempt_that_is_not_committed_never_happened(
    model: str, precision: str, poison: Poison | None, reasons: set[str | None]
) -> None:
    world = prepared(model, precision)
    before, counted = world.state(), world.guard.state_dict()
    with world._spoiled_gradient(poison):
        loss = run(world, 12, poison)
    assert world.guard.begun
    facts = world.guard.attempt(loss, commit=poison is not None)
    assert facts.reason in reasons and not world.guard.begun
    assert not differences(before, world.state()) and world.guard.state_dict() == counted
    assert world.step(13).applied


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("model", MODELS)
def test_a_committed_attempt_is_a_step_that_is_not_counted(model: str, precision: str) -> None:
    world, other = prepared(model, precision), prepared(model, precision)
    assert other.step(12).applied
    assert world.guard.attempt(run(world, 12), commit=True).reason is None
    assert not differences(world.state(), other.state())
    assert world.guard.spikes.state_dict() == other.guard.spikes.state_dict()
    assert (world.guard.stats.steps, other.guard.stats.steps) == (12, 13)


@pytest.mark.parametrize("model", MODELS)
def test_what_was_begun_can_be_discarded(model: str) -> None:
    world = prepared(model, "fp16")
    before, counted = world.state(), world.guard.state_dict()
    run(world, 12)
    assert differences(before, world.state())
    world.guard.discard()
    assert not differences(before, world.state()) and world.guard.state_dict() == counted and not world.guard.begun


def test_an_attempt_needs_a_forward_pass() -> None:
    world = prepared()
    with pytest.raises(ConfigurationError, match="no forward pass"):
        world.guard.attempt(torch.tensor(1.0), commit=True)


def test_only_a_plain_loop_is_stopped_by_the_guard_itself() -> None:
    world = prepared()
    for position in range(12, 20):
        assert not world.step(position, world.case.poison).applied
    stopped = World(world.case, policy=Policy(max_rejected=0))
    with pytest.raises(UnstableTraining):
        stopped.step(0, world.case.poison)
