"""Divisions by seed, stratified; what is known of the data; fingerprints."""

from __future__ import annotations

import math
import os
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, TensorDataset

from processes import run
from stabletrain.data import ArrayDataset, Splits, breast_cancer, digits, sequences, split_dataset, split_indices
from stabletrain.errors import ConfigurationError

SHARES = st.sampled_from([0.0, 0.1, 0.15, 0.3, 0.45])


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(3, 40), min_size=1, max_size=5),
    validation=SHARES,
    test=SHARES,
    seed=st.integers(0, 3),
    stratified=st.booleans(),
)
def test_every_sample_goes_into_one_part_and_every_class_into_each(
    sizes: list[int], validation: float, test: float, seed: int, stratified: bool
) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    parts = split_indices(
        len(labels), validation=validation, test=test, seed=seed, classes=labels if stratified else None
    )
    assert sorted(index for part in parts for index in part.tolist()) == list(range(len(labels)))
    for part, share in zip(parts, (1 - validation - test, validation, test), strict=True):
        assert part.tolist() == sorted(part.tolist())
        assert (len(part) == 0) == (share == 0)
        if share > 0 and stratified:
            counts = np.bincount(labels[part.numpy()], minlength=len(sizes))
            assert (counts >= 1).all()
            assert (np.abs(counts - share * np.array(sizes)) <= 1.5).all()
    again = split_indices(
        len(labels), validation=validation, test=test, seed=seed, classes=labels if stratified else None
    )
    assert all(torch.equal(one, other) for one, other in zip(parts, again, strict=True))


def test_another_seed_is_another_division() -> None:
    first, second = (split_indices(100, seed=seed)[0].tolist() for seed in (0, 1))
    assert first != second


