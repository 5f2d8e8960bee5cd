"""Tasks besides classification: their metrics against scikit-learn, over any batching, and losses that don't fit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import stabletrain.loss
from composed import checked
from stabletrain.build import build
from stabletrain.config import option_names
from stabletrain.data import ArrayDataset, OrderedLoader
from stabletrain.errors import ConfigurationError
from stabletrain.loss import (
    BPR,
    BinaryCrossEntropy,
    CrossEntropy,
    Dice,
    FocalLoss,
    GaussianNLL,
    Loss,
    MeanSquaredError,
    WeightedCrossEntropy,
    ZLoss,
)
from stabletrain.task import Binary, Classification, Regression, Segmentation, Supervised
from stabletrain.task.binary import auc


class Given(nn.Module):
    """Its inputs are what a model would have returned."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs


def measured(task: object, outputs: Tensor, targets: Tensor, batch_size: int) -> dict[str, float]:
    return task.evaluate(Given(), OrderedLoader(ArrayDataset(outputs, targets), batch_size=batch_size))  # type: ignore[attr-defined]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(
    scores=st.lists(st.integers(-4, 4), min_size=2, max_size=30),
    seed=st.integers(0, 10**6),
)
def test_the_auc_is_that_of_scikit_learn(scores: list[int], seed: int) -> None:
    answers = torch.randint(2, (len(scores),), generator=torch.Generator().manual_seed(seed)).bool()
    found = auc(torch.tensor(scores).double(), answers)
    if answers.all() or not answers.any():
        assert found is None
    else:
        assert found == pytest.approx(sklearn.metrics.roc_auc_score(answers, scores))


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_yes_or_no(batch_size: int) -> None:
    scores, answers = drawn(23, 1), (drawn(23, seed=1) > 0).long()
    found = measured(Binary(BinaryCrossEntropy()), scores, answers, batch_size)
    p = scores[:, 0].sigmoid()
    assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(answers, p > 0.5))
    assert found["auc"] == pytest.approx(sklearn.metrics.roc_auc_score(answers, p))
    assert found["loss"] == pytest.approx(sklearn.metrics.log_loss(answers, p.double()), rel=1e-5)
    several = measured(Binary(BinaryCrossEntropy()), drawn(23, 3), torch.ones(23, 3).triu(), batch_size)
    expected = [sklearn.metrics.roc_auc_score(torch.ones(23, 3).triu()[:, k], drawn(23, 3)[:, k]) for k in (0, 1, 2)]
    assert several["auc"] == pytest.approx(sum(expected) / 3)


def test_one_answer_alone_ranks_nothing_and_nan_is_seen() -> None:
    task = Binary(BinaryCrossEntropy(ignore_index=-1))
    assert measured(task, drawn(5), torch.ones(5), 2)["auc"] == 0.5
    assert math.isnan(measured(task, torch.tensor([math.nan, 1.0]), torch.tensor([0, 1]), 2)["auc"])
    found = measured(task, torch.tensor([3.0, -3.0, 9.0]), torch.tensor([1, 0, -1]), 2)
    assert (found["auc"], found["accuracy"]) == (1.0, 1.0)
    nothing = measured(task, drawn(3), torch.full((3,), -1), 2)
    assert nothing == {"loss": 0.0, "accuracy": 0.0, "auc": 0.5}


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_numbers(batch_size: int) -> None:
    predicted, targets = drawn(23, 1), 1e3 + drawn(23, seed=1)
    predicted = predicted + 1e3
    found = measured(Regression(MeanSquaredError()), predicted, targets, batch_size)
    assert set(found) == {"loss", "mae", "rmse", "r2"}
    assert found["mae"] == pytest.approx(sklearn.metrics.mean_absolute_error(targets, predicted))
    assert found["rmse"] == pytest.approx(sklearn.metrics.root_mean_squared_error(targets, predicted))
    assert found["r2"] == pytest.approx(sklearn.metrics.r2_score(targets, predicted))
    assert found["loss"] == pytest.approx(found["rmse"] ** 2)
    spread = torch.stack([predicted[:, 0], torch.zeros(23)], 1)
    of_means = measured(Regression(GaussianNLL()), spread, targets, batch_size)
    assert of_means["mae"] == pytest.approx(found["mae"])
    constant = measured(Regression(MeanSquaredError()), predicted, torch.full((23,), 0.1), batch_size)
    assert constant["r2"] == 0.0


@pytest.mark.parametrize("batch_size", [1, 3])
def test_places(batch_size: int) -> None:
    logits, targets = drawn(4, 3, 5, 5), torch.randint(3, (4, 5, 5), generator=torch.Generator().manual_seed(3))
    targets[0, 0] = 7
    targets[3] = 7
    task = Segmentation(CrossEntropy(ignore_index=7))
    found = measured(task, logits, targets, batch_size)
    said, counts = logits.argmax(1), targets != 7
    assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(targets[counts], said[counts]))
    expected = [sklearn.metrics.f1_score(targets[n][counts[n]], said[n][counts[n]], average="macro") for n in range(3)]
    assert found["dice"] == pytest.approx(sum(expected) / 3)
    mean = nn.functional.cross_entropy(logits, targets, ignore_index=7)
    assert found["loss"] == pytest.approx(float(mean), rel=1e-5)
    mask = (drawn(4, 5, 5, seed=5) > 0).long()
    binary = measured(Segmentation(BinaryCrossEntropy()), drawn(4, 1, 5, 5), mask, batch_size)
    assert binary["accuracy"] == pytest.approx(float(((drawn(4, 1, 5, 5)[:, 0] > 0) == (mask > 0)).float().mean()))


