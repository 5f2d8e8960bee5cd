"""Parameters in bfloat16 with float32 masters: what has which format, and that nothing is lost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from small import Normalised, points
from stabletrain import ConfigurationError, Policy
from stabletrain.assembly import assemble
from stabletrain.checkpoint import CheckpointStore
from stabletrain.data import ArrayDataset, Splits
from stabletrain.ema import ExponentialMovingAverage
from stabletrain.fault import NanGradient, NanLoss
from stabletrain.optimizer import adamw, sgd
from stabletrain.parallel import DataParallel, FullySharded
from stabletrain.precision import Precision, in_masters_place
from stabletrain.schedule import Constant
from stabletrain.task import Output
from stabletrain.tracking import Tracker
from stabletrain.trainer import Run, train
from stabletrain.weights import read_weights
from trees import differences

PURE = partial(Precision, "bfloat16", parameters="bfloat16")
QUIET = partial(Tracker, progress="none", log_every=1, tensorboard=False)


def make(folder: Path | None, model: nn.Module | None = None, **options: Any) -> Run:
    data = points(96)
    options = {
        "epochs": 2,
        "batch_size": 16,
        "precision": PURE,
        "tracking": QUIET,
        "optimizer": partial(adamw, lr=1e-2),
        "ema": ExponentialMovingAverage,
        **options,
    }
    return assemble(model or Normalised(), Splits(train=data, validation=data), folder=folder, **options)


class Watching(Normalised):
    """Notes the formats in which it computes, and those of the gradients as they arise."""

    def __init__(self) -> None:
        super().__init__()
        self.formats: set[tuple[str, torch.dtype]] = set()
        self.gradients: set[tuple[str, torch.dtype]] = set()

    def forward(self, inputs: Tensor) -> Tensor:
        self.formats |= {(name, tensor.dtype) for name, tensor in self.layers.state_dict().items()}
        if self.training:
            for name, parameter in self.layers.named_parameters():
                parameter.register_post_accumulate_grad_hook(partial(self.note, name))
        return super().forward(inputs)

    def note(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.gradients.add((name, parameter.grad.dtype))


def test_the_passes_see_bfloat16_and_everybody_else_float32(tmp_path: Path) -> None:
    model = Watching()
    run = make(tmp_path, model)
    train(run)
    reduced = {"0.weight", "0.bias", "4.weight", "4.bias"}
    for name, dtype in model.formats:
        kept = torch.int64 if name.endswith("tracked") else torch.float32
        assert dtype == (torch.bfloat16 if name in reduced else kept), name
    assert {name for name, dtype in model.gradients if dtype == torch.bfloat16} == reduced
    assert len(model.gradients) == 6
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {value.dtype for state in run.optimizer.state.values() for value in state.values()} == {torch.float32}
    assert run.ema is not None and {value.dtype for value in run.ema.average.values()} == {torch.float32}
    assert any(not torch.equal(p, p.bfloat16().float()) for p in model.parameters()), "the masters are rounded"
    assert run.checkpoint is not None
    state = run.checkpoint.latest()
    assert state is not None and differences(dict(state["model"]), dict(model.state_dict())) == []
    exported = read_weights(tmp_path, "last").tensors
    for name, tensor in run.ema.average.items():
        assert torch.equal(exported[name], tensor)


class OneWeight(nn.Module):
    """Its gradient is 1, whatever it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.weight * torch.ones_like(inputs[:, 0])


class TheWeightItself:
    """The loss is the weight."""

    metrics = ("loss",)

    def step(self, model: nn.Module, data: Any) -> Output:
        output = model(data[0])
        return Output(loss_sum=output.sum(), weight=float(len(output)))

    def evaluate(self, model: nn.Module, batches: Iterator[Any]) -> dict[str, float]:
        return {"loss": 0.0}


def test_a_thousand_updates_below_the_resolution_add_up() -> None:
    """1000 times 1e-3 off 1.0: in bfloat16 alone nothing would happen at all."""
    alone = torch.ones((), dtype=torch.bfloat16)
    for _ in range(1000):
        alone -= 1e-3
    assert alone == 1.0
    data = ArrayDataset(torch.zeros(2000, 1), torch.zeros(2000, dtype=torch.int64))
    run = assemble(
        OneWeight(),
        Splits(train=data),
        epochs=1,
        batch_size=2,
        precision=PURE,
        task=TheWeightItself(),  # type: ignore[arg-type]
        optimizer=partial(sgd, lr=1e-3, momentum=0.0),
        schedule=Constant,
        tracking=partial(Tracker, progress="none"),
    )
    summary = train(run)
    assert summary.updates == 1000
    assert float(run.model.weight.detach()) == pytest.approx(0.0, abs=1e-4)  # type: ignore[operator]


