"""Faults on purpose: when they happen, to what, what they remember, and that nothing else is touched."""

from __future__ import annotations

import csv
import errno
import json
import math
import resource
import signal
import sys
from collections import namedtuple
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from composed import checked
from processes import run
from stabletrain import config
from stabletrain import fault as faults
from stabletrain.assembly import assemble
from stabletrain.build import build
from stabletrain.checkpoint import CheckpointStore
from stabletrain.clipping import NoClipping
from stabletrain.data import ArrayDataset, Loader, Microbatch, Splits
from stabletrain.errors import ConfigurationError, UnstableTraining
from stabletrain.guard import Policy
from stabletrain.loss import CrossEntropy, FocalLoss
from stabletrain.optimizer import adamw
from stabletrain.precision import Precision
from stabletrain.tracking import Tracker
from stabletrain.trainer import Run, train
from stabletrain.tree import tensors

SOURCE = Path(__file__).resolve().parents[1] / "src"
OPTIONS = sorted(set(config.option_names("fault")) - {"none"})
MADE: dict[str, type[Any]] = {
    "nan_input": faults.NanInput,
    "inf_input": faults.InfInput,
    "nan_label": faults.NanLabel,
    "nan_part": faults.NanPart,
    "empty_input": faults.EmptyInput,
    "large_output": faults.LargeOutput,
    "nan_loss": faults.NanLoss,
    "nan_gradient": faults.NanGradient,
    "spike": faults.Spike,
    "nan_weight": faults.NanWeight,
    "nan_buffer": faults.NanBuffer,
    "fp16_overflow": faults.Fp16Overflow,
    "nan_validation": faults.NanValidation,
    "kill": faults.Kill,
    "disk_full": faults.DiskFull,
}
IN_THE_DATA = ["nan_input", "inf_input", "nan_label"]
Pair = namedtuple("Pair", ["inputs", "targets"])


def points(count: int = 24) -> ArrayDataset:
    return ArrayDataset(torch.arange(count * 2.0).reshape(count, 2), torch.arange(count) % 3)


def batch(*indices: int, data: Any = None) -> Microbatch:
    chosen = torch.tensor(indices)
    return Microbatch(points().gather(chosen) if data is None else data, chosen)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


def surroundings(**changed: Any) -> faults.Surroundings:
    return faults.Surroundings(
        **{"model": network(), "total_steps": 200, "batch_size": 8, "loss_scale": True, **changed}
    )


def bad_rows(tensor: Tensor) -> list[int]:
    return (~torch.isfinite(tensor)).reshape(len(tensor), -1).all(1).nonzero().flatten().tolist()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    grads = {f"{name}.grad": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.clone() for name, tensor in model.state_dict().items()} | grads


def difference(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, int]:
    """Names of the tensors that changed, and how many of their elements did."""
    counts = {name: int((~torch.isclose(before[name], after[name], 0.0, 0.0, equal_nan=True)).sum()) for name in before}
    return {name: count for name, count in counts.items() if count > 0}


class OneStep:
    """The calls that a trainer makes around one step, with what came out of them."""

    def __init__(self, fault: faults.Fault, model: nn.Module, optimizer: Optimizer, number: int, *rows: int) -> None:
        self.read = [batch(*rows)]
        self.shown = fault.before_step(number, self.read)
        inputs, targets = self.shown[0].data
        per_sample, _ = CrossEntropy()(model(inputs), targets)
        self.loss = fault.loss(number, per_sample.sum())
        (self.loss / len(rows)).backward()  # type: ignore[no-untyped-call]
        self.before_judging = state_of(model)
        fault.after_backward(number, model)
        self.judged = state_of(model)
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in [self.loss, *self.judged.values()])
        if finite:
            optimizer.step()
        self.after_step = state_of(model)
        fault.after_update(number, model, optimizer)
        self.end = state_of(model)
        optimizer.zero_grad()


# ------------------------------------------------------------------------------------------------------ the options