def test_ignored_labels_count_for_no_accuracy() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    found = measured(Classification(CrossEntropy(ignore_index=-1)), logits, torch.tensor([0, -1, 1]), 2)
    assert found["accuracy"] == 0.5
    with pytest.raises(ConfigurationError, match="label -2"):
        measured(Classification(CrossEntropy(ignore_index=-1)), logits, torch.tensor([0, -1, -2]), 3)


def test_any_outputs_are_supervised_without_targets() -> None:
    task = Supervised(BPR())
    output = task.step(Given(), drawn(5, 2).unsqueeze(0).squeeze(0))
    assert output.weight == 5.0
    assert set(measured(task, drawn(5, 2), torch.zeros(5), 2)) == {"loss"}


def test_a_loss_follows_the_model_into_evaluation_and_back() -> None:
    task, model = Supervised(loss := BPR()), Given().eval()
    task.step(model, (drawn(5, 2), None))
    assert not loss.training
    task.step(model.train(), (drawn(5, 2), None))
    assert loss.training
    measured(task, drawn(5, 2), torch.zeros(5), 2)
    assert loss.training


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Classification(MeanSquaredError()), ["task=classification", "MeanSquaredError", "task=regression"]),
        (lambda: Classification(BPR()), ["BPR", "task=supervised"]),
        (lambda: Binary(CrossEntropy()), ["task=binary", "task=classification"]),
        (lambda: Regression(Dice()), ["task=segmentation"]),
        (lambda: Classification(CrossEntropy()).step(Given(), drawn(3, 2)), ["NoneType", "task=supervised"]),
        (
            lambda: Segmentation(Dice()).step(Given(), (drawn(3, 2, 4), torch.zeros(3, 5).long())),
            ["[3, 2, 4]", "[3, 5]", "[samples, classes, ...]"],
        ),
        (
            lambda: Segmentation(CrossEntropy()).step(Given(), (drawn(3, 2, 4), torch.full((3, 4), 2))),
            ["label 2", "2 outputs"],
        ),
        (lambda: Regression(MeanSquaredError()).step(Given(), (drawn(3, 2), drawn(3))), ["[3, 2]", "[3]"]),
        (lambda: Binary(BinaryCrossEntropy()).evaluate(Given(), []), ["nothing to evaluate"]),
    ],
)
def test_what_does_not_fit_gets_one_message(make: object, words: list[str]) -> None:
    assert callable(make)
    with pytest.raises(ConfigurationError) as error:
        make()
    assert all(word in str(error.value) for word in words), error.value


SMALL = ("experiment=tabular", "epochs=1", "batch_size=128", "tracking=none", "checkpoint=none", "device=cpu")


@pytest.mark.parametrize("mode", ["smoothed", "plain"])
def test_a_loss_with_nothing_to_simplify_stays_and_says_so_once(mode: str, tmp_path: Path) -> None:
    run = build(checked(*SMALL, "loss=bpr", "task=supervised", f"loss_mode={mode}"), tmp_path)
    assert isinstance(run.task.loss, BPR)  # type: ignore[attr-defined]
    assert run.notes.count(f"loss_mode={mode} changes nothing: BPR has nothing to simplify") == 1


@pytest.mark.parametrize(("mode", "inner"), [("as_is", FocalLoss), ("smoothed", FocalLoss), ("plain", CrossEntropy)])
def test_a_z_loss_is_composed_around_another_loss(mode: str, inner: type, tmp_path: Path) -> None:
    words = ("loss=z_loss", "loss@loss.loss=focal", "loss.coefficient=0.5", "loss.loss.gamma=3", f"loss_mode={mode}")
    run = build(checked(*SMALL, *words), tmp_path)
    loss = run.task.loss  # type: ignore[attr-defined]
    assert isinstance(loss, ZLoss) and type(loss.loss) is inner
    assert loss.coefficient == 0.5
    assert not any("nothing to simplify" in note for note in run.notes)
    weighted = build(checked(*SMALL, "loss=z_loss", "loss@loss.loss=weighted"), tmp_path / "weighted")
    assert isinstance(weighted.task.loss.loss, WeightedCrossEntropy)  # type: ignore[attr-defined]


def test_plain_makes_no_other_kind_of_loss() -> None:
    for loss in (MeanSquaredError(), BPR(), Dice(), GaussianNLL()):
        assert loss.simplified("plain") is loss and loss.simplified("smoothed") is loss
    plain = BinaryCrossEntropy(3.0, 0.2, -1).simplified("plain")
    assert isinstance(plain, BinaryCrossEntropy)
    assert (plain.positive_weight, plain.label_smoothing, plain.ignore_index) == (1.0, 0.0, -1)
    assert FocalLoss(ignore_index=-1).simplified("plain").ignore_index == -1


def test_every_loss_is_documented_with_formula_and_source() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "losses.md").read_text()
    for group in ("loss", "task"):
        assert [name for name in option_names(group) if f"`{name}`" not in text] == []
    kinds = [kind for name in stabletrain.loss.__all__ if isinstance(kind := getattr(stabletrain.loss, name), type)]
    assert len(kinds) == 17
    for kind in kinds:
        if kind is not Loss:
            said = kind.__doc__ or ""
            assert "`" in said.partition("Args:")[0] and "References:" in said and "Example:" in said, kind
            assert kind.tasks is not None and "supervised" in kind.tasks
