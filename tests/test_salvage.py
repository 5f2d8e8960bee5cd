"""Salvage, quarantine and rollback: what is lost with a bad sample is that sample."""

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

from small import Normalised, RootOfDistance, points
from stabletrain import Policy, UnstableTraining
from stabletrain.assembly import assemble
from stabletrain.augmentation import Mixup
from stabletrain.data import ArrayDataset, Microbatch, Splits
from stabletrain.ema import ExponentialMovingAverage
from stabletrain.optimizer import adamw
from stabletrain.precision import Precision
from stabletrain.tracking import Tracker
from stabletrain.trainer import Run, loop, train
from stabletrain.trainer.salvage import bad_inputs, bisect, read_samples
from stabletrain.trainer.step import forward_backward

QUIET = partial(Tracker, progress="none", log_every=1)
SALVAGE = Policy(on_rejection="salvage", max_quarantined=0.2)
HIDDEN = 1e30  # finite, so that nothing is wrong with the input itself


def make(folder: Path, poison: dict[int, float] | None = None, *, count: int = 96, **options: Any) -> Run:
    data = points(count)
    for index, value in (poison or {}).items():
        data.inputs[index, 2] = value
    options = {"epochs": 2, "batch_size": 16, "tracking": QUIET, "guard": SALVAGE, **options}
    options.setdefault("optimizer", partial(adamw, lr=1e-2))
    return assemble(Normalised(), Splits(train=data), folder=folder, **options)


def everything(run: Run) -> dict[str, Tensor]:
    found = {f"model.{name}": tensor for name, tensor in run.model.state_dict().items()}
    for number, state in run.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in state.items()}
    if run.ema is not None:
        found |= {f"ema.{name}": tensor for name, tensor in run.ema.average.items()}
    if run.precision.scaler is not None:
        found |= {f"scaler.{k}": torch.tensor(float(v)) for k, v in run.precision.scaler.state_dict().items()}
    return found


def train_without(run: Run, bad: set[int]) -> None:
    """Train by hand on every step's microbatches without the bad samples, which later epochs leave out altogether."""
    run.tracker.begin({}, {}, None, run.progress)
    run.model.train()
    for epoch in range(run.epochs):
        run.progress.epoch = epoch
        run.quarantine.begin_epoch()
        for index, microbatches in enumerate(run.loader.epoch(epoch, excluded=bad if epoch > 0 else ())):
            step = loop.Step(epoch=epoch, index=index, number=run.progress.steps, microbatches=microbatches)
            step.microbatches = [
                read_samples(run, step, [i for i in microbatch.indices.tolist() if i not in bad])
                for microbatch in microbatches
            ]
            run.guard.begin()
            losses = forward_backward(run, step)
            loop.set_learning_rate(run.optimizer, run.schedule(run.progress.updates))
            step.verdict = run.guard.step(losses)
            loop.finish_step(run, step)
            assert step.verdict.applied


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [math.nan, -math.inf, HIDDEN])
def test_a_salvaged_step_is_the_step_without_its_bad_samples(
    tmp_path: Path, value: float, dtype: str, accumulate: int, on_device: bool
) -> None:
    bad = {7: value, 40: value, 41: math.nan}
    options: dict[str, Any] = {
        "accumulate": accumulate,
        "precision": partial(Precision, dtype, initial_scale=256.0),
        "ema": ExponentialMovingAverage,
    }
    salvaged = make(tmp_path / "salvaged", bad, **options)
    salvaged.guard._keep_on_device = on_device
    summary = train(salvaged)
    by_hand = make(tmp_path / "by_hand", bad, **options)
    train_without(by_hand, set(bad))
    assert summary.quarantined == sorted(bad)
    assert summary.rejected == 0
    assert summary.salvaged > 0
    assert summary.updates == summary.steps == by_hand.progress.updates
    one, other = everything(salvaged), everything(by_hand)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    listed = json.loads((tmp_path / "salvaged" / "quarantine.json").read_text())
    assert listed["indices"] == sorted(bad)
    assert all(sample["odd"] for sample in listed["samples"])


