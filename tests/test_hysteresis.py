"""Float16 in the trainer: a lone overflow leaves the loss scale, a NaN never moves it, and neither goes on for ever."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from small import RootOfDistance, points
from stabletrain import Policy, UnstableTraining
from stabletrain.assembly import assemble
from stabletrain.checkpoint import CheckpointStore
from stabletrain.data import Splits
from stabletrain.fault import Fp16Overflow, NanGradient
from stabletrain.incident import load_incident
from stabletrain.optimizer import adamw
from stabletrain.precision import LossScaler, Precision
from stabletrain.tracking import Tracker
from stabletrain.trainer import Run, train
from stabletrain.trainer.replay import replay

QUIET = partial(Tracker, progress="none", log_every=1)
FP16 = partial(Precision, "float16", initial_scale=256.0)


def make(folder: Path, **options: Any) -> Run:
    data = points()
    if options.pop("zeros", False):
        data.inputs.zero_()
    options = {"epochs": 4, "batch_size": 16, "tracking": QUIET, "precision": FP16, "guard": Policy(), **options}
    options.setdefault("optimizer", partial(adamw, lr=1e-2))
    return assemble(RootOfDistance(), Splits(train=data), folder=folder, **options)


def scale(run: Run) -> float:
    assert run.precision.scaler is not None
    return run.precision.scaler.get_scale()


@pytest.mark.parametrize(("times", "hysteresis", "expected"), [(1, 2, 256.0), (2, 2, 128.0), (1, 1, 128.0)])
@pytest.mark.parametrize("keep_on_device", [False, True])
def test_two_overflows_lower_the_scale_and_one_does_not(
    tmp_path: Path, times: int, hysteresis: int, expected: float, keep_on_device: bool
) -> None:
    fault = Fp16Overflow(at=5, times=times)
    run = make(tmp_path, fault=fault, precision=partial(FP16, hysteresis=hysteresis))
    run.guard._keep_on_device = keep_on_device
    summary = train(run)
    assert (summary.reasons, scale(run)) == ({"overflow": times}, expected)


@pytest.mark.parametrize("on_rejection", ["salvage", "rollback"])
def test_a_nan_in_every_sample_does_not_move_the_scale_and_ends(tmp_path: Path, on_rejection: str) -> None:
    run = make(tmp_path, zeros=True, guard=Policy(on_rejection=on_rejection, max_rejected=2))  # type: ignore[arg-type]
    with pytest.raises(UnstableTraining, match="3 of the last 3 steps were rejected"):
        train(run)
    assert scale(run) == 256.0
    assert set(run.guard.ledger.reasons) == {"gradient"}
    incident = load_incident(tmp_path / "incidents" / "000000000")
    outcome = replay(run, incident)
    assert (incident.reason, outcome.reproduces(incident)) == ("gradient", "yes")


def test_a_nan_in_every_sample_is_not_skipped_for_ever(tmp_path: Path) -> None:
    run = make(tmp_path, zeros=True, epochs=34)
    with pytest.raises(UnstableTraining, match="11 of the last 19 steps were rejected"):
        train(run)
    assert scale(run) == 1.0


def test_a_nan_gradient_every_few_steps_is_not_skipped_for_ever(tmp_path: Path) -> None:
    class EveryFourth(NanGradient):
        def _happens(self, steps: int) -> bool:
            return steps >= 10 and steps % 4 == 0

    run = make(tmp_path, fault=EveryFourth(at=10, times=200), epochs=34)
    with pytest.raises(UnstableTraining, match="rejected, more than the 10 allowed"):
        train(run)
    assert 1.0 <= scale(run) <= 256.0


@pytest.mark.parametrize("stop_after", [6, 7])
def test_a_run_stopped_between_two_overflows_continues_with_its_patience_spent(tmp_path: Path, stop_after: int) -> None:
    class Killed(BaseException):
        pass

    class Two(Fp16Overflow):
        def _happens(self, steps: int) -> bool:
            return steps in (6, 9)

    options = {"fault": Two(at=6), "checkpoint": partial(CheckpointStore, every_updates=1)}
    run = make(tmp_path, **options)
    write = run.tracker.step

    def step(record: Any) -> None:
        write(record)
        if record["steps"] == stop_after + 2:  # one later, so that the checkpoint after it exists
            raise Killed

    run.tracker.step = step  # type: ignore[method-assign]
    with pytest.raises(Killed):
        train(run)
    again = make(tmp_path, **options)
    train(again)
    assert scale(again) == 128.0


def test_a_rollback_brings_back_the_patience(tmp_path: Path) -> None:
    """The lone overflow lies after the copy that is returned to, so the one after the rollback is a lone one again."""
    run = make(tmp_path, fault=Fp16Overflow(at=7, times=1), guard=Policy(on_rejection="rollback", snapshot_every=6))
    assert run.rollback is not None
    seen: list[tuple[int, int]] = []
    write = run.tracker.step

    def step(record: Any) -> None:
        write(record)
        assert run.precision.scaler is not None and run.rollback is not None
        if record["steps"] == 9:
            seen.append((run.precision.state_dict()["patience"], run.rollback.count))
            run.rollback.go_back(run, UnstableTraining("why."))
            seen.append((run.precision.state_dict()["patience"], run.rollback.count))

    run.tracker.step = step  # type: ignore[method-assign]
    train(run)
    assert seen == [(0, 0), (1, 1)]


def test_a_scale_that_was_raised_has_its_level_to_find_again() -> None:
    scaler = LossScaler("cpu", init_scale=8.0)
    weight = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def scale_after(gradient: float) -> float:
        weight.grad = scaler.scale(torch.tensor([gradient]))  # type: ignore[assignment]
        scaler.unscale_(optimizer)
        scaler.update()
        return scaler.get_scale()

    scaler.raise_to(4.0)
    assert scale_after(1.0) == 8.0
    scaler.raise_to(32.0)
    assert [scale_after(gradient) for gradient in (math.inf, 1.0, math.inf, 1.0)] == [16.0, 16.0, 16.0, 16.0]
    unused = LossScaler("cpu", init_scale=8.0)
    unused.raise_to(32.0)
    assert float(unused.scale(torch.ones(()))) == 32.0
