"""Raising batch size and learning rate step by step, and validating only after a while."""

from __future__ import annotations

import csv
import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from composed import checked
from small import Normalised, points
from stabletrain import ConfigurationError, Policy
from stabletrain.assembly import assemble
from stabletrain.build import build
from stabletrain.checkpoint import CheckpointStore
from stabletrain.data import ArrayDataset, Loader, Splits
from stabletrain.ema import ExponentialMovingAverage
from stabletrain.fault import NanLoss
from stabletrain.optimizer import adamw
from stabletrain.ramp import Ramp, Stage
from stabletrain.schedule import Cosine
from stabletrain.tracking import Tracker
from stabletrain.trainer import Run, train

QUIET = partial(Tracker, progress="none", log_every=1)
STAGES = [{"epoch": 2, "batch_size": 24, "lr": 2.0}, {"epoch": 3, "batch_size": 50}, {"epoch": 5, "lr": 3.0}]


def make(folder: Path | None, **options: Any) -> Run:
    data = points(100)
    options = {
        "epochs": 7,
        "batch_size": 16,
        "tracking": QUIET,
        "ramp": STAGES,
        "schedule": partial(Cosine, warmup_updates=3),
        "ema": ExponentialMovingAverage,
        **options,
    }
    optimizer = partial(adamw, lr=1e-2)
    return assemble(Normalised(), Splits(train=data, validation=data), folder=folder, optimizer=optimizer, **options)


def history(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "history.csv").read_text().splitlines()))


def sizes(folder: Path) -> list[int]:
    return [int(row["batch_size"]) for row in history(folder)]


def test_batches_and_rates_rise_and_memory_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path, tracking=partial(Tracker, progress="lines", log_every=1))
    planned = run.total_steps
    summary = train(run)
    assert sizes(tmp_path) == [16, 16, 24, 50, 50, 50, 50]
    assert summary.updates == planned == 6 + 6 + 4 + 2 * 4
    assert isinstance(run.model, Normalised) and run.model.largest == 16
    rows = list(csv.DictReader((tmp_path / "steps.csv").read_text().splitlines()))
    for row in rows:
        factor = [1, 1, 2, 2, 2, 3, 3][int(row["epoch"])]
        expected = 1e-2 * factor * run.schedule(int(row["updates"]) - 1)
        assert float(row["lr"]) == pytest.approx(expected, rel=1e-12)
    assert float(rows[-1]["lr"]) < 1e-3  # the schedule has come to its planned end
    said = [line for line in capsys.readouterr().out.splitlines() if "samples per step" in line]
    assert said[1] == "epoch 3: 50 samples per step, 2 times the scheduled learning rate" and len(said) == 3


