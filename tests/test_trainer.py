"""The trainer: what a step does to the model, what it writes down, and how it ends."""

from __future__ import annotations

import csv
import inspect
import json
import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabletrain import ConfigurationError, Policy, UnstableTraining
from stabletrain.assembly import assemble, find_device, fit
from stabletrain.checkpoint import CheckpointStore
from stabletrain.data import ArrayDataset, Splits
from stabletrain.ema import ExponentialMovingAverage
from stabletrain.loss import CrossEntropy, WeightedCrossEntropy
from stabletrain.optimizer import adamw, sgd
from stabletrain.precision import Precision
from stabletrain.schedule import Cosine
from stabletrain.task import Classification, Output
from stabletrain.tracking import Tracker
from stabletrain.trainer import Run, evaluate, loop, train
from stabletrain.trainer.step import forward_backward

QUIET = partial(Tracker, progress="none", log_every=1)


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def points(count: int = 96, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> ArrayDataset:
    """Three classes of points in five dimensions."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % 3
    inputs = torch.randn(count, 5, generator=generator, dtype=dtype) + targets[:, None]
    return ArrayDataset(inputs, targets)


def network(*, dropout: float = 0.2) -> nn.Module:
    """Batch normalisation and dropout, so that buffers and randomness matter."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))


def make(folder: Path | None, *, poisoned: list[int] | None = None, **options: Any) -> Run:
    """A small run; `poisoned` samples of the training data are NaN."""
    data = points()
    for index in poisoned or []:
        data.inputs[index] = math.nan
    options = {"epochs": 3, "batch_size": 16, "tracking": QUIET, "guard": Policy(max_rejected=50), **options}
    options.setdefault("optimizer", partial(adamw, lr=1e-2))
    return assemble(network(), Splits(train=data, validation=points(30, seed=1)), folder=folder, **options)


def everything(run: Run) -> dict[str, Tensor]:
    """Every tensor of model, optimizer, average and scaler by name."""
    found = {f"model.{name}": tensor for name, tensor in run.model.state_dict().items()}
    for number, state in run.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in state.items()}
    if run.ema is not None:
        found |= {f"ema.{name}": tensor for name, tensor in run.ema.average.items()}
    if run.precision.scaler is not None:
        found |= {f"scaler.{k}": torch.tensor(float(v)) for k, v in run.precision.scaler.state_dict().items()}
    return found


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def with_a_hole(run: Run, poisoned: set[int]) -> None:
    """Train by hand, leaving out each step that holds a poisoned sample."""
    run.model.train()
    for epoch in range(run.epochs):
        run.progress.epoch = epoch
        for index, microbatches in enumerate(run.loader.epoch(epoch)):
            if poisoned & {i for microbatch in microbatches for i in microbatch.indices.tolist()}:
                continue
            step = loop.Step(epoch=epoch, index=index, rate=0.0, microbatches=microbatches)
            run.guard.begin()
            losses = forward_backward(run, step)
            loop.set_learning_rate(run.optimizer, run.schedule(run.progress.updates))
            step.verdict = run.guard.step(losses)
            loop.finish_step(run, step)
            assert step.verdict.applied


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("on_device", [False, True])
def test_a_poisoned_sample_leaves_no_trace(tmp_path: Path, accumulate: int, dtype: str, on_device: bool) -> None:
    options: dict[str, Any] = {
        "accumulate": accumulate,
        "precision": partial(Precision, dtype, initial_scale=256.0),
        "ema": ExponentialMovingAverage,
        "schedule": partial(Cosine, warmup_updates=3),
    }
    poisoned = make(tmp_path / "poisoned", poisoned=[7, 40], **options)
    poisoned.guard._keep_on_device = on_device
    summary = train(poisoned)
    hole = make(tmp_path / "hole", **options)
    hole.tracker.begin({}, {}, None, hole.progress)
    with_a_hole(hole, {7, 40})
    assert summary.rejected > 0
    assert summary.finite == {"parameters": True, "buffers": True, "optimizer": True}
    assert summary.updates == hole.progress.updates == summary.steps - summary.rejected
    assert_equal(everything(poisoned), everything(hole))


