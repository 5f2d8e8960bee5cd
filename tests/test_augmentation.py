"""Augmentations: what they change, what they leave alone, and that a key decides them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from stabletrain.augmentation import Mixup, Noise, Unchanged
from stabletrain.errors import ConfigurationError
from stabletrain.randomness import key, keyed


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(24.0).reshape(6, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2])


def test_unchanged_returns_the_data_itself() -> None:
    data = batch()
    assert Unchanged()(data) is data


@pytest.mark.parametrize("augmentation", [Noise(0.5), Mixup(0.4, 3)], ids=["noise", "mixup"])
def test_a_key_decides_everything_and_the_data_stays(augmentation: Noise | Mixup) -> None:
    data = batch()
    results = []
    for number in (1, 1, 2):
        with keyed(key(number)):
            results.append(augmentation(data))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[2][0])
    assert torch.equal(data[0], batch()[0])
    assert torch.equal(data[1], batch()[1])


def test_noise_has_the_deviation_that_was_asked_for() -> None:
    with keyed(key(0)):
        inputs, targets = Noise(0.25)((torch.zeros(100, 1000), torch.tensor([1])))
    assert float(inputs.mean()) == pytest.approx(0.0, abs=0.005)
    assert float(inputs.std()) == pytest.approx(0.25, rel=0.02)
    assert torch.equal(targets, torch.tensor([1]))


def test_noise_reaches_every_floating_tensor_of_a_tree_and_no_other() -> None:
    identities = torch.arange(3)
    inputs, _ = Noise(1.0)(({"bags": [torch.zeros(2), torch.zeros(3)], "identity": identities}, torch.zeros(3)))
    assert torch.equal(inputs["identity"], identities)
    assert all(bool((bag != 0).all()) for bag in inputs["bags"])


def test_noise_of_zero_changes_nothing() -> None:
    assert torch.equal(Noise(0)(batch())[0], batch()[0])


def test_mixup_mixes_inputs_and_targets_in_the_same_proportion() -> None:
    # One-hot inputs: what happens to an input happens to its target.
    targets = torch.tensor([0, 1, 2, 3, 0, 1])
    onehot = torch.nn.functional.one_hot(targets, 4).float()
    with keyed(key(3)):
        inputs, mixed = Mixup(1.0, 4)((onehot, targets))
    assert torch.equal(inputs, mixed)
    assert not torch.equal(inputs, onehot)
    torch.testing.assert_close(mixed.sum(1), torch.ones(6))
    assert bool((mixed >= 0).all())


def test_mixup_takes_probabilities() -> None:
    shares = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    with keyed(key(1)):
        _, mixed = Mixup(0.4, 2)((torch.zeros(2, 1), shares))
    torch.testing.assert_close(mixed.sum(1), torch.ones(2))


def test_the_proportion_follows_the_beta_distribution() -> None:
    inputs, targets = torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1])
    seen = []
    for number in range(600):
        with keyed(key("beta", number)):
            mixed, _ = Mixup(2.0, 2)((inputs, targets))
        if float(mixed[0]) != 0.0:
            seen.append(float(mixed[0]))
    mean = sum(seen) / len(seen)
    variance = sum((value - mean) ** 2 for value in seen) / len(seen)
    assert mean == pytest.approx(0.5, abs=0.06)
    assert variance == pytest.approx(2 * 2 / ((2 + 2) ** 2 * (2 + 2 + 1)), rel=0.25)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Noise(-0.1), ["std", "-0.1", "from 0"]),
        (lambda: Noise(math.nan), ["std", "nan"]),
        (lambda: Mixup(0.0, 3), ["alpha", "0.0", "above 0"]),
        (lambda: Mixup(0.2, 1), ["num_classes", "1", "from 2"]),
        (
            lambda: Mixup(0.2, 3)(([torch.zeros(2), torch.zeros(3)], torch.tensor([0, 1]))),
            ["list", "augmentation=none"],
        ),
        (lambda: Mixup(0.2, 3)((torch.tensor([1, 2]), torch.tensor([0, 1]))), ["int64", "floating"]),
    ],
)
def test_bad_arguments_get_one_message(build: Callable[[], object], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as error:
        build()
    assert all(word in str(error.value) for word in words), error.value