def test_every_option_has_its_fault_and_every_fault_its_option() -> None:
    assert set(MADE) == set(OPTIONS)
    there = {name for name in faults.__all__ if name not in ("Fault", "NoFault", "Surroundings")}
    assert {made.__name__ for made in MADE.values()} == there


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_builds_its_fault_with_the_defaults_that_the_class_has(option: str, tmp_path: Path) -> None:
    given = ["experiment=tabular", "epochs=1", "device=cpu", "precision=fp16"]
    run = build(checked(*given, f"fault={option}"), tmp_path / "run")
    own = MADE[option](num_classes=2) if option == "nan_label" else MADE[option]()
    assert type(run.fault) is type(own)
    assert {name: value for name, value in vars(run.fault).items() if name != "_record"} == {
        name: value for name, value in vars(own).items() if name != "_record"
    }


@pytest.mark.parametrize(
    "given",
    [
        ["+fault=nan_input", "fault.at=12", "fault.samples=2"],
        ["fault=nan_input", "fault.at=12", "fault.samples=2"],
        ["fault.at=12", "+fault=nan_input", "fault.samples=2"],
        ["fault.samples=2", "fault.at=12", "++fault=nan_input"],
    ],
)
def test_a_fault_is_given_with_or_without_a_plus_in_any_order(given: list[str], tmp_path: Path) -> None:
    overrides, flags = config.arrange([*given, "experiment=tabular", "epochs=5", "device=cpu"])
    config.check_overrides(overrides, flags)
    fault = build(checked(*overrides), tmp_path / "run", overrides).fault
    assert isinstance(fault, faults.NanInput)
    assert (fault.at, fault.samples, fault.times) == (12, 2, 1)


def test_a_time_without_a_fault_is_told() -> None:
    (note,) = faults.NoFault(at=5, samples=2).check(surroundings())
    assert note.startswith("fault.at=5 fault.samples=2 was given without a fault, so nothing will happen")


def test_a_sweep_compares_faults_at_one_step(tmp_path: Path) -> None:
    words = ["-m", "+fault=none,nan_loss", "fault.at=5", "experiment=tabular", "epochs=1", "device=cpu", "name=s"]
    done = run([sys.executable, "-m", "stabletrain", *words], tmp_path)
    assert done.returncode == 0, done.stderr
    summaries = [json.loads(path.read_text()) for path in sorted((tmp_path / "runs" / "s").glob("*/summary.json"))]
    assert sorted(summary["rejected"] for summary in summaries) == [0, 1]


def test_two_faults_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"fault is given 2 times \(\+fault=kill fault=spike\); give it once"):
        config.arrange(["+fault=kill", "fault=spike"])


def test_without_being_told_there_is_no_fault(tmp_path: Path) -> None:
    fault = build(checked("experiment=tabular", "epochs=1", "device=cpu"), tmp_path / "run").fault
    assert type(fault) is faults.NoFault
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = OneStep(fault, model, optimizer, 0, 0, 1, 2)
    assert step.shown is step.read
    assert difference(step.before_judging, step.judged) == difference(step.after_step, step.end) == {}
    assert fault.check(surroundings(total_steps=1)) == []
    assert fault.validation(100, {"loss": 0.25}) == {"loss": 0.25}


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    ("name", "value"), [("at", -1), ("at", 1.5), ("at", True), ("times", 0), ("times", -3), ("times", "two")]
)
def test_numbers_that_make_no_sense_are_refused(option: str, name: str, value: Any) -> None:
    least = 0 if name == "at" else 1
    with pytest.raises(ConfigurationError, match=rf"^fault\.{name} is {value!r}; a whole number from {least} is all"):
        MADE[option](**{name: value})


@pytest.mark.parametrize("option", IN_THE_DATA)
@pytest.mark.parametrize("value", [0, -1, 0.5, False])
def test_fewer_than_one_sample_is_refused(option: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"^fault\.samples is {value}; a whole number from 1 is allowed"):
        MADE[option](samples=value)


@pytest.mark.parametrize("value", [1, 0, -2.0, math.inf, math.nan, True, "10"])
def test_factors_that_make_nothing_larger_are_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^fault\.factor is .*; a finite number above 1 is allowed"):
        faults.Spike(factor=value)
    with pytest.raises(ConfigurationError, match=r"^fault\.scale is .*; a finite number above 1 is allowed"):
        faults.Fp16Overflow(scale=value)


@pytest.mark.parametrize("value", [1, 2.5, True])
def test_less_than_two_classes_are_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^fault\.num_classes is .*; a whole number from 2 is allowed"):
        faults.NanLabel(num_classes=value)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_step_beyond_the_run_is_refused(option: str) -> None:
    last = MADE[option](at=199)
    assert last.check(surroundings()) == []
    with pytest.raises(ConfigurationError, match=r"^fault\.at is 200, but the run has 200 steps: choose .* 0 to 199"):
        MADE[option](at=200).check(surroundings())