def test_without_a_guard_the_same_sample_ruins_the_model(tmp_path: Path) -> None:
    summary = train(make(tmp_path, poisoned=[7], guard=Policy(on_rejection="none")))
    assert summary.finite["parameters"] is False


def test_verdicts_on_the_device_change_nothing_that_is_written(tmp_path: Path) -> None:
    folders = [tmp_path / "at_once", tmp_path / "on_device"]
    for folder, on_device in zip(folders, (False, True), strict=True):
        run = make(folder, poisoned=[7])
        run.guard._keep_on_device = on_device
        train(run)
    for name in ("steps.csv", "history.csv"):
        rows = [table(folder / name) for folder in folders]
        assert len(rows[0]) == len(rows[1]) > 0
        for one, other in zip(*rows, strict=True):
            assert one.keys() == other.keys()
            for column in one:
                if column in ("grad_norm", "loss", "train_loss"):  # measured in float64 on the device
                    assert float(one[column]) == pytest.approx(float(other[column]), rel=1e-5, nan_ok=True)
                else:
                    assert one[column] == other[column]


class Sum:
    """A loss with weights of its own: squared error times a weight that each sample brings along."""

    def step(self, model: nn.Module, data: Any) -> Output:
        inputs, weights = data
        return Output(loss_sum=(weights * model(inputs).square().sum(1)).sum(), weight=weights.sum())

    def evaluate(self, model: nn.Module, loader: Any) -> dict[str, float]:
        return {}


@pytest.mark.parametrize("accumulate", [1, 2, 4, 8])
@pytest.mark.parametrize("zeros", [[], [0, 1, 2, 3], list(range(16))])
def test_the_gradient_is_that_of_the_weighted_mean(tmp_path: Path, accumulate: int, zeros: list[int]) -> None:
    torch.manual_seed(1)
    inputs, weights = torch.randn(16, 5, dtype=torch.float64), torch.rand(16, dtype=torch.float64)
    weights[zeros] = 0.0
    model = nn.Linear(5, 3).double()
    run = assemble(
        model,
        Splits(train=ArrayDataset(inputs, weights), facts={"num_classes": 3}),
        epochs=1,
        batch_size=16,
        accumulate=accumulate,
        task=Sum(),
        optimizer=partial(sgd, lr=0.0),
        tracking=QUIET,
        folder=tmp_path,
    )
    microbatches = next(iter(run.loader.epoch(0)))
    assert len(microbatches) == accumulate
    forward_backward(run, loop.Step(epoch=0, index=0, rate=0.0, microbatches=microbatches))
    reference = nn.Linear(5, 3).double()
    reference.load_state_dict(model.state_dict())
    total = (weights * reference(inputs).square().sum(1)).sum() / (weights.sum() if weights.sum() > 0 else 1.0)
    total.backward()
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-15)


def test_accumulation_with_class_weights_equals_one_batch(tmp_path: Path) -> None:
    states = []
    for accumulate in (1, 4):
        model = nn.Linear(5, 3).double()
        nn.init.constant_(model.weight, 0.1)
        nn.init.zeros_(model.bias)
        fit(
            model,
            Splits(train=points(dtype=torch.float64)),
            epochs=2,
            batch_size=16,
            accumulate=accumulate,
            task=Classification(WeightedCrossEntropy(class_counts=[1, 2, 3])),
            optimizer=partial(sgd, lr=0.1),
            tracking=QUIET,
            folder=tmp_path / str(accumulate),
        )
        states.append(model.weight.detach())
    torch.testing.assert_close(states[0], states[1], rtol=1e-10, atol=1e-12)