class Images(Dataset[Any]):
    """A user's data set: counts how often it is read."""

    def __init__(self, count: int = 30, targets: bool = True) -> None:
        self.count = count
        self.reads = 0
        if targets:
            self.targets = [index % 3 for index in range(count)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.reads += 1
        return torch.full((3, 4, 5), float(index)), index % 3


def test_any_map_style_data_set_is_divided_stratified() -> None:
    images = Images()
    splits = split_dataset(images, validation=0.2, test=0.1)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [21, 6, 3]
    assert splits.facts == {
        "num_classes": 3,
        "class_counts": [7, 7, 7],
        "in_channels": 3,
        "image_size": [4, 5],
    }
    assert sorted(int(splits.test[index][1]) for index in range(3)) == [0, 1, 2]
    assert splits.name == "Images"
    assert images.reads <= 4  # the test's own three, and one for the shape


def test_a_data_set_without_class_numbers_is_divided_too() -> None:
    splits = split_dataset(Images(targets=False), validation=0.0, test=0.2)
    assert splits.validation is None
    assert [len(splits.train), len(splits.test)] == [24, 6]
    assert "num_classes" not in splits.facts


def test_finished_splits_are_passed_on() -> None:
    splits = split_dataset(Images())
    assert split_dataset(splits) is splits


def test_facts_that_are_given_win() -> None:
    train = ArrayDataset(torch.zeros(2, 3), torch.tensor([0, 1]))
    assert Splits(train, facts={"num_classes": 5}).facts == {
        "num_classes": 5,
        "class_counts": [1, 1, 0, 0, 0],
        "in_features": 3,
    }


@pytest.mark.parametrize("option", [digits, breast_cancer, sequences])
def test_built_in_data_is_ready_to_train_on(option: Any) -> None:
    splits = option(seed=3)
    sizes = [len(part) for part in (splits.train, splits.validation, splits.test)]
    total = {"digits": 1797, "breast_cancer": 569, "sequences": 900}[splits.name]
    assert sum(sizes) == total
    assert sizes[1] == pytest.approx(0.15 * total, abs=5)
    assert sizes[2] == pytest.approx(0.15 * total, abs=5)
    assert splits.facts["num_classes"] == len(splits.facts["class_counts"])
    for part in (splits.train, splits.validation, splits.test):
        assert set(part.targets.tolist()) == set(range(splits.facts["num_classes"]))
        for tensor in part.inputs:
            assert tensor.dtype == torch.float32
            assert torch.isfinite(tensor).all()
    assert splits.fingerprint() == option(seed=3).fingerprint()
    assert splits.fingerprint() != option(seed=4).fingerprint()


def test_the_digits_are_images_from_0_to_1() -> None:
    splits = digits()
    assert splits.train.inputs.shape[1:] == (1, 8, 8)
    assert float(splits.train.inputs.min()) == 0.0
    assert float(splits.train.inputs.max()) == 1.0
    assert splits.facts["image_size"] == [8, 8]


def test_measurements_are_standardised_by_the_training_part() -> None:
    splits = breast_cancer()
    assert splits.facts["in_features"] == 30
    torch.testing.assert_close(splits.train.inputs.mean(0), torch.zeros(30), atol=1e-5, rtol=0)
    torch.testing.assert_close(splits.train.inputs.std(0, correction=0), torch.ones(30), atol=1e-5, rtol=0)
    assert float(splits.test.inputs.mean(0).abs().max()) > 1e-3
    assert splits.classes == ("malignant", "benign")


def test_generated_sequences_differ_in_length_and_follow_the_arguments() -> None:
    splits = sequences(samples=60, num_classes=2, in_features=3, min_length=2, max_length=6, seed=1)
    lengths = {len(sequence) for sequence in splits.train.inputs}
    assert lengths <= set(range(2, 7))
    assert len(lengths) > 2
    assert splits.facts == {"num_classes": 2, "class_counts": [22, 22], "in_features": 3}
    assert isinstance(splits.train.gather(torch.tensor([0, 1]))[0], list)


def variants() -> list[Splits]:
    """Data that differs from the first one in one respect each."""
    inputs, targets = torch.arange(12.0).reshape(6, 2), torch.tensor([0, 1, 0, 1, 0, 1])
    changed = inputs.clone()
    changed[5, 1] += 1e-3
    other = targets.clone()
    other[0] = 1
    return [
        Splits(ArrayDataset(inputs, targets)),
        Splits(ArrayDataset(changed, targets)),
        Splits(ArrayDataset(inputs, other)),
        Splits(ArrayDataset(inputs.double(), targets)),
        Splits(ArrayDataset(inputs.reshape(6, 1, 2), targets)),
        Splits(ArrayDataset(inputs.flip(0), targets.flip(0))),
        Splits(ArrayDataset(list(inputs), targets)),
        Splits(ArrayDataset(inputs[:5], targets[:5])),
        Splits(ArrayDataset(inputs, targets), validation=ArrayDataset(inputs, targets)),
        Splits(TensorDataset(inputs, targets)),
        Splits(TensorDataset(inputs.double(), targets)),
        Splits(TensorDataset(inputs + 1, targets)),
    ]


def test_a_fingerprint_changes_with_everything_that_counts_and_with_nothing_else() -> None:
    first, second = ([splits.fingerprint() for splits in variants()] for _ in range(2))
    assert first == second
    assert len(set(first)) == len(first)


def test_a_fingerprint_is_the_same_in_another_process() -> None:
    code = "from stabletrain.data import digits; print(digits(seed=2).fingerprint())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    other = run([sys.executable, "-c", code], environment=environment)
    assert other.stdout.strip() == digits(seed=2).fingerprint()


def test_samples_that_are_never_the_same_twice_count_with_their_shape() -> None:
    class Own(Images):
        generator = np.random.default_rng()

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.from_numpy(self.generator.random(3)), 0

    class Wider(Own):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.from_numpy(self.generator.random(4)), 0

    assert Splits(Own()).fingerprint() == Splits(Own()).fingerprint()
    assert Splits(Own()).fingerprint() != Splits(Wider()).fingerprint()


def test_large_data_is_sampled_for_the_fingerprint() -> None:
    large = torch.zeros(3000, 4000)  # 48 MB
    first = Splits(ArrayDataset(large, torch.zeros(3000, dtype=torch.int64))).fingerprint()
    large += 1
    assert Splits(ArrayDataset(large, torch.zeros(3000, dtype=torch.int64))).fingerprint() != first


class Stream(torch.utils.data.IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter([1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"validation": -0.1}, ["validation", "-0.1", "from 0 to below 1"]),
        ({"test": 1.0}, ["test", "1.0", "below 1"]),
        ({"test": math.nan}, ["test", "nan"]),
        ({"test": "much"}, ["test", "'much'"]),
        ({"validation": 0.5, "test": 0.5}, ["0.5", "nothing to train on"]),
        ({"dataset": ArrayDataset(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))}, ["empty", "0 samples"]),
        ({"dataset": Images(2, targets=False)}, ["2 samples", "3 parts", "validation=0"]),
        ({"dataset": Images(7)}, ["class 1", "2 samples", "3 parts", "test=0"]),
        ({"dataset": Stream()}, ["Stream", "map-style"]),
        ({"dataset": 5}, ["int", "map-style"]),
        ({"dataset": ArrayDataset(torch.zeros(9, 1), torch.arange(9) % 3 - 1)}, ["label -1", "from 0"]),
    ],
)
def test_bad_divisions_get_one_message(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as error:
        split_dataset(**{"dataset": Images(), **arguments})
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "arguments", [{"min_length": 5, "max_length": 4}, {"num_classes": 1}, {"noise": math.nan}, {"samples": 0}]
)
def test_impossible_sequences_get_one_message(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        sequences(**arguments)
