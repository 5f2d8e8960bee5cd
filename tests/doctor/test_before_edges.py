"""Batches that come sooner or later: each fault shows in its edge case alone, and healthy models give nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from stabletrain.data import ArrayDataset
from stabletrain.doctor.before.edges import examine_edges
from stabletrain.loss import Loss
from stabletrain.model import MLP, RecurrentClassifier
from stabletrain.task import Classification

from .subjects import network, subject


def examined(model, train=None, **options):
    one = subject(train, model=model, **options)
    findings, said = examine_edges(one)
    return {finding.what: finding for finding in findings}, said


class Body(nn.Module):
    """A linear classifier over something that is made of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.made(inputs))


class ByDeviation(Body):
    def made(self, inputs):
        return inputs / inputs.std(0)  # over the batch: NaN for one sample, 0/0 for equal ones


class ByNorm(Body):
    def made(self, inputs):
        return inputs / inputs.norm(dim=1, keepdim=True)  # 0/0 for zeros


class Exponential(Body):
    def made(self, inputs):
        shares = inputs.exp()
        return shares / shares.sum(1, keepdim=True)  # overflows for inputs of 100


@pytest.mark.parametrize("model", [network, lambda: MLP(4, 2), lambda: MLP(4, 2, batch_norm=False)])
def test_healthy_models_give_nothing(model):
    found, said = examined(model())
    assert found == {}
    assert {"a batch of 1", "equal samples", "all-zero input", "inputs times 1e6", "one class only"} <= set(said)
    assert set(said["equal samples"]) == {"fp32", "bf16", "fp16"}
    assert not any(case.startswith(("empty", "fully", "all labels")) for case in said)


def test_a_deviation_over_the_batch():
    found, said = examined(ByDeviation())
    assert {what.partition(":")[0] for what in found} == {"a batch of 1", "equal samples", "all-zero input"}
    assert all(one.severity == "warning" for one in found.values())
    assert "the loss is nan" in said["equal samples"]["fp32"]


def test_a_division_by_a_norm():
    found, _ = examined(ByNorm())
    assert {what.partition(":")[0] for what in found} == {"all-zero input"}


def test_an_exponential_without_the_maximum_subtracted():
    found, _ = examined(Exponential())
    assert {what.partition(":")[0] for what in found} == {"inputs times 1e2"}


class Balanced(Loss):
    """Divides by the number of samples of the rarer class."""

    def forward(self, logits, targets):
        share = (targets == 0).float().mean() * (targets == 1).float().mean()
        return nn.functional.cross_entropy(logits, targets, reduction="none") * (share / share), None


class Ignoring(Loss):
    """Mean over the samples whose label isn't -100."""

    ignore_index = -100

    def forward(self, logits, targets):
        return nn.functional.cross_entropy(logits, targets, reduction="mean").expand(len(targets)), None


@pytest.mark.parametrize(("loss", "case"), [(Balanced, "one class only"), (Ignoring, "all labels ignored")])
def test_losses_that_divide_by_nothing(loss, case):
    found, _ = examined(network(), task=Classification(loss()))
    # A batch of one sample, or of equal ones, has one class too.
    assert case in {what.partition(":")[0] for what in found}
    assert found[f"{case}: not finite in fp32, bf16, fp16"].severity == "warning"


class Attention(nn.Module):
    """Attention with a mask of its own; `safe` replaces rows that attend to nothing."""

    def __init__(self, safe: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.score, self.head, self.safe = nn.Linear(4, 1), nn.Linear(4, 2), safe

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        scores = self.score(inputs["steps"]).squeeze(2).masked_fill(~inputs["mask"], -math.inf)
        if self.safe:
            scores = torch.where(inputs["mask"].any(1, keepdim=True), scores, 0.0)
        return self.head((scores.softmax(1).unsqueeze(2) * inputs["steps"]).sum(1))


def masked(count: int = 64) -> ArrayDataset:
    torch.manual_seed(1)
    mask = torch.arange(6) < torch.randint(1, 7, (count, 1))
    return ArrayDataset({"steps": torch.randn(count, 6, 4), "mask": mask}, torch.arange(count) % 2)


@pytest.mark.parametrize("safe", [True, False])
def test_attention_to_nothing(safe):
    found, said = examined(Attention(safe), masked(), validation=masked(8))
    assert {"fully masked attention (mask all True)", "fully masked attention (mask all False)"} <= set(said)
    expected = set() if safe else {"fully masked attention (mask all False): not finite in fp32, bf16, fp16"}
    assert set(found) == expected


class MeanOfSteps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, 2)

    def forward(self, sequences: list[Tensor]) -> Tensor:
        return self.head(torch.stack([sequence.mean(0) for sequence in sequences]))


def ragged(count: int = 64) -> ArrayDataset:
    torch.manual_seed(1)
    lengths = torch.randint(2, 9, (count,)).tolist()
    return ArrayDataset([torch.randn(length, 4) for length in lengths], torch.arange(count) % 2)


def test_a_sequence_without_a_step():
    found, _ = examined(MeanOfSteps(), ragged(), validation=ragged(8))
    assert set(found) == {"empty sequence: not finite in fp32, bf16, fp16"}
    found, said = examined(RecurrentClassifier(4, 2), ragged(), validation=ragged(8))
    assert found == {}  # it refuses such a sample, in words
    assert "no time step" in said["empty sequence"]["fp32"]


class Refusing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        if not bool(inputs.any()):
            raise ValueError("no pixel is set")
        return self.head(inputs)


def test_an_error_on_such_a_batch_is_told():
    found, _ = examined(Refusing())
    assert set(found) == {"all-zero input: refused"}
    assert "no pixel is set" in found["all-zero input: refused"].evidence


@pytest.mark.parametrize(
    ("size", "accumulate", "remedy"), [(4, 4, "accumulate=1"), (1, 1, "batch_size=32"), (4, 2, None)]
)
def test_microbatches_of_one_sample_with_batch_norm(size, accumulate, remedy):
    found, said = examined(MLP(4, 2), batch_size=size, accumulate=accumulate)
    assert said["a batch of 1"]["fp32"].startswith("refused: ValueError: Expected more than 1 value")
    assert [(one.severity, one.remedy) for one in found.values()] == ([("broken", remedy)] if remedy else [])