def test_raise_names_epoch_step_reason_and_samples(tmp_path: Path) -> None:
    run = make(tmp_path, poisoned=[7], guard=Policy(on_rejection="raise"))
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    order = run.loader.order(0).tolist()
    step = order.index(7) // 16
    with pytest.raises(UnstableTraining, match=rf"epoch 0, step {step}: rejected for its loss.*Samples: .*\b7\b"):
        train(run)
    if step == 0:
        assert_equal(before, run.model.state_dict())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "stopped_unstable"
    assert summary["rejected"] == 1
    rows = table(tmp_path / "steps.csv")
    assert rows[-1]["reason"] == "loss"
    assert int(rows[-1]["step"]) == step


def test_a_spent_budget_stops_with_the_model_healthy(tmp_path: Path) -> None:
    run = make(tmp_path, poisoned=list(range(0, 96, 4)), guard=Policy(max_rejected=3, window=10))
    with pytest.raises(UnstableTraining, match="4 of the last 4 steps were rejected, more than the 3 allowed"):
        train(run)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in run.model.state_dict().values())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["updates"], summary["rejected"]) == ("stopped_unstable", 0, 4)


def test_rejections_are_said_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.WARNING):
        summary = train(make(tmp_path, poisoned=[7], tracking=partial(Tracker, progress="lines", log_every=1)))
    assert summary.rejected == 3
    said = [record.getMessage() for record in caplog.records if "rejected: loss" in record.getMessage()]
    assert len(said) == 3
    assert all("the loss is nan" in line and "samples" in line for line in said)
    assert capsys.readouterr().out.strip().splitlines()[-1] == "3 of 18 steps were rejected"
    history = table(tmp_path / "history.csv")
    assert [(row["applied"], row["rejected"]) for row in history] == [("5", "1")] * 3
    assert all(math.isfinite(float(row["train_loss"])) for row in history)


def test_the_average_of_the_weights_is_what_validation_sees(tmp_path: Path) -> None:
    run = make(tmp_path, ema=partial(ExponentialMovingAverage, decay=0.9))
    train(run)
    assert run.ema is not None
    assert run.validation is not None
    before = everything(run)
    measured = evaluate(run, run.validation)
    with run.ema.applied(run.model):
        expected = Classification(CrossEntropy()).evaluate(run.model.eval(), run.validation)
    assert measured == expected
    run.model.eval()
    raw = Classification(CrossEntropy()).evaluate(run.model, run.validation)
    assert raw != measured
    assert_equal(before, everything(run))


class BadValidation(Classification):
    """Training is fine; validation isn't."""

    def evaluate(self, model: nn.Module, loader: Any) -> dict[str, float]:
        return {"loss": math.nan, "accuracy": 0.5}


