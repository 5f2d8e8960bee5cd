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
from stabletrain.clipping import NoClipping
from stabletrain.data import ArrayDataset, Splits
from stabletrain.optimizer import adamw, sgd
from stabletrain.schedule import Constant
from stabletrain.task import Classification, Output
from stabletrain.tracking import Tracker
from stabletrain.trainer import Run, train
from stabletrain.trainer.resume import resume, save
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
        "schedule": Constant,
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
    run.rollback.begin(run)
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
    run.rollback.begin(run)
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
    events=st.lists(st.tuples(st.integers(1, 300), st.sampled_from(["disturb", "lower", "blame"])), max_size=20),
    backoff=st.floats(0.1, 1.0),
    recover=st.integers(1, 100),
)
def test_the_factor_comes_back_but_not_to_what_was_to_blame(
    events: list[tuple[int, str]], backoff: float, recover: int
) -> None:
    rollback = Rollback(Policy(backoff=backoff, recover=recover, rewarm=0))
    update, ceiling, lowered_to = 0, 1.0, 1.0
    for passed, event in events:
        update += passed
        level = rollback.factor(update)
        assert 0 < level <= ceiling * (1 + 1e-9)
        if event == "disturb":
            rollback.disturbed(update)
            continue
        if event == "blame" or level > lowered_to:
            ceiling = min(ceiling, level * backoff)
        rollback.lower(update, blame_rate=event == "blame")
        lowered_to = rollback.factor(update)
        assert lowered_to == pytest.approx(level * backoff)
    assert rollback.factor(update + 10**9) == pytest.approx(ceiling if backoff < 1 else 1.0)


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
    assert "measured again, it is finite" in said[0]


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


def lowered(run: Run, *, after: int, blame_rate: bool = True) -> float:
    """Roll back so many updates after the last time, and return the level of the rate."""
    assert run.rollback is not None
    run.progress.updates += after
    run.rollback.go_back(run, UnstableTraining("why."), blame_rate=blame_rate)
    return run.rollback.factor(run.progress.updates + run.rollback.policy.rewarm)


@pytest.mark.parametrize(
    ("after", "blame_rate", "levels"),
    [
        (30, True, [1 / 2, 1 / 8, 1 / 64, 1 / 1024]),  # each soon after the one before
        (30, False, [1 / 2, 1 / 4, 1 / 8, 1 / 16]),
        (300, True, [1 / 2, 1 / 4, 1 / 8, 1 / 16]),
    ],
)
def test_rollbacks_in_a_row_lower_the_rate_by_more(
    tmp_path: Path, after: int, blame_rate: bool, levels: list[float]
) -> None:
    run = make(tmp_path, guard=Policy(on_rejection="rollback", rewarm=4, recover=10**6))
    assert run.rollback is not None
    run.rollback.begin(run)
    run.tracker.begin({}, {}, None, run.progress)
    assert [lowered(run, after=after, blame_rate=blame_rate) for _ in levels] == levels


@pytest.mark.parametrize(("blame_rate", "highest"), [(True, 0.5), (False, 1.0)])
def test_calm_does_not_give_back_a_rate_that_is_to_blame(tmp_path: Path, blame_rate: bool, highest: float) -> None:
    run = make(tmp_path, guard=Policy(on_rejection="rollback", recover=10))
    assert run.rollback is not None
    run.rollback.begin(run)
    run.tracker.begin({}, {}, None, run.progress)
    lowered(run, after=30, blame_rate=blame_rate)
    assert run.rollback.factor(10**6) == highest
    again = Rollback(run.rollback.policy)
    again.load_state_dict(run.rollback.state_dict(0))
    assert again.factor(10**6) == highest


def test_a_rate_that_had_risen_again_is_to_blame(tmp_path: Path) -> None:
    run = make(tmp_path, guard=Policy(on_rejection="rollback", recover=10))
    assert run.rollback is not None
    run.rollback.begin(run)
    run.tracker.begin({}, {}, None, run.progress)
    lowered(run, after=30, blame_rate=False)
    lowered(run, after=25, blame_rate=False)  # in which it rose to the whole of it
    assert run.rollback.factor(10**6) == 0.5