@pytest.mark.parametrize("option", OPTIONS)
def test_a_fault_that_is_not_told_when_comes_at_step_100_or_says_that_it_never_comes(option: str) -> None:
    assert MADE[option]().at == 100
    assert MADE[option]().check(surroundings(total_steps=101)) == []
    (note,) = MADE[option]().check(surroundings(total_steps=100))
    assert note == "the run has 100 steps and ends before the fault at step 100; fault.at moves it"


@pytest.mark.parametrize("option", IN_THE_DATA)
def test_more_samples_than_a_step_has_are_refused(option: str) -> None:
    assert MADE[option](at=0, samples=8).check(surroundings()) == []
    with pytest.raises(ConfigurationError, match=r"^fault\.samples is 9, but a step has 8 samples"):
        MADE[option](at=0, samples=9).check(surroundings())


def test_a_fault_that_the_run_has_nothing_for_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no floating buffer"):
        faults.NanBuffer(at=0).check(surroundings(model=nn.Linear(2, 3)))
    with pytest.raises(ConfigurationError, match="choose precision=fp16"):
        faults.Fp16Overflow(at=0).check(surroundings(loss_scale=False))


# ------------------------------------------------------------------------------------------------------ in the data


@pytest.mark.parametrize(("option", "value"), [("nan_input", "nan"), ("inf_input", "inf")])
def test_the_first_samples_of_the_step_are_bad_from_then_on(option: str, value: str) -> None:
    fault = MADE[option](at=3, samples=2)
    for number in range(3):
        read = [batch(4, 5, 6), batch(7, 8, 9)]
        assert fault.before_step(number, read)[1].data is read[1].data
    first, second = fault.before_step(3, [batch(7, 4), batch(9, 1)])
    assert bad_rows(first.data[0]) == [0, 1]
    assert {str(float(number)) for number in first.data[0].flatten()} == {value}
    assert bad_rows(second.data[0]) == []
    assert torch.equal(first.data[1], torch.tensor([1, 1]))  # the labels stay
    (later,) = fault.before_step(11, [batch(3, 4, 5, 7, 9)])
    assert bad_rows(later.data[0]) == [1, 3]
    assert torch.equal(later.data[0][[0, 2, 4]], points().gather(torch.tensor([3, 5, 9]))[0])
    assert fault.indices == [4, 7]


def test_samples_are_taken_over_the_microbatches_of_a_step() -> None:
    fault = faults.NanInput(at=0, samples=3)
    shown = fault.before_step(0, [batch(5, 4), batch(3, 2)])
    assert fault.indices == [3, 4, 5]
    assert [bad_rows(microbatch.data[0]) for microbatch in shown] == [[0, 1], [0]]


