"""Bags: the model against a loop over bags, empty bags, the data, the AUC, and a run with bad bags."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import nn

from composed import checked
from stabletrain.build import build
from stabletrain.data import ArrayDataset, Microbatch, OrderedLoader, Splits, digit_bags, from_bag_table
from stabletrain.errors import ConfigurationError
from stabletrain.loss import CrossEntropy
from stabletrain.model import BagClassifier
from stabletrain.precision import Precision
from stabletrain.task import RankedClassification
from stabletrain.trainer import train

RAW: dict[str, Any] = {"standardize": False, "validation": 0.0, "test": 0.0}


def bags_of(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, 3, generator=generator, dtype=torch.float64) for length in lengths]


def network(**options: Any) -> BagClassifier:
    torch.manual_seed(1)
    return BagClassifier(3, 2, **{"hidden": 8, "attention": 5, "dropout": 0.0, **options}).double()


def by_a_loop(model: BagClassifier, bags: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Equation 9 of the paper, bag by bag, with BatchNorm by hand over the instances of all bags."""
    values = torch.cat(bags)
    for place in (0, 3):
        linear, norm = model.encoder[place], model.encoder[place + 1]
        values = values @ linear.weight.T
        if model.training and len(values) > 1:
            mean, variance = values.mean(0), values.var(0, correction=0)
        else:
            mean, variance = norm.running_mean, norm.running_var
        values = ((values - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias).clamp_min(0)
    logits, attentions, start = [], [], 0
    for bag in bags:
        own = values[start : start + len(bag)]
        start += len(bag)
        scores = [model.score.weight[0] @ (torch.tanh(model.content(h)) * torch.sigmoid(model.gate(h))) for h in own]
        clamped = [score.clamp(-model.clamp, model.clamp) if model.clamp is not None else score for score in scores]
        powers = [score.exp() for score in clamped]
        weights = [power / sum(powers) for power in powers]
        mean = sum((weight * h for weight, h in zip(weights, own, strict=True)), torch.zeros(8, dtype=torch.float64))
        logits.append(model.classifier(mean))
        attentions.append(torch.stack(weights) if weights else torch.zeros(0, dtype=torch.float64))
    return torch.stack(logits), attentions


# ------------------------------------------------------------------------------------------------------ the model


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    training=st.booleans(),
    clamp=st.sampled_from([None, 0.02, 10.0]),
)
def test_the_model_is_the_formula(lengths: list[int], training: bool, clamp: float | None) -> None:
    model = network(clamp=clamp).train(training)
    bags = [bag.requires_grad_() for bag in bags_of(lengths)]
    expected, attentions = by_a_loop(model, bags)
    logits = model(bags)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-12)
    for one, other in zip(model.attention(bags), attentions, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    weights = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = [*bags, *model.parameters()]
    ours, theirs = (
        torch.autograd.grad((result * weights).sum(), wanted, allow_unused=True) for result in (logits, expected)
    )
    for one, other, tensor in zip(ours, theirs, wanted, strict=True):
        none = torch.zeros_like(tensor)
        torch.testing.assert_close(none if one is None else one, none if other is None else other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_an_empty_bag_has_defined_logits_and_finite_gradients(precision: str) -> None:
    for lengths in ([0], [0, 0], [4, 0, 2], [1, 0]):
        model = network().float()
        with Precision(precision).autocast():
            logits = model([bag.float() for bag in bags_of(lengths)])
        torch.testing.assert_close(logits[lengths.index(0)].float(), model.classifier.bias, rtol=1e-2, atol=1e-3)
        nn.functional.cross_entropy(logits.float(), torch.zeros(len(lengths), dtype=torch.int64)).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), (name, lengths)
        assert all(torch.isfinite(buffer).all() for buffer in model.buffers())


def test_statistics_are_those_of_a_batch_norm_over_all_instances() -> None:
    ours, torchs = network().encoder[1], nn.BatchNorm1d(8).double()
    assert list(ours.state_dict()) == list(torchs.state_dict())
    for length in (5, 2, 7):
        instances = torch.randn(length, 8, dtype=torch.float64)
        torch.testing.assert_close(ours(instances), torchs(instances))
    ours(instances[:1])  # changes nothing
    for one, other in zip(ours.state_dict().values(), torchs.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(ours(instances[:1]), torchs.eval()(instances[:1]))


def test_bags_of_one_size_may_come_as_one_tensor() -> None:
    bags = bags_of([4, 4, 4])
    assert torch.equal(network()(torch.stack(bags)), network()(bags))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_instance_stays_in_its_bag_where_statistics_are_fixed(value: float) -> None:
    model, bags = network().eval(), bags_of([3, 5, 2])
    healthy = model(bags)
    bags[1][4, 0] = value
    assert torch.equal(model(bags)[[0, 2]], healthy[[0, 2]])
    assert not torch.isfinite(model(bags)[1]).all()


def test_scores_that_overflow_in_float16_are_what_the_clamp_is_for() -> None:
    outcomes = []
    for clamp in (10.0, None):
        model = network(clamp=clamp).float()
        with torch.no_grad():
            model.score.weight.fill_(6e4)  # finite in float16, as is tanh times sigmoid; five of them added up are not
            model.content.bias.fill_(9.0)
            model.gate.bias.fill_(9.0)
        with Precision("float16").autocast():
            logits = model([bag.float() for bag in bags_of([5, 3])])
        nn.functional.cross_entropy(logits.float(), torch.tensor([0, 1])).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        outcomes.append([bool(torch.isfinite(item).all()) for item in (logits, *gradients)])
    assert all(outcomes[0])
    assert not all(outcomes[1])


@pytest.mark.parametrize("clamp", [0, -1.0, math.inf, math.nan, True])
def test_a_clamp_that_makes_no_sense_is_refused(clamp: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"a finite number above 0 is allowed"):
        BagClassifier(3, 2, clamp=clamp)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"place 1 of the batch has the shape \[3, 4\]; \[instances, 3\]"):
        network()([torch.zeros(2, 3), torch.zeros(3, 4)])


# ------------------------------------------------------------------------------------------------------- the task


@settings(max_examples=25, deadline=None)
@given(
    margins=st.lists(st.sampled_from([-40.0, -3.0, -0.5, 0.0, 0.25, 0.5, 2.0, 31.0]), min_size=2, max_size=20),
    batch_size=st.integers(1, 7),
    seed=st.integers(0, 9),
)
def test_the_auc_is_scikit_learns(margins: list[float], batch_size: int, seed: int) -> None:
    targets = torch.randint(2, (len(margins),), generator=torch.Generator().manual_seed(seed))
    logits = torch.stack([torch.zeros(len(margins)), torch.tensor(margins)], dim=1)
    loader = OrderedLoader(ArrayDataset(logits, targets), batch_size=batch_size)
    found = RankedClassification(CrossEntropy()).evaluate(nn.Identity(), loader)
    expected = roc_auc_score(targets, margins) if 0 < targets.sum() < len(targets) else 0.5
    assert found["auc"] == pytest.approx(expected, abs=1e-12)
    assert list(found) == ["loss", "accuracy", "auc"]


def test_the_auc_of_any_margins_is_within_its_bound() -> None:
    margins = torch.randn(500, generator=torch.Generator().manual_seed(3))
    targets = (margins + torch.randn(500, generator=torch.Generator().manual_seed(4)) > 0).long()
    data = ArrayDataset(torch.stack([-margins, margins], 1), targets)
    found = RankedClassification(CrossEntropy()).evaluate(nn.Identity(), OrderedLoader(data, batch_size=64))["auc"]
    apart = (2 * margins[targets == 1].unsqueeze(1) - 2 * margins[targets == 0]).abs()
    bound = 0.5 * float((apart < 1 / 2048).double().mean())
    assert 0 < bound < 1e-3
    assert abs(found - roc_auc_score(targets, margins)) <= bound


def test_a_margin_that_is_nan_is_told_and_three_classes_are_refused() -> None:
    data = ArrayDataset(torch.tensor([[0.0, 1.0], [math.nan, 1.0]]), torch.tensor([0, 1]))
    found = RankedClassification(CrossEntropy()).evaluate(nn.Identity(), OrderedLoader(data, batch_size=2))
    assert math.isnan(found["auc"])
    three = ArrayDataset(torch.zeros(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ConfigurationError, match=r"the model has 3 outputs\. Choose task=classification"):
        RankedClassification(CrossEntropy()).evaluate(nn.Identity(), OrderedLoader(three, batch_size=2))


def test_processes_that_share_the_batches_add_up_to_what_one_sees() -> None:
    margins = torch.randn(30, generator=torch.Generator().manual_seed(5))
    data = ArrayDataset(torch.stack([-margins, margins], 1), torch.arange(30) % 2)
    batches = list(OrderedLoader(data, batch_size=4))
    task = RankedClassification(CrossEntropy())
    seen: list[list[torch.Tensor]] = [[], []]
    for rank in range(2):
        task.evaluate(nn.Identity(), batches[rank::2], lambda own, kept=seen[rank]: kept.append(own) or own)
    both = iter([first + second for first, second in zip(seen[0], seen[1], strict=True)])
    added = task.evaluate(nn.Identity(), batches[::2], lambda own: next(both))
    assert added == pytest.approx(task.evaluate(nn.Identity(), batches))


# ------------------------------------------------------------------------------------------------ bags of digits


@pytest.mark.parametrize("seed", [0, 3])
def test_labels_say_whether_the_digit_is_there_and_no_image_is_in_two_parts(seed: int) -> None:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    splits = digit_bags(bags=120, digit=4, witnesses=0.2, seed=seed)
    seen = []
    for part in (splits.train, splits.validation, splits.test):
        assert abs(2 * int(part.targets.sum()) - len(part)) <= 1
        for bag, target, digits, images in zip(part.inputs, part.targets, part.digits, part.images, strict=True):
            assert bool((digits == 4).any()) == bool(target)
            np.testing.assert_array_equal(digits, labels[images])
            np.testing.assert_allclose(bag, pixels[images] / 16)
            assert len(set(images.tolist())) == len(images) >= 3
        seen.append({int(image) for images in part.images for image in images})
    assert all(not one & other for one, other in [(seen[0], seen[1]), (seen[0], seen[2]), (seen[1], seen[2])])
    places = [int((digits == 4).nonzero()[0]) for digits in splits.train.digits if (digits == 4).any()]
    assert len(set(places)) > 5
    assert splits.fingerprint() == digit_bags(bags=120, digit=4, witnesses=0.2, seed=seed).fingerprint()
    assert splits.fingerprint() != digit_bags(bags=120, digit=4, witnesses=0.2, seed=seed + 1).fingerprint()
    assert splits.facts == {"num_classes": 2, "class_counts": [42, 42], "in_features": 64}


@pytest.mark.parametrize(
    "options", [{"bags": 5}, {"digit": 10}, {"min_size": 0}, {"mean_size": 2}, {"deviation": -1}, {"witnesses": 1.5}]
)
def test_numbers_that_describe_no_bags_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="allowed"):
        digit_bags(**options)


# ------------------------------------------------------------------------------------------------------ own tables

TABLE = "slide,size,label,colour\na,1,yes,5\nb,2,no,6\na,3,yes,7\nc,4,no,8\n"


def contents(splits: Splits) -> tuple[list[Any], list[int]]:
    return [bag.tolist() for bag in splits.train.inputs], splits.train.targets.tolist()


def test_rows_of_a_table_are_instances(tmp_path: Path) -> None:
    from pyarrow import csv, parquet

    path = tmp_path / "slides.csv"
    path.write_text(TABLE)
    splits = from_bag_table(path, "slide", **RAW)
    assert contents(splits) == ([[[1, 5], [3, 7]], [[2, 6]], [[4, 8]]], [1, 0, 0])
    assert (splits.name, splits.classes) == ("slides", ("no", "yes"))
    parquet.write_table(csv.read_csv(path), tmp_path / "slides.parquet")
    assert contents(from_bag_table(tmp_path / "slides.parquet", "slide", **RAW)) == contents(splits)
    chosen = from_bag_table(path, "slide", features=["colour"], classes=["yes", "no"], **RAW)
    assert contents(chosen) == ([[[5], [7]], [[6]], [[8]]], [0, 1, 1])


def test_rows_of_a_table_may_name_files(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.array([[1, 2], [3, 4]], dtype=np.int16))
    torch.save(torch.tensor([[5.0, 6.0]], dtype=torch.bfloat16), tmp_path / "two.pt")
    np.save(tmp_path / "none.npy", np.zeros((0, 2)))
    path = tmp_path / "slides.csv"
    path.write_text("bag,label,file\na,0,one.npy\nb,1,none.npy\na,0,two.pt\n")
    splits = from_bag_table(path, file="file", **RAW)
    assert contents(splits) == ([[[1, 2], [3, 4], [5, 6]], []], [0, 1])
    assert splits.train.inputs[1].shape == (0, 2)
    assert "1 of 2 bags are empty" in splits.notes[0]


def test_features_are_standardised_by_the_training_part_and_bags_stay_whole(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = [f"{number % 40},{number % 40 % 2},{random.normal(7, 3)},{number % 40}" for number in range(200)]
    path = tmp_path / "many.csv"
    path.write_text("\n".join(["bag,label,a,b", *rows]))
    splits = from_bag_table(path, validation=0.2, test=0.2, seed=1)
    raw = from_bag_table(path, validation=0.2, test=0.2, seed=1, standardize=False)
    known = torch.cat(raw.train.inputs).double()
    expected = (torch.cat(raw.test.inputs).double() - known.mean(0)) / known.std(0, correction=0)
    torch.testing.assert_close(torch.cat(splits.test.inputs).double(), expected, rtol=1e-5, atol=1e-5)
    parts = [{float(bag[0, 1]) for bag in part.inputs} for part in (raw.train, raw.validation, raw.test)]
    assert [len(part) for part in parts] == [24, 8, 8] and len(set.union(*parts)) == 40
    assert all(len(bag) == 5 and len(set(bag[:, 1].tolist())) == 1 for bag in raw.train.inputs)


def test_nan_is_refused_dropped_or_zero(tmp_path: Path) -> None:
    path = tmp_path / "holes.csv"
    path.write_text("bag,label,x\na,0,1\nb,1,\na,0,inf\nb,1,2\n")
    with pytest.raises(ConfigurationError, match=r"line 4: feature 0 .* is inf; 2 of 4 instances hold NaN or Inf"):
        from_bag_table(path, **RAW)
    dropped = from_bag_table(path, nonfinite="drop", **RAW)
    assert contents(dropped)[0] == [[[1]], [[2]]]
    assert "2 of 4 instances were dropped" in dropped.notes[0]
    assert contents(from_bag_table(path, nonfinite="zero", **RAW))[0] == [[[1], [0]], [[0], [2]]]
    with pytest.raises(ConfigurationError, match=r"nonfinite is 'dropp'; allowed.*Did you mean drop"):
        from_bag_table(path, nonfinite="dropp", **RAW)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (TABLE.replace("a,3,yes", "a,3,no"), {}, r"line 4: the bag 'a' has the label 'no', but 'yes' in line 2"),
        (TABLE.replace("\nb,2", "\n,2"), {}, r"line 3: the column 'slide' is empty"),
        (TABLE.replace("c,4,no", "c,4,"), {}, r"line 5: the label is missing"),
        (TABLE.replace("c,4", "c,four"), {}, r"line 5, column 'size': 'four' is not a number"),
        (TABLE, {"bag": "slid"}, r"has no column 'slid'.*Did you mean slide"),
        (TABLE, {"features": ["size", "hue"]}, r"has no column 'hue'"),
        (TABLE, {"features": ["label"]}, r"the features are \['label'\]; name columns besides"),
        ("slide,label\na,0\n", {}, r"the features are none"),
        (TABLE, {"features": ["size"], "file": "colour"}, r"leave one of them out"),
        (TABLE, {"file": "colour"}, r"line 2: the file '5' can't be read: its name ends with ''"),
        ("slide,label\n", {}, r"is empty"),
        ("slide,label,label\na,0,1\n", {}, r"more than one column 'label'"),
    ],
)
def test_what_a_table_can_have_wrong(tmp_path: Path, text: str, options: dict[str, Any], message: str) -> None:
    path = tmp_path / "slides.csv"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        from_bag_table(path, **{"bag": "slide", **options})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"line 3: the file 'two.npy' can't be read: .*No such file"),
        (np.zeros(3), r"line 3: the file 'two.npy' holds float64 of the shape \[3\]"),
        (np.zeros((2, 3)), r"line 3: the file 'two.npy' has 3 features, but the one in line 2 has 2"),
        (np.array([["a"]]), r"line 3: the file 'two.npy' holds <U1"),
        (np.array([[{}]], dtype=object), r"line 3: the file 'two.npy' can't be read: .*pickle"),
    ],
)
def test_what_a_file_of_instances_can_have_wrong(tmp_path: Path, content: Any, message: str) -> None:
    np.save(tmp_path / "one.npy", np.zeros((1, 2)))
    if content is not None:
        np.save(tmp_path / "two.npy", content)
    path = tmp_path / "slides.csv"
    path.write_text("bag,label,file\na,0,one.npy\nb,1,two.npy\n")
    with pytest.raises(ConfigurationError, match=message):
        from_bag_table(path, file="file", **RAW)