def test_a_stage_waits_for_an_epoch_without_a_rejected_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Rejected in epochs 1 and 2, at steps 7 and 13: every stage comes two epochs later, or as soon as it may."""

    class Twice(NanLoss):
        def _happens(self, steps: int) -> bool:
            return steps in (7, 13)

    run = make(tmp_path, fault=Twice(at=7), epochs=8)
    with caplog.at_level(logging.WARNING):
        train(run)
    assert sizes(tmp_path) == [16, 16, 16, 16, 24, 50, 50, 50]
    waiting = [line for line in caplog.messages if "wait for an epoch without a rejected step" in line]
    assert waiting == ["epoch 2: 24 samples per step wait for an epoch without a rejected step"]


@pytest.mark.parametrize("on_rejection", ["salvage", "rollback"])
def test_a_rollback_is_trouble_and_a_salvaged_step_is_none(tmp_path: Path, on_rejection: str) -> None:
    run = make(tmp_path, guard=Policy(on_rejection=on_rejection, max_quarantined=0.5))  # type: ignore[arg-type]
    write = run.tracker.step

    def step(record: Any) -> None:
        write(record)
        if record["steps"] == 8 and run.rollback is not None:
            with torch.no_grad():
                next(iter(run.model.parameters())).fill_(math.nan)

    run.tracker.step = step  # type: ignore[method-assign]
    run.loader.dataset.inputs[3] = math.nan
    summary = train(run)
    assert summary.salvaged > 0
    assert sizes(tmp_path)[:4] == ([16, 16, 24, 50] if on_rejection == "salvage" else [16, 16, 16, 24])


@pytest.mark.parametrize("stop_after", [11, 12, 14, 17, 21])
def test_a_run_killed_in_mid_ramp_continues_at_the_same_bits(tmp_path: Path, stop_after: int) -> None:
    """Steps 12 to 15 have 24 samples, those behind 50; one rejected step delays the second stage."""

    class Killed(BaseException):
        pass

    def prepared(name: str) -> Run:
        return make(tmp_path / name, fault=NanLoss(at=13), checkpoint=partial(CheckpointStore, every_updates=1))

    undisturbed = prepared("undisturbed")
    train(undisturbed)
    first = prepared("killed")
    write = first.tracker.step

    def step(record: Any) -> None:
        write(record)
        if record["steps"] == stop_after + 1:
            raise Killed

    first.tracker.step = step  # type: ignore[method-assign]
    with pytest.raises(Killed):
        train(first)
    second = prepared("killed")
    train(second)
    assert sizes(tmp_path / "undisturbed") == [16, 16, 24, 24, 50, 50, 50]
    for one, other in ((undisturbed.model, second.model), (undisturbed.ema, second.ema)):
        assert one is not None and other is not None
        states = one.state_dict(), other.state_dict()
        flat = [state.get("average", state) for state in states]
        assert all(torch.equal(flat[0][name], flat[1][name]) for name in flat[0])
    for name in ("steps.csv", "history.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_another_ramp_is_another_run(tmp_path: Path) -> None:
    train(make(tmp_path))
    with pytest.raises(ConfigurationError, match=r"ramp.* was"):
        train(make(tmp_path, ramp=STAGES[:1]))


@given(samples=st.integers(2, 200), largest=st.integers(1, 40), accumulate=st.integers(1, 5), size=st.integers(1, 200))
def test_a_resized_step_is_divided_evenly(samples: int, largest: int, accumulate: int, size: int) -> None:
    if largest * accumulate > samples or size > samples:
        return
    data = ArrayDataset(torch.arange(samples).float(), torch.arange(samples))
    loader = Loader(data, batch_size=largest * accumulate, accumulate=accumulate)
    loader.resize(size)
    steps = list(loader.epoch(0))
    assert len(steps) == loader.steps_per_epoch == samples // size
    for step in steps:
        counts = [len(microbatch.indices) for microbatch in step]
        assert sum(counts) == size
        assert max(counts) <= largest
        assert max(counts) - min(counts) <= 1
        assert len(counts) == loader.accumulate == math.ceil(size / largest)
    seen = [index for step in steps for microbatch in step for index in microbatch.indices.tolist()]
    assert seen == loader.order(0)[: len(seen)].tolist()


@pytest.mark.parametrize(
    ("ramp", "said"),
    [
        ([{"batch_size": 4}], r"schedule\.ramp\[0\] is .*; it must be like \{epoch: 10, batch_size: 64, lr: 2\.0\}"),
        ([{"epoch": 1, "batchsize": 4}], r"schedule\.ramp\[0\] is"),
        (["often"], r"schedule\.ramp\[0\] is 'often'"),
        ([{"epoch": 0, "lr": 2.0}], r"schedule\.ramp\[0\]\.epoch is 0; it must be a whole number from 1"),
        ([Stage(epoch=2, lr=2.0), Stage(epoch=2, lr=3.0)], r"schedule\.ramp\[1\]\.epoch is 2; .* from 3"),
        ([{"epoch": 1}], r"schedule\.ramp\[0\] changes nothing"),
        ([{"epoch": 1, "batch_size": 0}], r"schedule\.ramp\[0\]\.batch_size is 0"),
        ([{"epoch": 1, "batch_size": 101}], r"batch_size is 101, but the training part has 100 samples"),
        ([{"epoch": 1, "lr": math.inf}], r"schedule\.ramp\[0\]\.lr is inf"),
        ([{"epoch": 1, "lr": 0}], r"schedule\.ramp\[0\]\.lr is 0"),
        ([{"epoch": 7, "lr": 2.0}], r"schedule\.ramp\[0\] begins at epoch 7, but the run has 7"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path: Path, ramp: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        make(tmp_path / "run", ramp=ramp)
    assert not (tmp_path / "run").exists()


def test_the_command_line_reaches_the_ramp(tmp_path: Path) -> None:
    values = checked(
        "experiment=tabular", "schedule=constant", "schedule.ramp=[{epoch:3,batch_size:64,lr:2.0}]", "validate_from=20"
    )
    run = build(values, tmp_path)
    assert (run.ramp.description(), run.validate_from) == ([{"epoch": 3, "batch_size": 64, "lr": 2.0}], 20)


def test_without_stages_nothing_changes() -> None:
    ramp = Ramp()
    assert (ramp.enter(1), ramp.factor, ramp.batch_size, ramp.planned(3, lambda size: 5)) == (None, 1.0, None, 15)


def test_nothing_is_validated_before_its_time(tmp_path: Path) -> None:
    run = make(tmp_path, ramp=(), validate_from=13)
    seen: list[int] = []
    evaluate = run.task.evaluate

    def counted(model: nn.Module, batches: Any) -> dict[str, float]:
        held = list(batches)
        seen.append(run.progress.updates)
        return evaluate(model, held)

    run.task.evaluate = counted  # type: ignore[method-assign]
    summary = train(run)
    rows = history(tmp_path)
    assert [row["val_loss"] != "" for row in rows] == [row["val_accuracy"] != "" for row in rows]
    assert [row["val_loss"] != "" for row in rows] == [False, False, True, True, True, True, True]
    assert seen == [6, 18, 24, 30, 36, 42]  # the names of the columns are learned from one batch
    best = min(float(row["val_loss"]) for row in rows if row["val_loss"])
    assert summary.metrics["best"]["loss"] == pytest.approx(best)


@pytest.mark.parametrize("validate_from", [-1, 42])
def test_a_run_that_would_never_be_validated_is_refused(tmp_path: Path, validate_from: int) -> None:
    with pytest.raises(ConfigurationError, match=f"validate_from is {validate_from}, but the run has 42 updates"):
        make(tmp_path, ramp=(), validate_from=validate_from)