def test_each_of_several_steps_chooses_samples_of_its_own() -> None:
    fault = faults.NanInput(at=2, times=2, samples=1)
    for number, rows in enumerate([(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]):
        fault.before_step(number, [batch(*rows)])
    assert fault.indices == [4, 6]


@pytest.mark.parametrize("option", IN_THE_DATA)
def test_reading_a_part_of_the_step_again_chooses_nobody_else(option: str) -> None:
    fault = MADE[option](at=0, samples=1) if option != "nan_label" else faults.NanLabel(at=0, num_classes=3)
    fault.before_step(0, [batch(3, 4, 5, 6)])
    (half,) = fault.before_step(0, [batch(5, 6)])
    (other,) = fault.before_step(0, [batch(4, 3)])
    assert fault.indices == [3]
    position = 1 if option == "nan_label" else 0
    assert bool(torch.isfinite(half.data[position]).all())
    assert bad_rows(other.data[position]) == [1]


@pytest.mark.parametrize("option", IN_THE_DATA)
def test_the_data_set_itself_stays_as_it_is(option: str) -> None:
    data = ArrayDataset(
        [torch.ones(2), torch.ones(3), torch.ones(1), torch.ones(2)], torch.tensor([0.0, 1.0, 0.0, 1.0])
    )
    kept = [tensor.clone() for tensor in tensors([data.inputs, data.targets])]
    fault = MADE[option](at=0, samples=4)
    indices = torch.arange(4)
    whole = ArrayDataset(torch.ones(4, 2), torch.ones(4))
    for source, read in ((data, (data.inputs, data.targets)), (whole, (whole.inputs, whole.targets))):
        (shown,) = fault.before_step(0, [Microbatch(read, indices)])
        assert not all(bool(torch.isfinite(tensor).all()) for tensor in tensors(shown.data)), source
    assert all(map(torch.equal, kept, tensors([data.inputs, data.targets])))
    assert bool((whole.inputs == 1).all()) and bool((whole.targets == 1).all())


def test_inputs_of_any_tree_become_bad() -> None:
    ragged = [torch.ones(2), torch.ones(3), torch.arange(4)]
    inputs = {"image": torch.ones(3, 2, 2), "text": (torch.arange(3), ragged), "scale": torch.ones(5), "name": "a"}
    fault = faults.NanInput(at=0, samples=3)
    (shown,) = fault.before_step(0, [batch(2, 0, 1, data=Pair(inputs, torch.arange(3)))])
    assert isinstance(shown.data, Pair)
    found = shown.data.inputs
    assert bool(found["image"].isnan().all())
    assert [bool(item.isnan().all()) for item in found["text"][1]] == [True, True, False]
    assert found["text"][1][2] is ragged[2] and found["text"][0] is inputs["text"][0]  # whole numbers stay
    assert found["scale"] is inputs["scale"]  # it has no entry for each sample
    assert found["name"] == "a"


def test_inputs_alone_become_bad() -> None:
    (shown,) = faults.InfInput(at=0).before_step(0, [batch(2, 0, data=torch.ones(2, 3))])
    assert bad_rows(shown.data) == [0]


def test_inputs_without_a_floating_tensor_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="can't put nan into the inputs"):
        faults.NanInput(at=0).before_step(0, [batch(0, 1, data=(torch.arange(2), torch.arange(2)))])


@pytest.mark.parametrize("targets", [torch.rand(3), torch.rand(3, 4), torch.rand(3, dtype=torch.float64)])
def test_labels_that_are_floating_numbers_become_nan(targets: Tensor) -> None:
    (shown,) = faults.NanLabel(at=0, samples=2).before_step(0, [batch(5, 6, 7, data=(torch.ones(3, 2), targets))])
    inputs, found = shown.data
    assert bad_rows(found) == [0, 1] and found.dtype == targets.dtype
    assert torch.equal(found[2], targets[2])
    assert torch.equal(inputs, torch.ones(3, 2))


@pytest.mark.parametrize("loss", [CrossEntropy(), CrossEntropy(0.1), FocalLoss(2.0, [5, 9, 2])])
def test_class_numbers_become_probabilities_and_the_other_samples_lose_nothing(loss: nn.Module) -> None:
    read = batch(4, 5, 6, 7)
    (shown,) = faults.NanLabel(at=0, num_classes=3).before_step(0, [read])
    logits = torch.randn(4, 3)
    as_numbers, numbered_weights = loss(logits, read.data[1])
    as_shares, weights = loss(logits, shown.data[1])
    assert torch.equal(torch.isnan(as_shares), torch.tensor([True, False, False, False]))
    assert torch.allclose(as_shares[1:], as_numbers[1:], rtol=1e-6, atol=0.0)
    if weights is not None:
        assert torch.equal(weights[1:], numbered_weights[1:])
    (healthy,) = faults.NanLabel(at=9, num_classes=3).before_step(0, [read])
    assert healthy.data is read.data


def test_class_numbers_need_a_number_of_classes() -> None:
    with pytest.raises(ConfigurationError, match=r"fault\.num_classes=<number>"):
        faults.NanLabel(at=0).before_step(0, [batch(0, 1)])
    with pytest.raises(ConfigurationError, match=r"not the pair \(inputs, targets\)"):
        faults.NanLabel(at=0).before_step(0, [batch(0, 1, data=torch.ones(2, 2))])


# ------------------------------------------------------------------------------------------------------ in the step


