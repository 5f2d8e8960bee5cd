"""Clipping, optimizer and schedule within a run: what they remember is saved, rolled back and never poisoned."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from small import Normalised, points
from stabletrain import Policy, assemble, train
from stabletrain.checkpoint import CheckpointStore
from stabletrain.clipping import AdaGC, AutoClip, ZClip
from stabletrain.data import split_dataset
from stabletrain.fault import NanGradient, NanValidation, NanWeight
from stabletrain.optimizer import adamw, lion, muon
from stabletrain.schedule import Plateau
from stabletrain.trainer import Run
from test_contract import same

CLIPS: dict[str, Any] = {
    "zclip": lambda: ZClip(warmup=4),
    "autoclip": lambda: AutoClip(percentile=60.0, history=9),
    "adagc": lambda: AdaGC(warmup=4),
}
WATCHING = partial(Plateau, patience=0, factor=0.5, threshold=0.2, warmup_updates=2)


def make(folder: Path | None = None, **options: Any) -> Run:
    settings: dict[str, Any] = {
        "epochs": 6,
        "batch_size": 16,
        "optimizer": partial(muon, lr=1e-2),
        "schedule": WATCHING,
        "clipping": ZClip(warmup=4),
        "device": "cpu",
    }
    data = split_dataset(points(), seed=0)
    return assemble(Normalised(), data, folder=folder, **{**settings, **options})


def states(run: Run) -> list[Any]:
    assert isinstance(run.schedule, Plateau)
    parts = (run.model, run.optimizer, run.schedule, run.guard.clipper)
    return [part.state_dict() for part in parts]


@pytest.mark.parametrize("name", CLIPS)
def test_a_run_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    kinds = {"zclip": muon, "autoclip": lion, "adagc": adamw}
    options: dict[str, Any] = {"optimizer": partial(kinds[name], lr=1e-2)}
    whole = make(tmp_path / "whole", clipping=CLIPS[name](), **options)
    train(whole)
    first = make(tmp_path / "cut", clipping=CLIPS[name](), **options)
    first.epochs = 3
    train(first)
    second = make(tmp_path / "cut", clipping=CLIPS[name](), **options)
    train(second)
    assert second.progress.updates == whole.progress.updates > first.progress.updates
    for one, other in zip(states(whole), states(second), strict=True):
        assert one and same(one, other)
    assert isinstance(whole.schedule, Plateau)
    assert whole.schedule.state_dict()["level"] < 1.0, "the validation never stood still, so nothing is shown"


def test_a_validation_of_nan_leaves_the_plateau_alone() -> None:
    """What isn't finite counts neither as progress nor as its lack."""
    spoiled = make(fault=NanValidation(at=18), guard=Policy(on_rejection="skip"))
    said: list[Any] = []
    observe = type(spoiled.schedule).observe

    def noted(self: Any, metrics: Any) -> str | None:
        before = self.state_dict()
        line = observe(self, metrics)
        said.append((metrics["loss"], before == self.state_dict()))
        return line

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(spoiled.schedule), "observe", noted)
        train(spoiled)
    missing = [unchanged for loss, unchanged in said if not math.isfinite(loss)]
    assert missing and all(missing)
    assert any(not unchanged for loss, unchanged in said if math.isfinite(loss))


def test_a_rollback_takes_back_what_clipping_has_learned() -> None:
    policy = Policy(on_rejection="rollback", snapshot_every=2, max_rejected=0, check_state_every=1)
    run = make(guard=policy, fault=NanWeight(at=14))
    rollback = run.rollback
    assert rollback is not None
    seen: list[Any] = []
    go_back = rollback.go_back

    def noted(*arguments: Any, **keywords: Any) -> None:
        kept = rollback.kept()
        assert kept is not None
        go_back(*arguments, **keywords)
        assert isinstance(run.schedule, Plateau)
        seen.append(
            same([kept["clipping"], kept["schedule"]], [run.guard.clipper.state_dict(), run.schedule.state_dict()])
        )

    rollback.go_back = noted  # type: ignore[method-assign]
    summary = train(run)
    assert summary.rolled_back >= 1 and summary.finite["parameters"]
    assert len(seen) == summary.rolled_back and all(seen)


def test_the_step_is_the_same_with_a_poisoned_one_in_between() -> None:
    """Under every adaptive clipping: the memory of a run with rejected steps holds applied norms alone."""
    for make_clip in CLIPS.values():
        run = make(clipping=make_clip(), fault=NanGradient(at=7), schedule=WATCHING)
        summary = train(run)
        assert summary.rejected >= 1
        memory = run.guard.clipper.state_dict()["memory"]
        finite = [tensor for name, tensor in memory.items() if isinstance(tensor, torch.Tensor) and name != "norms"]
        assert all(bool(torch.isfinite(tensor).all()) for tensor in finite)
        if "norms" in memory:
            assert int(memory["seen"]) == summary.updates


def test_an_older_checkpoint_without_groups_or_memory_is_taken_over(tmp_path: Path) -> None:
    """As a version wrote it that knew one group of parameters, and nothing that schedules or clippings remember."""
    first = make(tmp_path / "old", optimizer=partial(adamw, lr=1e-2, no_decay=[]), guard=Policy())
    first.epochs = 3
    train(first)
    latest = CheckpointStore(tmp_path / "old").latest()
    assert latest is not None and latest["schedule"] and latest["guard"]["clipping"]
    second = make(tmp_path / "old", optimizer=partial(adamw, lr=1e-2), guard=Policy())
    assert len(second.optimizer.param_groups) == 2 > len(first.optimizer.param_groups)
    train(second)
    assert second.progress.updates == 2 * first.progress.updates
    assert any("optimizer.weight_decay 0.01 -> 0.0" in note for note in second.notes)


def test_what_is_doubtful_stands_in_the_notes() -> None:
    run = make(optimizer=partial(adamw, lr=2.0, weight_decay=0.5))
    assert any("weight decay that takes away more than there is: learning rate 2 * " in note for note in run.notes)
    assert not any("weight decay" in note for note in make().notes)


def test_a_model_of_a_users_own_optimizer_still_gets_its_parameters() -> None:
    run = make(optimizer=partial(torch.optim.SGD, lr=0.1))
    assert isinstance(run.model, nn.Module)
    assert [p.shape for g in run.optimizer.param_groups for p in g["params"]] == [
        p.shape for p in run.model.parameters()
    ]
