"""A loss with a state of its own: judged, undone, saved and taken up again like the model's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import composed
from loss_cases import memory_on_ranks
from ranks import run_ranks
from stabletrain.assembly import assemble
from stabletrain.checkpoint import CheckpointStore
from stabletrain.checkpoint.health import unhealthy_names
from stabletrain.data import ArrayDataset, Splits
from stabletrain.doctor.before.observe import observe
from stabletrain.doctor.before.subject import Subject
from stabletrain.errors import Interrupted, UnstableTraining
from stabletrain.guard import Policy, StepGuard
from stabletrain.incident import incident_folders, load_incident
from stabletrain.loss import TEMI, CrossEntropy, InfoNCE, Loss
from stabletrain.task import Supervised
from stabletrain.tracking import Tracker
from stabletrain.trainer import Run, loop, train
from stabletrain.trainer.replay import at_incident, replay
from stabletrain.trainer.resume import resume
from stabletrain.trainer.rollback import copied, learned_state
from stabletrain.trainer.run import Step
from stabletrain.trainer.step import forward_backward
from trees import differences


def views(bad: int | None = None) -> ArrayDataset:
    samples = composed.Samples("views")
    inputs = samples.inputs.clone()
    if bad is not None:
        inputs[bad, 0, 0] = math.nan
    return ArrayDataset(inputs, samples.answers)


def make(folder: Path | None, *, data: ArrayDataset | None = None, loss: Loss | None = None, **options: Any) -> Run:
    torch.manual_seed(0)
    model = options.pop("model", None) or (composed.EachStep() if isinstance(loss, InfoNCE) else composed.Clusters())
    defaults: dict[str, Any] = {
        "epochs": 2,
        "batch_size": 12,
        "accumulate": 2,
        "device": "cpu",
        "folder": folder,
        "tracking": lambda folder: Tracker(folder, progress="none", tensorboard=False),
    }
    splits = Splits(data or views(), views(), None)
    return assemble(model, splits, task=Supervised(loss or TEMI(3, heads=2)), **{**defaults, **options})


def state(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = copied({**learned_state(run), "progress": run.progress.state_dict()})
    return found


@pytest.mark.parametrize("on_device", [False, True])
def test_a_rejected_step_leaves_the_marginal_bitwise_as_it_was(on_device: bool) -> None:
    torch.manual_seed(0)
    model, loss = composed.Clusters(), TEMI(3, heads=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    guard = StepGuard([model, loss], optimizer, keep_on_device=on_device)
    inputs = views().inputs

    def step(inputs: Tensor) -> bool:
        for part in inputs.split(6):  # the bad one comes second, when the marginal has moved
            values, _ = loss(model(part))
            values.mean().backward()
        return guard.step(values.mean()).applied

    assert step(inputs[:12])
    before = loss.marginal.clone()
    bad = inputs[12:24].clone()
    bad[9, 0] = math.nan
    assert not step(bad)
    guard.settle()
    assert torch.equal(loss.marginal, before)
    assert step(inputs[24:36])
    assert not torch.equal(loss.marginal, before)


def test_an_incident_holds_it_and_its_replay_leaves_the_run_alone(tmp_path: Path) -> None:
    run = make(tmp_path, data=views(bad=7))
    summary = train(run)
    assert (summary.status, summary.rejected) == ("completed", 2)
    assert summary.finite == {"parameters": True, "buffers": True, "optimizer": True}
    assert run.guard.models == [run.model, run.objective]
    before = state(run)
    assert len(incident_folders(tmp_path)) == 2
    for folder in incident_folders(tmp_path):
        incident = load_incident(folder)
        assert incident.state is not None
        assert list(incident.state["loss"]) == ["marginal"]
        with at_incident(run, incident):
            assert torch.equal(run.objective.marginal, incident.state["loss"]["marginal"])
        assert replay(run, incident).reproduces(incident) == "yes"
    assert differences(state(run), before) == []


def test_a_step_is_salvaged_with_the_marginal_of_its_good_samples(tmp_path: Path) -> None:
    bad = make(tmp_path / "bad", data=views(bad=7), epochs=1, guard=Policy(on_rejection="salvage"))
    assert train(bad).salvaged == 1
    order = bad.loader.order(0).tolist()
    step = order.index(7) // 12
    clean = make(tmp_path / "clean", epochs=1)
    begun = forward_backward

    def without(run: Run, now: Step, **options: Any) -> list[Tensor]:
        if now.index == step:
            kept = [microbatch.indices[microbatch.indices != 7] for microbatch in now.microbatches]
            now.microbatches = [run.loader.read(indices.tolist(), 0) for indices in kept]
        return begun(run, now, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "forward_backward", without)
        train(clean)
    assert differences(bad.objective.state_dict(), clean.objective.state_dict()) == []
    assert differences(bad.model.state_dict(), clean.model.state_dict()) == []


@pytest.mark.parametrize("learned", [False, True])
def test_a_resumed_run_ends_at_the_same_bits(tmp_path: Path, learned: bool) -> None:
    def made(name: str) -> Run:
        return make(tmp_path / name, loss=InfoNCE(learnable=True) if learned else None)

    whole, first = made("whole"), made("parts")
    start = state(whole)["loss"]
    train(whole)
    assert differences(state(whole)["loss"], start) != []
    evaluate = first.task.evaluate

    def stopping(*arguments: Any, **keywords: Any) -> dict[str, float]:
        first.signals.received, first.signals.name = True, "SIGTERM"
        return evaluate(*arguments, **keywords)

    first.task.evaluate = stopping  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        train(first)
    saved = CheckpointStore(tmp_path / "parts").latest()
    assert saved is not None
    assert list(saved["loss"]) == (["log_temperature"] if learned else ["marginal"])
    again = made("parts")
    train(again)
    assert differences(state(again), state(whole)) == []


def test_a_rollback_brings_it_back(tmp_path: Path) -> None:
    run = make(tmp_path, guard=Policy(on_rejection="rollback"))
    assert run.rollback is not None
    run.rollback.begin(run)
    before = copied(run.objective.state_dict())
    run.objective.marginal.fill_(0.5)
    run.rollback.go_back(run, UnstableTraining("a test"))
    assert differences(copied(run.objective.state_dict()), before) == []


def test_a_run_with_another_loss_begins_with_that_ones_state(tmp_path: Path) -> None:
    train(make(tmp_path, epochs=1))
    run = make(tmp_path, loss=TEMI(2, heads=2))
    resume(run)
    assert any("TEMI begins anew" in note for note in run.notes)
    assert torch.equal(run.objective.marginal, torch.full((2, 2), 0.5))
    assert run.folder is not None
    run.folder.close()
    # What it trains besides begins anew in the optimizer too; the model's parameters keep what it remembers of them.
    run = make(tmp_path, loss=InfoNCE(learnable=True), model=composed.Clusters())
    resume(run)
    names = {parameter: name for name, parameter in run.trained.named_parameters()}
    assert {names[parameter] for parameter in run.optimizer.state} == {"student.weight", "student.bias"}
    assert "loss.log_temperature" in names.values()


def test_a_checkpoint_with_a_marginal_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.objective.marginal[0, 0] = math.nan
    assert "loss.marginal" in str(unhealthy_names({"state.pt": learned_state(run)}, ()))


def test_the_doctor_looks_at_a_copy(tmp_path: Path) -> None:
    run = make(tmp_path)
    subject = Subject(run, {})
    before = state(run)
    seen = observe(subject, subject.batch(), run.precision)
    assert seen.error is None
    assert math.isfinite(seen.loss)
    assert differences(state(run), before) == []
    assert not run.guard.begun


def test_a_loss_without_memory_changes_no_checkpoint(tmp_path: Path) -> None:
    run = make(tmp_path, loss=CrossEntropy(), model=composed.EachStep())
    assert run.objective is None
    assert "loss" not in learned_state(run)


def test_ranks_begin_and_save_with_the_first_ones_memory() -> None:
    ((first, second),) = run_ranks(memory_on_ranks, 2, [""])
    assert not torch.equal(first["after training"], second["after training"])  # each has seen samples of its own
    for place in ("in a step", "to be saved"):
        assert torch.equal(first[place], second[place])
        assert torch.equal(first[place], first["after training"])
    assert "loss.learnable=false" in first["said"]
