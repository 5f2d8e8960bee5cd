"""Classification: the loss of a microbatch, exact means over any batching, and labels that don't fit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from stabletrain.data import ArrayDataset, OrderedLoader
from stabletrain.errors import ConfigurationError
from stabletrain.loss import CrossEntropy, FocalLoss, WeightedCrossEntropy
from stabletrain.model import MLP, RecurrentClassifier
from stabletrain.task import Classification


def data(count: int = 23, classes: int = 3) -> ArrayDataset:
    generator = torch.Generator().manual_seed(1)
    return ArrayDataset(torch.randn(count, 4, generator=generator), torch.arange(count) % classes)


@pytest.mark.parametrize("loss", [CrossEntropy(0.1), WeightedCrossEntropy([3, 1, 2]), FocalLoss(2.0)])
def test_sums_over_microbatches_give_the_loss_of_the_whole(loss: nn.Module) -> None:
    task, model, samples = Classification(loss), MLP(4, 3, [5], batch_norm=False, dropout=0), data()
    whole = task.step(model, samples.gather(torch.arange(23)))
    parts = [task.step(model, samples.gather(part)) for part in torch.arange(23).split(5)]
    torch.testing.assert_close(sum(part.loss_sum for part in parts), whole.loss_sum)
    assert float(sum(part.weight for part in parts)) == pytest.approx(float(whole.weight))
    assert whole.per_sample_loss is not None
    assert whole.per_sample_loss.shape == (23,)
    assert not whole.per_sample_loss.requires_grad
    assert whole.loss_sum.dtype == torch.float32


@pytest.mark.parametrize("loss", [CrossEntropy(), WeightedCrossEntropy([3, 1, 2])])
@pytest.mark.parametrize("batch_size", [1, 4, 23, 100])
def test_evaluation_is_the_true_mean_whatever_the_batch_size(loss: nn.Module, batch_size: int) -> None:
    model, samples = MLP(4, 3, [5]), data()
    metrics = Classification(loss).evaluate(model, OrderedLoader(samples, batch_size=batch_size))
    model.eval()
    logits = model(samples.inputs)
    weight = getattr(loss, "class_weights", None)
    expected = nn.functional.cross_entropy(logits, samples.targets, weight=weight)
    assert metrics["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(float((logits.argmax(1) == samples.targets).float().mean()))
    assert set(metrics) == {"loss", "accuracy"}


def test_evaluation_leaves_model_modes_gradients_and_buffers_alone() -> None:
    model = MLP(4, 3, [5], dropout=0.5)
    model.train()
    frozen = next(module for module in model.modules() if isinstance(module, nn.BatchNorm1d))
    frozen.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Classification(CrossEntropy()).evaluate(model, OrderedLoader(data(), batch_size=7))
    assert model.training
    assert not frozen.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_modes_come_back_after_an_error() -> None:
    model = MLP(2, 3, [5])
    with pytest.raises(RuntimeError):
        Classification(CrossEntropy()).evaluate(model, OrderedLoader(data(), batch_size=7))
    assert all(module.training for module in model.modules())


def test_lists_of_sequences_are_inputs_like_any_other() -> None:
    sequences = ArrayDataset([torch.randn(length, 2) for length in (3, 9, 1, 4)], torch.tensor([0, 1, 1, 0]))
    task, model = Classification(CrossEntropy()), RecurrentClassifier(2, 2)
    output = task.step(model, sequences.gather(torch.tensor([2, 0])))
    assert output.weight == 2.0
    assert 0 <= task.evaluate(model, OrderedLoader(sequences, batch_size=3))["accuracy"] <= 1


def test_targets_may_be_probabilities() -> None:
    class Fixed(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs

    samples = ArrayDataset(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.9, 0.1], [0.2, 0.8]]))
    metrics = Classification(CrossEntropy()).evaluate(Fixed(), OrderedLoader(samples, batch_size=2))
    assert metrics["accuracy"] == 0.5


def test_a_non_finite_loss_is_reported_as_it_is() -> None:
    samples = data()
    inputs = samples.inputs
    assert isinstance(inputs, torch.Tensor)
    inputs[3] = math.nan
    metrics = Classification(CrossEntropy()).evaluate(MLP(4, 3), OrderedLoader(samples, batch_size=4))
    assert math.isnan(metrics["loss"])


def test_samples_that_all_weigh_nothing_have_no_loss() -> None:
    samples = ArrayDataset(torch.zeros(4, 4), torch.ones(4, dtype=torch.int64))
    metrics = Classification(WeightedCrossEntropy([4, 0])).evaluate(MLP(4, 2), OrderedLoader(samples, batch_size=4))
    assert metrics["loss"] == 0.0


class CountWaits(TorchDispatchMode):
    """Counts reads of a tensor's value by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.waits += "_local_scalar_dense" in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss", [CrossEntropy(), WeightedCrossEntropy([3, 1, 2])])
def test_no_batch_waits_for_the_device(loss: nn.Module) -> None:
    task, model, samples = Classification(loss), MLP(4, 3, [5]), data()
    with CountWaits() as count:
        assert float(torch.ones(())) == 1.0
        assert count.waits == 1  # the counter works
        task.evaluate(model, OrderedLoader(samples, batch_size=1))
        task.step(model, samples.gather(torch.arange(5)))
    assert count.waits == 1


@pytest.mark.parametrize("loss", [CrossEntropy(), CrossEntropy(0.1), WeightedCrossEntropy([3, 1, 2]), FocalLoss()])
@pytest.mark.parametrize("label", [3, 7, -1, -100])
def test_a_label_without_an_output_gets_a_message(loss: nn.Module, label: int) -> None:
    task = Classification(loss)
    batch = (torch.zeros(2, 4), torch.tensor([0, label]))
    with pytest.raises(ConfigurationError) as error:
        task.step(MLP(4, 3, []), batch)
    assert all(word in str(error.value) for word in (f"label {label}", "3 outputs", "0 to 2"))


@pytest.mark.parametrize(
    ("outputs", "targets", "words"),
    [
        (torch.zeros(2), torch.tensor([0, 1]), ["[2]", "[samples, classes]"]),
        (torch.zeros(3, 2), torch.tensor([0, 1]), ["[3, 2]", "2 samples"]),
        (torch.zeros(2, 3), torch.zeros(2, 4), ["[2, 4]", "3 outputs", "num_classes"]),
        (torch.zeros(2, 3), torch.tensor([0, 1], dtype=torch.int32), ["torch.int32", "int64"]),
    ],
)
def test_outputs_that_do_not_fit_get_a_message(outputs: torch.Tensor, targets: torch.Tensor, words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as error:
        Classification(CrossEntropy()).step(nn.Identity(), (outputs, targets))
    assert all(word in str(error.value) for word in words), error.value


def test_nothing_to_evaluate_gets_a_message() -> None:
    with pytest.raises(ConfigurationError, match="nothing to evaluate"):
        Classification(CrossEntropy()).evaluate(nn.Identity(), [])


def test_an_error_of_the_model_is_not_taken_for_a_label_error() -> None:
    class Broken(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            raise IndexError("mine")

    with pytest.raises(IndexError, match="mine"):
        Classification(CrossEntropy()).step(Broken(), (torch.zeros(1, 2), torch.tensor([0])))