@pytest.mark.parametrize("seed", range(6))
def test_one_hidden_sample_in_256_costs_at_most_four_batches(tmp_path: Path, seed: int) -> None:
    bad = (37 * seed + 11) % 256
    run = make(tmp_path, {bad: HIDDEN}, count=256, batch_size=256, epochs=1)
    summary = train(run)
    assert summary.quarantined == [bad]
    assert isinstance(run.model, Normalised)
    assert run.model.seen - 256 <= 4 * 256  # after the step's own forward


@given(bad=st.sets(st.integers(0, 63), min_size=1, max_size=9), smallest=st.sampled_from([1, 2]))
def test_halving_finds_exactly_the_bad_ones(bad: set[int], smallest: int) -> None:
    good = [1000, 1001] if smallest == 2 else []  # partners known before

    def is_bad(members: Any) -> bool:
        return bool(bad & set(members))

    assert set(bisect(is_bad, list(range(64)), good, smallest)) == bad


def test_nobody_is_accused_when_only_the_whole_is_bad() -> None:
    assert bisect(lambda members: len(members) > 20, list(range(32)), []) == []


def test_inputs_are_looked_at_wherever_they_are() -> None:
    sequences = [torch.ones(3, 2), torch.full((2, 2), math.inf), torch.ones(1, 2)]
    batch = Microbatch(({"a": sequences}, torch.tensor([0.0, 1.0, math.nan])), torch.tensor([5, 6, 7]))
    assert bad_inputs([batch]) == [6, 7]
    assert bad_inputs([Microbatch((torch.ones(2, 3), torch.tensor([0, 1])), torch.tensor([1, 2]))]) == []
    pair = (torch.tensor([1.0, math.nan]), torch.tensor([0.0, 0.0]))  # a pair of tensors, not a list of two samples
    assert bad_inputs([Microbatch(pair, torch.tensor([3, 4]))]) == [4]