@pytest.mark.parametrize(
    ("option", "judged", "end"),
    [
        ("nan_gradient", {"0.weight.grad": 1}, {}),
        ("nan_buffer", {"1.running_mean": 1}, {}),
        ("nan_weight", {}, {"0.weight": 1}),
        ("nan_validation", {}, {}),
    ],
)
def test_a_fault_changes_one_element_once(option: str, judged: dict[str, int], end: dict[str, int]) -> None:
    fault = MADE[option](at=1)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    steps = [OneStep(fault, model, optimizer, number, 0, 1, 2, 3) for number in range(2)]
    assert difference(steps[0].before_judging, steps[0].judged) == {}
    assert difference(steps[0].after_step, steps[0].end) == {}
    assert difference(steps[1].before_judging, steps[1].judged) == judged
    assert difference(steps[1].after_step, steps[1].end) == end
    changed = {**judged, **end}
    for name in changed:
        assert int(torch.isnan(steps[1].end[name]).sum()) == 1
    # The same step again, and the next one: whatever was undone stays so.
    model.load_state_dict({name: tensor for name, tensor in steps[0].end.items() if not name.endswith("grad")})
    for number in (1, 2):
        again = OneStep(fault, model, optimizer, number, 0, 1, 2, 3)
        assert all(bool(torch.isfinite(tensor).all()) for tensor in again.end.values())


def test_a_spike_is_a_multiple_of_all_gradients() -> None:
    fault, model = faults.Spike(at=0, factor=1000.0), network()
    step = OneStep(fault, model, torch.optim.SGD(model.parameters(), lr=0.01), 0, 0, 1, 2, 3)
    gradients = [name for name in step.judged if name.endswith(".grad")]
    assert len(gradients) == len(list(model.parameters()))
    for name in gradients:
        assert torch.equal(step.judged[name], step.before_judging[name] * 1000.0)
        assert bool(torch.isfinite(step.judged[name]).all())


def test_sparse_gradients_are_hit_as_well() -> None:
    for fault in (faults.NanGradient(at=0), faults.Spike(at=0)):
        model = nn.Embedding(5, 2, sparse=True)
        model(torch.tensor([1, 3])).sum().backward()
        fault.after_backward(0, model)
        assert model.weight.grad is not None and model.weight.grad.is_sparse
        values = model.weight.grad.coalesce().values().flatten().tolist()
        expected = [math.nan, 1.0, 1.0, 1.0] if isinstance(fault, faults.NanGradient) else [1e4] * 4
        assert str(values) == str(expected)


def test_the_loss_of_the_first_microbatch_is_nan_and_so_are_its_gradients() -> None:
    fault = faults.NanLoss(at=4, times=2)
    weight = torch.ones(2, requires_grad=True)
    for number in range(8):
        losses = [fault.loss(number, weight.sum()) for _ in range(3)]
        assert [bool(torch.isnan(loss)) for loss in losses] == [number in (4, 5), False, False]
        (gradient,) = torch.autograd.grad(losses[0], weight)
        assert bool(torch.isnan(gradient).all()) == (number in (4, 5))
        assert losses[0].shape == ()


@pytest.mark.parametrize("scale", [1.0, 1024.0, 65536.0])
def test_float16_overflows_at_the_same_loss(scale: float) -> None:
    precision = Precision("float16", initial_scale=scale)
    inputs, targets = points(16).gather(torch.arange(16))
    for fault, overflows in ((faults.NoFault(), False), (faults.Fp16Overflow(at=0), True)):
        model = network()
        with precision.autocast():
            per_sample, _ = CrossEntropy()(model(inputs), targets)
        loss = fault.loss(0, per_sample.sum())
        assert torch.equal(loss, per_sample.sum()) and bool(torch.isfinite(loss))
        precision.scale(loss / 16).backward()  # type: ignore[no-untyped-call]
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert overflows != all(bool(torch.isfinite(gradient).all()) for gradient in gradients)


def test_the_gradient_of_an_overflow_is_larger_by_the_scale() -> None:
    fault = faults.Fp16Overflow(at=0, scale=4096.0)
    weight = torch.tensor(3.0, requires_grad=True)
    first, second = fault.loss(0, weight**2), fault.loss(0, weight**2)
    assert (first.item(), second.item()) == (9.0, 9.0)
    assert torch.autograd.grad(first, weight)[0] == 6.0 * 4096
    assert torch.autograd.grad(second, weight)[0] == 6.0


