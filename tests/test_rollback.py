"""Rollback: back to the last healthy state, at a lower rate, a limited number of times."""

from __future__ import annotations

import json
import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from stabletrain import Policy, UnstableTraining
from stabletrain.assembly import assemble
from stabletrain.checkpoint import CheckpointStore
from stabletrain.data import ArrayDataset, Splits
from stabletrain.optimizer import adamw
from stabletrain.schedule import constant
from stabletrain.task import Classification
from stabletrain.tracking import Tracker
from stabletrain.trainer import Run, train
from stabletrain.trainer.rollback import Rollback

QUIET = partial(Tracker, progress="none", log_every=1)


def make(folder: Path, **options: Any) -> Run:
    torch.manual_seed(0)
    targets = torch.arange(96) % 3
    data = ArrayDataset(torch.randn(96, 5) + targets[:, None], targets)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    options = {
        "epochs": 4,
        "batch_size": 16,
        "optimizer": partial(adamw, lr=1e-2),
        "schedule": constant,
        "tracking": QUIET,
        "guard": Policy(on_rejection="rollback", snapshot_every=3, max_rejected=2, rewarm=4, recover=6),
        **options,
    }
    return assemble(model, Splits(train=data, validation=data), folder=folder, **options)


def damage(run: Run, at: int, how: Any) -> None:
    """Let something happen to a healthy run after its step `at`."""
    note = run.tracker.step

    def step(record: Any) -> None:
        note(record)
        if record["steps"] == at:
            how(run)

    run.tracker.step = step  # type: ignore[method-assign]


def nan_in_the_optimizer(run: Run) -> None:
    state = run.optimizer.state[next(iter(run.model.parameters()))]
    state["exp_avg"].view(-1)[0] = math.nan
    run.guard._until_state_check = 0


def nan_in_the_weights(run: Run) -> None:
    with torch.no_grad():
        next(iter(run.model.parameters())).view(-1)[0] = math.nan


@pytest.mark.parametrize("how", [nan_in_the_optimizer, nan_in_the_weights])
def test_a_ruined_state_is_left_behind(tmp_path: Path, how: Any, caplog: pytest.LogCaptureFixture) -> None:
    run = make(tmp_path)
    damage(run, 8, how)
    with caplog.at_level(logging.WARNING):
        summary = train(run)
    assert (summary.status, summary.rolled_back) == ("completed", 1)
    assert summary.finite == {"parameters": True, "buffers": True, "optimizer": True}
    assert summary.metrics["final"]["accuracy"] > 0.5
    [line] = [record.getMessage() for record in caplog.records if "rolled back to update" in record.getMessage()]
    assert "rollback 1 of 5" in line
    assert "now at 0.5 of its plan" in line
    rates = [float(row.split(",")[6]) for row in (tmp_path / "steps.csv").read_text().splitlines()[1:]]
    assert min(rates) == pytest.approx(1e-2 * 0.5 * 0.1)  # warmed up again from a tenth
    assert rates[-1] == pytest.approx(1e-2)  # and given back in calm


def test_after_two_rollbacks_the_state_is_the_same(tmp_path: Path) -> None:
    run = make(tmp_path)
    assert run.rollback is not None
    run.rollback.keep(run)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    run.tracker.begin({}, {}, None, run.progress)
    for _ in range(2):
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.add_(1.0)
        for parameter in run.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        run.optimizer.step()
        run.rollback.go_back(run, UnstableTraining("why."))
        after = run.model.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert not run.optimizer.state_dict()["state"]
    assert run.rollback.count == 2


def test_a_state_that_is_not_finite_is_never_kept(tmp_path: Path) -> None:
    run = make(tmp_path)
    assert run.rollback is not None
    nan_in_the_weights(run)
    run.rollback.keep(run)
    run.tracker.begin({}, {}, None, run.progress)
    with pytest.raises(UnstableTraining, match=r"why\. No healthy state was there to return to"):
        run.rollback.go_back(run, UnstableTraining("why."))