def test_validation_that_is_not_finite_is_loud_and_never_best(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        summary = train(make(tmp_path, task=BadValidation(CrossEntropy())))
    said = [record.getMessage() for record in caplog.records if "validation is not finite" in record.getMessage()]
    assert len(said) == 3
    assert "loss nan" in said[0]
    assert "all parameters and buffers are finite" in said[0]
    assert "largest running variance" in said[0]
    assert "best" not in summary.metrics


def test_training_twice_gives_the_same_bits(tmp_path: Path) -> None:
    runs = [make(tmp_path / name) for name in ("one", "two")]
    torch.manual_seed(5)
    train(runs[0])
    torch.rand(100)  # whatever else draws from torch's generator changes nothing
    train(runs[1])
    assert_equal(everything(runs[0]), everything(runs[1]))
    for name in ("steps.csv", "history.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_training_does_not_move_the_callers_randomness(tmp_path: Path) -> None:
    run = make(tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    train(run)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("stop_after", [1, 4, 6, 9, 17])
def test_a_run_resumed_anywhere_ends_at_the_same_bits(tmp_path: Path, stop_after: int) -> None:
    options: dict[str, Any] = {
        "poisoned": [7],
        "accumulate": 2,
        "ema": ExponentialMovingAverage,
        "precision": partial(Precision, "float16", initial_scale=256.0, growth_interval=5),
        "checkpoint": partial(CheckpointStore, every_updates=1),
    }
    undisturbed = make(tmp_path / "undisturbed", **options)
    train(undisturbed)

    class Killed(BaseException):
        pass

    first = make(tmp_path / "stopped", **options)
    finish = first.tracker.step

    def step(record: Any) -> None:
        finish(record)
        if record["steps"] == stop_after + 1:  # the step after the last checkpoint, not saved any more
            raise Killed

    first.tracker.step = step  # type: ignore[method-assign]
    with pytest.raises(Killed):
        train(first)
    second = make(tmp_path / "stopped", **options)
    summary = train(second)
    assert summary.status == "completed"
    assert_equal(everything(undisturbed), everything(second))
    for name in ("steps.csv", "history.csv"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_resuming_with_another_model_says_what_differs(tmp_path: Path) -> None:
    train(make(tmp_path))
    other = assemble(
        nn.Linear(5, 3),
        Splits(train=points(), validation=points(30, seed=1)),
        epochs=4,
        batch_size=16,
        tracking=QUIET,
        folder=tmp_path,
    )
    with pytest.raises(ConfigurationError, match=r"another model: weight is new; bias is new; 0.weight is gone"):
        train(other)


@pytest.mark.parametrize(("change", "said"), [({"batch_size": 8}, "batch_size was 16 and is 8"), ({"seed": 4}, "seed")])
def test_resuming_with_other_batches_is_refused(tmp_path: Path, change: dict[str, int], said: str) -> None:
    train(make(tmp_path))
    with pytest.raises(ConfigurationError, match=said):
        train(make(tmp_path, **change))


def test_resume_must_find_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"resume=must, but .* holds no checkpoint"):
        train(make(tmp_path, resume="must"))


def test_a_finished_run_continued_for_more_epochs(tmp_path: Path) -> None:
    train(make(tmp_path))
    summary = train(make(tmp_path, epochs=5))
    assert (summary.status, summary.steps) == ("completed", 30)


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    summary = train(make(None))
    assert summary.status == "completed"
    assert not list(tmp_path.iterdir())


def test_the_step_fits_one_screen() -> None:
    assert len(inspect.getsource(loop.train_epoch).splitlines()) <= 50


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ConfigurationError, match=r"device is 'cuda:9'.*allowed: auto, cpu"):
        find_device("cuda:9")
    with pytest.raises(ConfigurationError, match="device is 'gpu'"):
        find_device("gpu")


def test_counts_that_make_no_sense() -> None:
    with pytest.raises(ConfigurationError, match="epochs is 0; it must be a whole number of at least 1"):
        assemble(network(), Splits(train=points()), epochs=0)


def test_resume_never_starts_anew_and_sets_the_earlier_run_aside(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(make(folder, epochs=4))
    summary = train(make(folder, resume="never"))
    assert summary.steps == 18
    assert len(table(folder / "history.csv")) == 3
    assert len(table(tmp_path / "run-before-1" / "history.csv")) == 4
    train(make(folder, resume="never"))
    assert (tmp_path / "run-before-2" / "summary.json").exists()


def test_a_damaged_best_checkpoint_does_not_fail_a_finished_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make(tmp_path)
    run.test = run.validation
    assert run.checkpoint is not None
    load = run.checkpoint.load

    def damaged(path: Path) -> Any:
        file = path / "state.pt"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        return load(path)

    run.checkpoint.load = damaged  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING):
        summary = train(run)
    assert summary.status == "completed"
    assert summary.metrics["test"] == summary.metrics["final"]
    assert "the best checkpoint can't be read" in caplog.text


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("guard", [Policy(on_rejection="raise"), Policy(max_rejected=0)])
def test_the_last_step_before_a_stop_is_kept_as_an_incident(tmp_path: Path, guard: Policy, on_device: bool) -> None:
    run = make(tmp_path, poisoned=[7], guard=guard)
    run.guard._keep_on_device = on_device
    with pytest.raises(UnstableTraining):
        train(run)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["incidents"]) == ("stopped_unstable", 1)
    assert len(list((tmp_path / "incidents").iterdir())) == 1