def diverge(run: Run) -> None:
    """Let the loss stay high until the detector isn't at ease."""
    assert run.rollback is not None
    for loss in [1.0] * 40 + [50.0] * 30:
        run.rollback._divergence.observe(loss)
    assert not run.rollback._divergence.at_ease


def test_what_was_learned_on_the_way_into_trouble_is_forgotten(tmp_path: Path) -> None:
    run = make(tmp_path)
    assert run.rollback is not None
    for _ in range(12):
        run.guard.spikes.accept(loss=1.0, grad_norm=1.0)
    run.rollback._divergence.observe(1.0)
    run.rollback.begin(run)
    limits, detector = run.guard.spikes.limits(), run.rollback._divergence.state_dict()
    for _ in range(12):
        run.guard.spikes.accept(loss=50.0, grad_norm=500.0)
    diverge(run)
    run.tracker.begin({}, {}, None, run.progress)
    run.rollback.go_back(run, UnstableTraining("why."))
    assert (run.guard.spikes.limits(), run.rollback._divergence.state_dict()) == (limits, detector)


def test_a_checkpoint_in_the_middle_of_trouble_keeps_the_state_to_return_to(tmp_path: Path) -> None:
    """Else the copy would be the state in trouble, and a resumed run would have nothing else."""
    run = make(tmp_path, checkpoint=CheckpointStore)
    assert run.rollback is not None
    weight = next(iter(run.model.parameters()))
    healthy = weight.detach().clone()
    run.rollback.begin(run)
    run.tracker.begin({}, {}, None, run.progress)
    with torch.no_grad():
        weight.add_(1.0)
    run.progress.updates = 60
    diverge(run)
    save(run)
    assert run.folder is not None and run.checkpoint is not None
    run.checkpoint.wait()
    run.folder.__exit__(None, None, None)
    again = make(tmp_path, checkpoint=CheckpointStore)
    resume(again)
    again.tracker.begin({}, {}, None, again.progress)
    for one in (run, again):
        assert one.rollback is not None and one.progress.updates == 60
        loaded = next(iter(one.model.parameters()))
        assert torch.equal(loaded, healthy + 1.0)
        one.rollback.go_back(one, UnstableTraining("why."))
        assert torch.equal(loaded, healthy)
        assert one.progress.updates == 0


class Squares:
    """Least squares, which plain descent leaves exponentially above a certain rate."""

    def step(self, model: nn.Module, data: Any) -> Output:
        inputs, targets = data
        return Output((model(inputs).squeeze(1) - targets).square().sum(), float(len(targets)))

    def evaluate(self, model: nn.Module, loader: Any) -> dict[str, float]:
        outputs = [self.step(model, batch.data) for batch in loader]
        return {"loss": sum(float(output.loss_sum) for output in outputs) / sum(output.weight for output in outputs)}


@pytest.mark.parametrize("guard", ["none", "rollback"])
def test_a_rate_that_is_100_times_too_high_is_left_behind(tmp_path: Path, guard: str) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(96, 5)
    data = ArrayDataset(inputs, inputs @ torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0]))
    run = assemble(
        nn.Linear(5, 1),
        Splits(train=data, validation=data),
        task=Squares(),
        epochs=60,
        batch_size=16,
        optimizer=partial(sgd, lr=10.0, momentum=0.0),
        schedule=Constant,
        clipping=NoClipping(),
        guard=Policy(on_rejection=guard, spikes=True),  # type: ignore[arg-type]
        tracking=QUIET,
        folder=tmp_path,
    )
    summary = train(run)
    assert (summary.metrics["final"]["loss"] < 1e-3) == (guard == "rollback")
    assert summary.finite["parameters"] == (guard == "rollback")
    assert 2 <= summary.rolled_back <= 5 or guard == "none"