def test_a_rejected_step_leaves_no_trace_in_the_masters(tmp_path: Path) -> None:
    """The run with a poisoned step equals the one in which the same step is discarded unseen."""
    states = []
    for fault in (NanLoss(at=4), NanGradient(at=4)):
        run = make(tmp_path / type(fault).__name__, fault=fault, accumulate=2)
        summary = train(run)
        assert summary.rejected == 1
        states.append({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()["state"]})
        states[-1] |= {"ema": run.ema.state_dict()}  # type: ignore[union-attr]
    assert differences(*states) == []
    run = make(tmp_path / "before", fault=NanLoss(at=4))
    kept: list[dict[str, Any]] = []
    note = run.tracker.step

    def step(record: Any) -> None:
        note(record)
        kept.append({name: tensor.clone() for name, tensor in run.model.state_dict().items()})

    run.tracker.step = step  # type: ignore[method-assign]
    train(run)
    assert differences(kept[3], kept[4]) == [] and differences(kept[4], kept[5]) != []


@pytest.mark.parametrize("policy", ["salvage", "rollback"])
def test_it_can_be_salvaged_and_rolled_back(tmp_path: Path, policy: Any) -> None:
    run = make(tmp_path, guard=Policy(on_rejection=policy, max_quarantined=0.5))
    run.loader.dataset.inputs[7] = math.nan
    summary = train(run)
    assert summary.salvaged == 1 and summary.status == "completed"
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}


def test_an_interrupted_run_goes_on_at_the_same_bits(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    store = partial(CheckpointStore, every_updates=1)
    undisturbed = make(tmp_path / "calm", checkpoint=store, accumulate=2)
    train(undisturbed)
    first = make(tmp_path / "killed", checkpoint=store, accumulate=2)
    note = first.tracker.step

    def step(record: Any) -> None:
        note(record)
        if record["steps"] == 5:
            raise Killed

    first.tracker.step = step  # type: ignore[method-assign]
    with pytest.raises(Killed):
        train(first)
    second = make(tmp_path / "killed", checkpoint=store, accumulate=2)
    train(second)
    states = [run.checkpoint.latest() for run in (undisturbed, second)]  # type: ignore[union-attr]
    assert differences(*states) == []


def test_what_a_forward_writes_into_a_parameter_stays(tmp_path: Path) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 3, max_norm=1.0)
            self.scale = nn.Parameter(torch.full((3,), 1.0 + 2**-12))

        def forward(self, inputs: Tensor) -> Tensor:
            with torch.no_grad():
                self.scale.mul_(2.0)
            result: Tensor = self.table(inputs) * self.scale
            return result

    model = Writes()
    with torch.no_grad():
        model.table.weight.fill_(5.0)
    with in_masters_place(model, torch.bfloat16):
        assert (model.table.weight.dtype, model.scale.dtype) == (torch.float32, torch.bfloat16)
        model(torch.tensor([0, 1]))
    assert model.scale.tolist() == [2.0, 2.0, 2.0]  # as bfloat16 has it
    assert [round(float(row.norm()), 4) for row in model.table.weight.detach()] == [1.0, 1.0, 8.6603, 8.6603]


def test_masters_come_back_after_an_error_and_gradients_go_along() -> None:
    layer = nn.Linear(3, 2)
    before, address = layer.weight.detach().clone(), layer.weight.data_ptr()
    layer.weight.grad = torch.full_like(before, 0.5)

    def fail() -> None:
        with in_masters_place(layer, torch.bfloat16):
            layer(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert torch.equal(layer.weight, before) and layer.weight.data_ptr() == address
    assert torch.equal(layer.weight.grad, torch.full_like(before, 1.5)) and layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("parallel", [DataParallel, FullySharded])
def test_several_processes_are_refused(parallel: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"\(precision=pure_bf16\) needs parallel=none"):
        make(None, parallel=parallel())