class Average(nn.Module):
    """Classifies sequences of different length by their mean."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(2, 2)

    def forward(self, sequences: list[Tensor]) -> Tensor:
        logits: Tensor = self.head(torch.stack([sequence.square().mean(0) for sequence in sequences]))
        return logits


@pytest.mark.parametrize("value", [math.nan, HIDDEN])
def test_lists_of_sequences(tmp_path: Path, value: float) -> None:
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randn(2 + index % 5, 2, generator=generator) for index in range(40)]
    sequences[9][1, 0] = value
    run = assemble(
        Average(),
        Splits(train=ArrayDataset(sequences, torch.arange(40) % 2)),
        epochs=2,
        batch_size=8,
        guard=SALVAGE,
        tracking=QUIET,
        folder=tmp_path,
    )
    summary = train(run)
    assert (summary.quarantined, summary.salvaged, summary.rejected) == ([9], 1, 0)
    assert summary.updates == 5 + 4  # 39 samples are left for the second epoch


@pytest.mark.parametrize("value", [math.nan, HIDDEN])
def test_under_mixup_the_right_one_of_the_pair_is_found(tmp_path: Path, value: float) -> None:
    summary = train(make(tmp_path, {13: value}, augmentation=Mixup(alpha=1.0, num_classes=3)))
    assert summary.quarantined == [13]


def test_too_many_bad_samples_are_not_a_few(tmp_path: Path) -> None:
    run = make(tmp_path, dict.fromkeys(range(0, 96, 4), math.nan), guard=Policy(on_rejection="salvage"))
    with pytest.raises(UnstableTraining, match=r"of the training data were found bad, more than the 5.0% allowed"):
        train(run)
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "stopped_unstable"
    assert len(json.loads((tmp_path / "quarantine.json").read_text())["indices"]) >= 5


def test_the_quarantine_of_one_run_serves_another(tmp_path: Path) -> None:
    bad = {7: math.nan, 40: HIDDEN}
    train(make(tmp_path / "first", bad))
    policy = Policy(on_rejection="raise", quarantine=str(tmp_path / "first" / "quarantine.json"))
    summary = train(make(tmp_path / "second", bad, guard=policy))
    assert (summary.status, summary.rejected, summary.quarantined) == ("completed", 0, [7, 40])
    assert summary.updates == 2 * (94 // 16)  # the other 94 samples are trained on


def test_salvage_is_said_and_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        train(make(tmp_path, {7: math.nan}))
    [line] = [record.getMessage() for record in caplog.records if "salvaged" in record.getMessage()]
    assert "the loss is nan" in line
    assert "without samples [7]" in line
    assert "loss (salvaged)" in (tmp_path / "steps.csv").read_text()
    assert (tmp_path / "history.csv").read_text().splitlines()[1].endswith(",6,0,1")


@pytest.mark.parametrize("stop_after", [3, 6, 8])
def test_a_salvaging_run_resumes_at_the_same_bits(tmp_path: Path, stop_after: int) -> None:
    from stabletrain.checkpoint import CheckpointStore

    options: dict[str, Any] = {
        "epochs": 3,
        "guard": Policy(on_rejection="rollback", max_quarantined=0.2, snapshot_every=4),
        "checkpoint": partial(CheckpointStore, every_updates=1),
    }
    bad = {7: math.nan, 40: HIDDEN}
    undisturbed = make(tmp_path / "undisturbed", bad, **options)
    train(undisturbed)

    class Killed(BaseException):
        pass

    first = make(tmp_path / "stopped", bad, **options)
    write = first.tracker.step

    def step(record: Any) -> None:
        write(record)
        if record["steps"] == stop_after + 1:
            raise Killed

    first.tracker.step = step  # type: ignore[method-assign]
    with pytest.raises(Killed):
        train(first)
    second = make(tmp_path / "stopped", bad, **options)
    train(second)
    one, other = everything(undisturbed), everything(second)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    for name in ("steps.csv", "history.csv", "quarantine.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_gradient_that_is_nan_at_a_finite_loss_is_no_overflow(tmp_path: Path, dtype: str) -> None:
    data = points()
    data.inputs[[20, 50]] = 0.0
    run = assemble(
        RootOfDistance(),
        Splits(train=data),
        epochs=2,
        batch_size=16,
        guard=SALVAGE,
        precision=partial(Precision, dtype, initial_scale=256.0),
        tracking=QUIET,
        folder=tmp_path,
    )
    summary = train(run)
    assert (summary.quarantined, summary.rejected) == ([20, 50], 0)
    if run.precision.scaler is not None:
        assert run.precision.scaler.get_scale() == 256.0


def test_an_overflow_lowers_the_scale_and_accuses_nobody(tmp_path: Path) -> None:
    run = make(tmp_path, precision=partial(Precision, "float16", initial_scale=2.0**40))
    summary = train(run)
    assert summary.quarantined == []
    assert set(summary.reasons) == {"overflow"}
    assert run.precision.scaler is not None
    assert 1.0 <= run.precision.scaler.get_scale() < 2.0**40


def test_the_data_scan_finds_bad_samples_before_the_first_step(tmp_path: Path) -> None:
    policy = Policy(on_rejection="raise", scan=True)
    summary = train(make(tmp_path, {7: math.nan, 40: math.inf}, guard=policy))
    assert (summary.status, summary.quarantined, summary.rejected) == ("completed", [7, 40], 0)


def test_bad_samples_are_listed_at_the_end_with_what_is_odd(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {7: math.nan, 40: HIDDEN, **dict.fromkeys(range(60, 70), math.nan)}
    options = {
        "tracking": partial(Tracker, progress="lines"),
        "guard": Policy(on_rejection="salvage", max_quarantined=1),
    }
    train(make(tmp_path, bad, **options))
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("12 samples were found bad and are left out (guard.quarantine takes the list):")
    assert lines[start + 1] == "  sample 7, epoch 0: inputs: 1 of 5 elements NaN"
    assert lines[start + 2].startswith("  sample 40, epoch 0: inputs: largest magnitude 1e+30, ")
    assert lines[start + 11] == "  and 2 more in quarantine.json"
    assert lines[-1].endswith("steps were rejected")


def test_a_skipped_step_names_the_samples_that_are_not_finite(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        train(make(tmp_path / "skip", {7: math.nan, 9: math.inf}, guard=Policy()))
    said = [record.getMessage() for record in caplog.records if "rejected" in record.getMessage()]
    named = [line.rpartition("NaN or Inf in the data of ")[2].partition(";")[0] for line in said]
    assert set(named) <= {"7", "9", "7, 9", "9, 7"} and named
    with pytest.raises(UnstableTraining, match=r"Samples: .*; NaN or Inf in the data of 7\."):
        train(make(tmp_path / "raise", {7: math.nan}, guard=Policy(on_rejection="raise")))