def test_too_many_rollbacks_stop_the_run_with_what_was_tried(tmp_path: Path) -> None:
    policy = Policy(on_rejection="rollback", snapshot_every=1, max_rejected=0, max_rollbacks=2)
    run = make(tmp_path, guard=policy)
    note = run.tracker.step

    def step(record: Any) -> None:
        note(record)
        if record["steps"] >= 5:
            nan_in_the_weights(run)

    run.tracker.step = step  # type: ignore[method-assign]
    with pytest.raises(UnstableTraining, match=r"2 rollbacks were tried, the learning rate is at 0.25 of its plan"):
        train(run)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["rolled_back"]) == ("stopped_unstable", 2)


@given(
    events=st.lists(st.tuples(st.integers(1, 300), st.booleans()), max_size=20),
    backoff=st.floats(0.1, 1.0),
    recover=st.integers(1, 100),
)
def test_the_factor_stays_between_0_and_1_and_comes_back(
    events: list[tuple[int, bool]], backoff: float, recover: int
) -> None:
    rollback = Rollback(Policy(backoff=backoff, recover=recover, rewarm=10))
    update = 0
    for passed, lowers in events:
        update += passed
        (rollback.lower if lowers else rollback.disturbed)(update)
        assert 0 < rollback.factor(update) <= 1
    assert rollback.factor(update + recover * (len(events) + 1) + 10) == pytest.approx(1.0)


class BadValidation(Classification):
    """Validation turns NaN in the second epoch, whatever the weights."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__(loss)
        self.calls = 0

    def evaluate(self, model: nn.Module, loader: Any) -> dict[str, float]:
        self.calls += 1
        return {"loss": math.nan if self.calls == 2 else 0.5}


@pytest.mark.parametrize("reaction", ["warn", "rollback", "stop"])
def test_a_validation_that_is_not_finite(tmp_path: Path, reaction: str, caplog: pytest.LogCaptureFixture) -> None:
    from stabletrain.loss import CrossEntropy

    policy = Policy(on_rejection="rollback", snapshot_every=3, on_bad_validation=reaction)  # type: ignore[arg-type]
    run = make(tmp_path, guard=policy, task=BadValidation(CrossEntropy()))
    with caplog.at_level(logging.WARNING):
        if reaction == "stop":
            with pytest.raises(UnstableTraining, match=r"guard\.on_bad_validation=stop stops the run"):
                train(run)
        else:
            assert train(run).rolled_back == int(reaction == "rollback")
    said = [record.getMessage() for record in caplog.records if "validation is not finite" in record.getMessage()]
    assert "in float32 it is finite" in said[0]


def test_bad_validation_samples_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train_data = ArrayDataset(torch.zeros(16, 2), torch.arange(16) % 2)
    inputs = torch.zeros(300, 2)
    inputs[[17, 280]] = 10.0
    validation = ArrayDataset(inputs, torch.arange(300) % 2)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, values: Tensor) -> Tensor:
            logits: Tensor = self.layer(values) + torch.where(values > 9, math.nan, 0.0).sum(1, keepdim=True)
            return logits

    with caplog.at_level(logging.WARNING):
        train(
            assemble(
                Model(),
                Splits(train=train_data, validation=validation),
                epochs=1,
                batch_size=8,
                tracking=QUIET,
                folder=tmp_path,
            )
        )
    [said] = [record.getMessage() for record in caplog.records if "validation is not finite" in record.getMessage()]
    assert said.endswith("not finite on their own: 17, 280")
    [incident] = (tmp_path / "incidents").iterdir()
    verdict = json.loads((incident / "verdict.json").read_text())
    assert (verdict["kind"], [sample["index"] for sample in verdict["samples"]]) == ("validation", [17, 280])


def test_a_resumed_run_keeps_level_and_count(tmp_path: Path) -> None:
    run = make(tmp_path, checkpoint=partial(CheckpointStore, every_updates=1))
    damage(run, 8, nan_in_the_weights)
    train(run)
    again = make(tmp_path, epochs=5)
    summary = train(again)
    assert summary.rolled_back == 1
