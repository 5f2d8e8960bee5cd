"""Augmentations: what they change, what they leave alone, and that a key decides them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composed import checked
from stabletrain.augmentation import (
    Composition,
    CutMix,
    FeatureDropout,
    Jitter,
    Mixup,
    Noise,
    RandomCropFlip,
    Unchanged,
)
from stabletrain.build import build
from stabletrain.data import digits, with_facts
from stabletrain.errors import ConfigurationError
from stabletrain.randomness import key, keyed


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(24.0).reshape(6, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2])


def test_unchanged_returns_the_data_itself() -> None:
    data = batch()
    assert Unchanged()(data) is data


SERIES = [torch.randn(length, 3, generator=torch.Generator().manual_seed(length)) for length in (5, 1, 9, 30, 4, 7)]
IMAGES = torch.rand(6, 2, 8, 7, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
EVERY: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "noise": (Noise(0.5), IMAGES),
    "mixup": (Mixup(0.4, 3), IMAGES),
    "cutmix": (CutMix(1.0, 3), IMAGES),
    "jitter": (Jitter(0.1, 0.1, 0.5), SERIES),
    "feature_dropout": (FeatureDropout(0.5), SERIES),
    "random_crop_flip": (RandomCropFlip(2), IMAGES),
    "composition": (Composition([RandomCropFlip(2), Mixup(0.4, 3), CutMix(1.0, 3), Noise(0.1)]), IMAGES),
}


def copied(inputs: Any) -> Any:
    return [item.clone() for item in inputs] if isinstance(inputs, list) else inputs.clone()


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other)


@pytest.mark.parametrize("name", EVERY)
def test_a_key_decides_everything_and_the_data_stays(name: str) -> None:
    augmentation, inputs = EVERY[name]
    before = copied(inputs)
    results = []
    for number in (1, 1, 2):
        with keyed(key(number)):
            results.append(augmentation((inputs, LABELS)))
    assert equal(results[0], results[1])
    assert not equal(results[0][0], results[2][0])
    assert equal(inputs, before)
    assert [item.shape for item in results[0][0]] == [item.shape for item in inputs]
    assert all(item.dtype == torch.float32 for item in results[0][0])


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


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    alpha=st.sampled_from([0.05, 1.0, 20.0]),
    number=st.integers(0, 10**6),
)
def test_cutmix_mixes_the_targets_by_the_area_that_was_replaced(
    height: int, width: int, alpha: float, number: int
) -> None:
    # Each image is full of its own number, so that the pixels say whose they are.
    images = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 1, height, width)
    with keyed(key(number)):
        mixed, targets = CutMix(alpha, 4)((images, torch.arange(4)))
    area = torch.stack([(mixed == owner).double().mean((1, 2, 3)) for owner in range(4)], dim=1)
    torch.testing.assert_close(targets.double(), area, rtol=0, atol=1e-6)
    rows, columns = (mixed[1, 0] != 1.0).any(1), (mixed[1, 0] != 1.0).any(0)
    assert int((mixed[1] != 1.0).sum()) == int(rows.sum()) * int(columns.sum())  # a box


def test_the_area_of_cutmix_follows_the_beta_distribution() -> None:
    # A box has the side sqrt(1 - lambda), with a uniform lambda, unless the image's border cuts it off.
    images = torch.arange(2.0).reshape(2, 1, 1, 1).expand(2, 1, 100, 100)
    sides = []
    for number in range(400):
        with keyed(key("area", number)):
            mixed, _ = CutMix(1.0, 2)((images, torch.arange(2)))
        other = mixed[0, 0] != 0.0
        if bool(other.any()):
            rows, columns = int(other.any(1).sum()), int(other.any(0).sum())
            inside = not bool(other[0].any() | other[-1].any() | other[:, 0].any() | other[:, -1].any())
            assert not inside or rows == columns
            sides.append(max(rows, columns) / 100)
    # Of a side s around a uniform centre, the larger of two visible spans: by simulation of the formula itself.
    random = np.random.default_rng(0)
    side, centres = np.sqrt(random.random(100_000)), random.random((2, 100_000))
    visible = np.minimum(1, centres + side / 2) - np.maximum(0, centres - side / 2)
    assert np.mean(sides) == pytest.approx(visible.max(0).mean(), abs=0.03)


def test_jitter_scales_shifts_and_silences_each_sample_by_itself() -> None:
    ones = torch.ones(4000, 20, 2)
    with keyed(key(0)):
        changed, _ = Jitter(scale=0.15, shift=0.0, mask=0.5)((ones, None))
    silent = (changed == 0).all(2)
    assert torch.equal(silent, (changed == 0).any(2))
    lengths = silent.sum(1)
    counts = torch.bincount(lengths, minlength=11).double() / 4000
    torch.testing.assert_close(counts, torch.full((11,), 1 / 11, dtype=torch.float64), rtol=0, atol=0.025)
    starts = silent.float().argmax(1)[lengths == 10]
    assert set(starts.tolist()) == set(range(11))
    edges = silent.int().diff(dim=1).abs().sum(1)
    assert int(edges.max()) <= 2  # one span
    factors = changed.max(1).values
    assert float(factors.mean()) == pytest.approx(1.0, abs=0.02)
    assert float(factors.std()) == pytest.approx(0.15, rel=0.05)
    constant = torch.where(silent[:, :, None], factors[:, None], changed)
    assert torch.equal(constant, factors[:, None].expand_as(constant))  # one factor for all of a feature's steps
    with keyed(key(0)):
        shifted, _ = Jitter(scale=0.0, shift=0.2, mask=0.0)((torch.zeros(4000, 5, 3), None))
    assert torch.equal(shifted, shifted[:, :1].expand_as(shifted))
    assert float(shifted.std()) == pytest.approx(0.2, rel=0.05)


def test_a_list_of_sequences_is_changed_as_a_tensor_of_them_would_be() -> None:
    series = torch.randn(6, 9, 3, generator=torch.Generator().manual_seed(1))
    for augmentation in (Jitter(0.2, 0.3, 0.6), FeatureDropout(0.4)):
        with keyed(key(4)):
            as_one, _ = augmentation((series, LABELS))
        with keyed(key(4)):
            as_list, _ = augmentation((list(series), LABELS))
        assert torch.equal(torch.stack(as_list), as_one)


def test_feature_dropout_leaves_out_whole_features_with_the_given_probability() -> None:
    for shape, steps in (((500, 40), ()), ((500, 7, 40), (1,)), ((500, 40, 3, 2), (2, 3))):
        with keyed(key(5)):
            left, _ = FeatureDropout(0.3)((torch.full(shape, 2.0), None))
        gone = (left == 0).float()
        assert set(left.unique().tolist()) == {0.0, 2.0}
        share = gone.mean(steps) if steps else gone
        assert set(share.unique().tolist()) == {0.0, 1.0}
        assert float(share.mean()) == pytest.approx(0.3, abs=0.015)
    with keyed(key(5)):
        assert bool(torch.isfinite(FeatureDropout(0.99)((torch.tensor([[math.nan] * 50]), None))[0]).any())


def test_crop_and_flip_move_each_image_as_a_whole() -> None:
    # Each pixel holds its place, from 1, so that the result tells where it came from.
    height, width, margin = 5, 6, 2
    places = torch.arange(1.0, height * width + 1).reshape(1, 1, height, width)
    expected = {}
    padded = torch.nn.functional.pad(places, [margin] * 4)[0, 0]
    for top in range(2 * margin + 1):
        for left in range(2 * margin + 1):
            cut = padded[top : top + height, left : left + width]
            expected |= {
                tuple(cut.flatten().tolist()): (top, left, 0),
                tuple(cut.flip(1).flatten().tolist()): (top, left, 1),
            }
    with keyed(key(6)):
        moved, _ = RandomCropFlip(margin, flip=0.25)((places.expand(3000, 2, height, width), None))
    assert torch.equal(moved[:, 0], moved[:, 1])  # channels together
    found = [expected[tuple(image.flatten().tolist())] for image in moved[:, 0]]
    assert set(found) == set(expected.values())
    assert sum(flipped for *_, flipped in found) / 3000 == pytest.approx(0.25, abs=0.03)
    assert torch.equal(RandomCropFlip(0, flip=0.0)((IMAGES, None))[0], IMAGES)
    assert torch.equal(RandomCropFlip(0, flip=1.0)((IMAGES, None))[0], IMAGES.flip(3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", EVERY)
def test_the_smallest_and_the_largest_keep_shape_and_type(name: str, dtype: torch.dtype) -> None:
    augmentation, inputs = EVERY[name]
    large = torch.finfo(dtype).max / 8
    if isinstance(inputs, list):
        small: Any = [torch.full((length, 1), large, dtype=dtype) for length in (0, 1, 2)]
    else:
        small = torch.full((1, 1, 1, 1), large, dtype=dtype)
    changed, targets = augmentation((small, torch.arange(len(small))))
    assert [item.shape for item in changed] == [item.shape for item in small]
    assert all(item.dtype == dtype and bool(torch.isfinite(item).all()) for item in changed)
    assert len(targets) == len(small)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["mixup", "cutmix", "noise", "feature_dropout", "random_crop_flip"]), max_size=5))
def test_targets_of_any_composition_are_distributions(names: list[str]) -> None:
    parts = [EVERY[name][0] for name in names]
    with keyed(key(7)):
        inputs, targets = Composition(parts)((IMAGES, LABELS))
    assert inputs.shape == IMAGES.shape
    mixing = {"mixup", "cutmix"} & set(names)
    assert targets.is_floating_point() == bool(mixing)
    if mixing:
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
        assert bool((targets >= 0).all())
    else:
        assert targets is LABELS


def test_a_composition_is_its_parts_one_after_another() -> None:
    with keyed(key(8)):
        together = Composition([Noise(0.2), Mixup(0.4, 3)])((IMAGES, LABELS))
    with keyed(key(8)):
        one_by_one = Mixup(0.4, 3)(Noise(0.2)((IMAGES, LABELS)))
    assert equal(together, one_by_one)
    data = batch()
    assert Composition([])(data) is data


def test_a_composition_is_written_with_the_names_of_options(tmp_path: Path) -> None:
    words = ("augmentation=composition", "augmentation.parts=[random_crop_flip,{noise: {std: 0.5}},mixup]")
    config = with_facts(checked("batch_size=64", *words), digits())
    crop, noise, mixup = config["augmentation"]["parts"]
    assert crop == {**checked("augmentation=random_crop_flip")["augmentation"]}
    assert noise == {"_target_": "stabletrain.augmentation.Noise", "std": 0.5}
    assert mixup["num_classes"] == 10
    run = build(checked("tracking=none", "checkpoint=none", "device=cpu", *words), tmp_path)
    assert [type(part) for part in run.augmentation.parts] == [RandomCropFlip, Noise, Mixup]
    own = "augmentation.parts=[{_target_: stabletrain.augmentation.Noise, std: 1.0}]"
    assert checked("augmentation=composition", own)["augmentation"]["parts"][0]["std"] == 1.0


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ("[nois]", ["augmentation.parts[0]", "Did you mean 'noise'?"]),
        ("[noise,[mixup]]", ["augmentation.parts[1]", "cutmix"]),
        ("[composition]", ["augmentation.parts[0]"]),
        ("[{noise: 0.5}]", ["augmentation.parts[0]", "std"]),
        ("[{noise: {sdt: 0.5}}]", ["augmentation.parts[0].sdt", "Did you mean 'std'?"]),
    ],
)
def test_a_wrong_part_is_told(parts: str, words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as error:
        checked("augmentation=composition", f"augmentation.parts={parts}")
    assert all(word in str(error.value) for word in words), error.value


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
        (lambda: CutMix(0.0, 3), ["alpha", "cutmix", "above 0"]),
        (lambda: CutMix(1.0, 1), ["num_classes", "cutmix", "from 2"]),
        (lambda: Jitter(scale=-1.0), ["scale", "-1.0"]),
        (lambda: Jitter(shift=math.inf), ["shift", "inf"]),
        (lambda: Jitter(mask=1.5), ["mask", "1.5", "to 1"]),
        (lambda: FeatureDropout(1.0), ["share", "1.0", "below 1"]),
        (lambda: RandomCropFlip(-1), ["padding", "-1"]),
        (lambda: RandomCropFlip(1.5), ["padding", "1.5"]),  # type: ignore[arg-type]
        (lambda: RandomCropFlip(1, flip=1.1), ["flip", "1.1"]),
        (lambda: Composition(["noise"]), ["augmentation.parts[0]", "noise"]),  # type: ignore[list-item]
        (lambda: CutMix(1.0, 3)((SERIES, LABELS)), ["cutmix", "list", "[B, C, H, W]"]),
        (lambda: RandomCropFlip()((torch.zeros(2, 3), None)), ["random_crop_flip", "[2, 3]"]),
        (lambda: Jitter()((torch.zeros(2, 3), None)), ["jitter", "[2, 3]", "augmentation=none"]),
        (lambda: Jitter()(([torch.zeros(2)], None)), ["jitter", "list"]),
        (lambda: FeatureDropout()((torch.zeros(2, 3).long(), None)), ["feature_dropout", "int64"]),
        (lambda: Mixup(0.2, 3)((torch.tensor([1, 2]), torch.tensor([0, 1]))), ["int64", "floating"]),
    ],
)
def test_bad_arguments_get_one_message(build: Callable[[], object], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as error:
        build()
    assert all(word in str(error.value) for word in words), error.value