def test_a_table_that_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"is neither a \.csv nor a \.parquet file"):
        from_bag_table("slides.xlsx")
    with pytest.raises(ConfigurationError, match="doesn't exist"):
        from_bag_table(tmp_path / "slides.parquet")


# ----------------------------------------------------------------------------------------------------- rehearsals


def small(*overrides: str) -> list[str]:
    return ["experiment=bags", "data.bags=140", "epochs=3", "threads=1", "device=cpu", "tracking=none", *overrides]


def test_bags_with_bad_values_are_named_and_the_model_stays_finite(tmp_path: Path) -> None:
    given = small("preset=stable", "fault=nan_input", "fault.at=3", "guard.max_quarantined=1.0")
    run = build(checked(*given), tmp_path / "run", given)
    summary = train(run)
    assert summary.status == "completed"
    assert summary.quarantined == run.fault.indices != []
    assert summary.rejected == 0 and summary.salvaged >= 1
    assert all(summary.finite.values())
    assert math.isfinite(summary.metrics["test"]["auc"])


def test_a_step_is_salvaged_with_the_one_bag_that_is_left(tmp_path: Path) -> None:
    given = small("preset=stable", "batch_size=2", "fault=nan_part", "fault.at=3", "guard.max_quarantined=1.0")
    run = build(checked(*given), tmp_path / "run", given)
    summary = train(run)
    assert (summary.status, summary.rejected) == ("completed", 0)
    assert summary.salvaged >= 1 and summary.quarantined == run.fault.indices


def test_attention_finds_the_digit_after_a_short_training(tmp_path: Path) -> None:
    given = small("preset=normal", "base_lr=5e-3", "data.bags=200", "data.deviation=0", "epochs=8")
    run = build(checked(*given), tmp_path / "run", given)
    train(run)
    part = digit_bags(bags=200, deviation=0, seed=0).test
    model = run.model.eval()
    assert isinstance(model, BagClassifier)
    positive = part.targets.nonzero().squeeze(1).tolist()
    attention = model.attention([part.inputs[place] for place in positive])
    hits = [int(part.digits[place][int(a.argmax())]) == 9 for place, a in zip(positive, attention, strict=True)]
    assert sum(hits) > 0.6 * len(hits)  # by chance about 0.15


def test_a_batch_names_its_bags(tmp_path: Path) -> None:
    splits = digit_bags(bags=20)
    batch = next(iter(OrderedLoader(splits.train, batch_size=4)))
    assert isinstance(batch, Microbatch)
    assert [bag.shape[1] for bag in batch.data[0]] == [64] * 4