def test_a_validation_is_nan_as_often_as_asked_and_healthy_when_repeated() -> None:
    fault = faults.NanValidation(at=25, times=2)
    seen = []
    for steps in (10, 20, 30, 40, 50):
        metrics = {"loss": 0.5, "accuracy": 0.75}
        first, repeated = fault.validation(steps, metrics), fault.validation(steps, metrics)
        assert metrics == repeated == {"loss": 0.5, "accuracy": 0.75}
        assert first["accuracy"] == 0.75
        seen.append(math.isnan(first["loss"]))
    assert seen == [False, False, True, True, False]


def test_the_validation_after_the_step_is_the_first_that_can_know_of_it() -> None:
    for steps, bad in ((10, False), (11, True)):
        assert math.isnan(faults.NanValidation(at=10).validation(steps, {"loss": 0.5})["loss"]) == bad


# --------------------------------------------------------------------------------------------- memory and repetition


def happened(fault: faults.Fault, first: int, last: int) -> list[Any]:
    """Take a fault through the steps of a run and note what is bad after each of them."""
    model, seen = network(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for number in range(first, last):
        rows = [(3 * number + offset) % 24 for offset in range(4)]
        model.load_state_dict(network().state_dict())
        step = OneStep(fault, model, optimizer, number, *rows)
        metrics = fault.validation(number + 1, {"loss": 0.5})
        bad = [name for name, tensor in step.end.items() if not bool(torch.isfinite(tensor).all())]
        largest = max(float(tensor.abs().max()) for name, tensor in step.end.items() if name.endswith("grad"))
        rows_bad = [bad_rows(tensor) for tensor in tensors(step.shown[0].data)]
        seen.append((bad, str(largest), rows_bad, str(step.loss.item()), str(metrics)))
    return seen


def make(option: str) -> faults.Fault:
    more = {"nan_label": {"num_classes": 3, "samples": 2}, "nan_input": {"samples": 2}}.get(option, {})
    made: faults.Fault = MADE[option](at=3, times=3, **more)
    return made


# The points here can't be empty, and nobody asks the fault to look for its module: tests/test_fault_parts.py does both.
REPEATABLE = [option for option in OPTIONS if option not in ("kill", "disk_full", "empty_input", "large_output")]


@pytest.mark.parametrize("option", REPEATABLE)
@pytest.mark.parametrize("stop", [2, 5])
def test_a_resumed_run_sees_the_same_fault(option: str, stop: int) -> None:
    undisturbed = happened(make(option), 0, 8)
    assert happened(make(option), 0, 8) == undisturbed
    assert undisturbed != happened(faults.NoFault(), 0, 8)
    first = make(option)
    before = happened(first, 0, stop)
    saved = json.loads(json.dumps(first.state_dict()))
    second = make(option)
    second.load_state_dict(saved)
    assert second.state_dict() == saved
    assert before + happened(second, stop, 8) == undisturbed


@pytest.mark.parametrize("option", [*REPEATABLE, "kill", "disk_full"])
def test_what_another_fault_remembered_is_left(option: str) -> None:
    fault = make(option)
    fresh = fault.state_dict()
    fault.load_state_dict(faults.NoFault().state_dict())
    for other in MADE:
        if other != option:
            fault.load_state_dict({**MADE[other]().state_dict(), "last": 50, "indices": [1], "done": 3})
    assert fault.state_dict() == fresh
    nothing = faults.NoFault()
    nothing.load_state_dict(fresh)
    assert nothing.state_dict() == faults.NoFault().state_dict()


# ------------------------------------------------------------------------------------------------ around the model

KILLED_AT = """
import sys
from pathlib import Path
from torch import nn
from stabletrain.fault import Kill, Surroundings

folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
fault = Kill(at=3, times=2)
fault.check(Surroundings(model=nn.Linear(1, 1), total_steps=10, batch_size=1, folder=folder))
for number in range(6):
    fault.before_step(number, [])
    print(number, flush=True)
"""


def test_a_process_is_killed_once_at_each_step_and_the_folder_remembers(tmp_path: Path) -> None:
    def killed(*arguments: str) -> tuple[int, list[str]]:
        done = run([sys.executable, "-c", KILLED_AT, *arguments])
        return done.returncode, done.stdout.split()

    whole = ["0", "1", "2", "3", "4", "5"]
    assert killed(str(tmp_path)) == (-signal.SIGKILL, whole[:3])
    assert json.loads((tmp_path / "fault.json").read_text()) == {"killed_at": 3}
    assert killed(str(tmp_path)) == (-signal.SIGKILL, whole[:4])
    assert killed(str(tmp_path)) == (0, whole)
    assert killed() == (-signal.SIGKILL, whole[:3])


def write(path: Path) -> int:
    """Write to a file; 0, or the number of the error."""
    try:
        path.write_bytes(b"x" * 100)
    except OSError as error:
        return error.errno or -1
    return 0


def test_no_file_can_be_written_while_the_disk_is_full(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    fault = faults.DiskFull(at=1, times=2)
    found = []
    try:
        for number in range(5):
            fault.before_step(number, [])
            fault.before_step(number, [])  # the step is run again
            found.append(write(tmp_path / "file"))
    finally:
        fault.close()
    assert found == [0, errno.EFBIG, errno.EFBIG, 0, 0]
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == before


def test_a_run_that_ends_gives_the_disk_back(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    fault = faults.DiskFull(at=0)
    try:
        fault.before_step(0, [])
        assert resource.getrlimit(resource.RLIMIT_FSIZE) == (64, before[1])
    finally:
        fault.close()
    fault.close()
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == before
    assert write(tmp_path / "file") == 0


# Python 3.12 and later warn about fork with threads, which is how workers start on Linux.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_read_while_the_disk_is_full() -> None:
    samples = torch.utils.data.TensorDataset(torch.arange(8.0)[:, None], torch.arange(8))
    expected = [step[0].data[0].tolist() for step in Loader(samples, batch_size=4, seed=1).epoch(0)]
    fault = faults.DiskFull(at=0)
    try:
        fault.before_step(0, [])
        read = [step[0].data[0].tolist() for step in Loader(samples, batch_size=4, seed=1, workers=1).epoch(0)]
    finally:
        fault.close()
    assert read == expected


# ------------------------------------------------------------------------------------------------------- whole runs


def blobs(count: int, seed: int) -> ArrayDataset:
    """Three classes of points in two dimensions."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % 3
    return ArrayDataset(torch.randn(count, 2, generator=generator) + 2.0 * targets[:, None], targets)


def assembled(fault: faults.Fault | None, folder: Path, **options: Any) -> Run:
    """A run of 3 epochs with 6 steps each; a checkpoint after each epoch."""
    options = {"guard": Policy(max_rejected=4), "epochs": 3, "batch_size": 16, "device": "cpu", **options}
    splits = Splits(train=blobs(96, 0), validation=blobs(30, 1))
    quiet = partial(Tracker, progress="none", log_every=1)
    return assemble(
        network(), splits, fault=fault, folder=folder, tracking=quiet, optimizer=partial(adamw, lr=1e-2), **options
    )


def rejections(folder: Path) -> list[tuple[int, str]]:
    rows = list(csv.DictReader((folder / "steps.csv").read_text().splitlines()))
    assert [int(row["steps"]) for row in rows] == list(range(1, 19))
    return [(int(row["steps"]) - 1, row["reason"]) for row in rows if row["reason"] != ""]


@pytest.mark.parametrize(
    ("option", "more", "reason"),
    [
        ("nan_loss", {}, "loss"),
        ("nan_gradient", {}, "gradient"),
        ("nan_buffer", {}, "buffer"),
        ("fp16_overflow", {}, "overflow"),
    ],
)
def test_the_guard_skips_the_step_of_a_fault_and_no_other(
    option: str, more: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    fault = MADE[option](at=7, times=2, **more)
    precision = partial(Precision, "float16", initial_scale=256.0) if option == "fp16_overflow" else Precision
    summary = train(assembled(fault, tmp_path, precision=precision))
    assert rejections(tmp_path) == [(7, reason), (8, reason)]
    assert (summary.status, summary.updates, summary.rejected) == ("completed", 16, 2)
    assert summary.finite == {"parameters": True, "buffers": True, "optimizer": True}


@pytest.mark.parametrize("option", IN_THE_DATA)
def test_samples_that_went_bad_are_bad_in_every_later_epoch(option: str, tmp_path: Path) -> None:
    fault = MADE[option](at=7, **({"num_classes": 3} if option == "nan_label" else {}))
    summary = train(assembled(fault, tmp_path))
    (first, reason), (second, again) = rejections(tmp_path)
    assert (first, reason, again) == (7, "loss", "loss") and second in range(12, 18)
    assert (summary.status, summary.updates) == ("completed", 16)
    assert len(fault.indices) == 1


def test_a_spike_moves_the_weights_of_a_run_without_clipping(tmp_path: Path) -> None:
    sgd = partial(torch.optim.SGD, lr=1e-2)
    runs = {}
    for name, fault in (("calm", None), ("spike", faults.Spike(at=7, factor=100.0))):
        run = assembled(fault, tmp_path / name, clipping=NoClipping(), guard=Policy(on_rejection="none"))
        run.optimizer.param_groups[0]["lr"] = sgd.keywords["lr"]
        train(run)
        rows = list(csv.DictReader((tmp_path / name / "steps.csv").read_text().splitlines()))
        runs[name] = [float(row["grad_norm"]) for row in rows]
    assert runs["spike"][:7] == runs["calm"][:7]
    assert runs["spike"][7] == pytest.approx(100.0 * runs["calm"][7], rel=1e-5)


def test_a_weight_that_is_nan_ends_a_run_that_can_only_skip(tmp_path: Path) -> None:
    run = assembled(faults.NanWeight(at=7), tmp_path)
    with pytest.raises(UnstableTraining):
        train(run)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["updates"], summary["finite"]["parameters"]) == ("stopped_unstable", 8, False)


def test_one_validation_is_nan(tmp_path: Path) -> None:
    train(assembled(faults.NanValidation(at=7), tmp_path))
    history = list(csv.DictReader((tmp_path / "history.csv").read_text().splitlines()))
    assert len(history) == 3
    finite = [row["val_loss"] != "" and math.isfinite(float(row["val_loss"])) for row in history]
    assert finite[0] and finite[2]


def test_a_full_disk_costs_the_checkpoint_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_once = partial(CheckpointStore, asynchronous=False)  # beside the training it might be written after the fault
    run = assembled(faults.DiskFull(at=11), tmp_path, checkpoint=at_once)  # the last step of the second epoch
    summary = train(run)
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == before
    assert (summary.status, summary.updates) == ("completed", 18)
    assert run.checkpoint is not None and run.checkpoint.errors >= 1
    assert "File too large" in caplog.text
    saved = CheckpointStore(tmp_path).latest()
    assert saved is not None and saved["progress"]["updates"] == 18
    assert {folder.name for folder in (tmp_path / "checkpoints").glob("step_*")} == {"step_000000006", "step_000000018"}


def test_a_full_disk_at_the_end_of_the_run_is_given_back(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = assembled(faults.DiskFull(at=17, times=5), tmp_path)
    try:
        train(run)
        assert resource.getrlimit(resource.RLIMIT_FSIZE) == before
    finally:
        run.fault.close()


def test_a_fault_beyond_the_run_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^fault\.at is 18, but the run has 18 steps"):
        assembled(faults.NanLoss(at=18), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigurationError, match=r"^fault\.samples is 17, but a step has 16 samples"):
        assembled(faults.NanInput(at=3, samples=17), tmp_path / "run")
    with pytest.raises(ConfigurationError, match=r"choose precision=fp16"):
        assembled(faults.Fp16Overflow(at=3), tmp_path / "run")
    assert assembled(faults.NanLoss(), tmp_path / "run").notes == [
        "the run has 18 steps and ends before the fault at step 100; fault.at moves it"
    ]


def test_a_killed_run_goes_on_with_the_same_command_to_the_same_end(tmp_path: Path) -> None:
    given = ["experiment=tabular", "epochs=2", "base_lr=1e-3", "device=cpu", "name=a", "checkpoint_every_updates=5"]
    fault = ["+fault=kill", "fault.at=18"]

    def ended(name: str, *more: str) -> int:
        (tmp_path / name).mkdir(exist_ok=True)
        words = [sys.executable, "-m", "stabletrain", *given, *more]
        return run(words, tmp_path / name).returncode

    def end(name: str) -> dict[str, Any]:
        summary = json.loads((tmp_path / name / "runs" / "a" / "summary.json").read_text())
        return {key: summary[key] for key in ("status", "updates", "steps", "rejected", "metrics")}

    assert ended("killed", *fault) == -signal.SIGKILL
    assert ended("killed", *fault) == 0
    assert ended("calm") == 0
    assert end("killed") == end("calm")
