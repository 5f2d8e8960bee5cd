"""Data that needs no file: scikit-learn's digits and breast cancer tables, and generated sequences."""

from __future__ import annotations

import math

import numpy as np
import torch

from stabletrain.data.arrays import ArrayDataset
from stabletrain.data.splits import Splits, split_dataset
from stabletrain.data.table import Table
from stabletrain.errors import ConfigurationError
from stabletrain.randomness import key


def digits(*, validation: float = 0.15, test: float = 0.15, seed: int = 0) -> Splits:
    """Load scikit-learn's 1,797 handwritten digits, divided by the seed, stratified.

    Args:
        validation: share of the validation part.
        test: share of the test part.
        seed: number that decides which image goes where.

    Returns:
        Inputs float32 [N, 1, 8, 8] from 0 to 1, targets int64 [N] from 0 to 9.

    References:
        E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    """
    from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy((pixels / 16.0).astype(np.float32).reshape(-1, 1, 8, 8))
    data = ArrayDataset(images, torch.from_numpy(labels.astype(np.int64)))
    return split_dataset(data, validation=validation, test=test, seed=seed, name="digits")


def breast_cancer(*, validation: float = 0.15, test: float = 0.15, seed: int = 0) -> Splits:
    """Load scikit-learn's 569 breast cancer cases with 30 measurements each, standardised by the training part.

    Args:
        validation: share of the validation part.
        test: share of the test part.
        seed: number that decides which case goes where.

    Returns:
        Inputs float32 [N, 30], targets int64 [N] (0 malignant, 1 benign).

    References:
        W. Street, W. Wolberg, O. Mangasarian: Nuclear feature extraction for breast tumor diagnosis, 1993.
    """
    from sklearn.datasets import load_breast_cancer  # type: ignore[import-untyped, unused-ignore]

    bunch = load_breast_cancer()
    names = [str(name) for name in bunch.feature_names]
    table = Table(
        features=bunch.data,
        labels=bunch.target.astype(np.int64),
        columns=names.__getitem__,
        classes=[str(name) for name in bunch.target_names],
        source="the breast cancer data",
        where=lambda row: f"row {row} (from 0)",
    )
    return table.splits(validation=validation, test=test, seed=seed, name="breast_cancer")


def sequences(
    *,
    samples: int = 900,
    num_classes: int = 3,
    in_features: int = 4,
    min_length: int = 10,
    max_length: int = 40,
    noise: float = 0.3,
    validation: float = 0.15,
    test: float = 0.15,
    seed: int = 0,
) -> Splits:
    """Generate sequences of different length: noisy rotations, whose class is the direction and speed of the rotation.

    A sequence starts at a random angle, so that no single time step and no average tells its class.

    Args:
        samples: number of sequences.
        num_classes: number of speeds, evenly spaced from -1 to 1 radian per time step.
        in_features: features per time step, a fixed mixture of the rotation's two coordinates.
        min_length: shortest sequence, time steps.
        max_length: longest sequence, time steps.
        noise: standard deviation of what is added to each feature (the rotation has radius 1).
        validation: share of the validation part.
        test: share of the test part.
        seed: number that decides the numbers and which sequence goes where.

    Returns:
        Inputs: a list of N tensors float32 [length, in_features]; targets int64 [N].

    Raises:
        ConfigurationError: for lengths and counts that describe no sequence.

    Example:
        >>> splits = sequences(samples=30, min_length=2, max_length=5)
        >>> inputs, targets = splits.train.gather(torch.arange(3))
        >>> len(inputs), inputs[0].shape[1], targets.shape
        (3, 4, torch.Size([3]))
    """
    if not 1 <= min_length <= max_length or num_classes < 2 or in_features < 1 or not 0 <= noise < math.inf:
        raise ConfigurationError(
            f"sequences were asked for with min_length {min_length}, max_length {max_length}, num_classes "
            f"{num_classes}, in_features {in_features} and noise {noise}; allowed are 1 <= min_length <= max_length, "
            "at least 2 classes, at least 1 feature and a finite noise from 0."
        )
    generator = torch.Generator().manual_seed(key(seed, "sequences"))
    targets = torch.arange(samples) % num_classes
    lengths = torch.randint(min_length, max_length + 1, (samples,), generator=generator).tolist()
    mixture = torch.randn(2, in_features, generator=generator)
    mixture = mixture / mixture.norm(dim=0, keepdim=True).clamp_min(1e-3)
    speeds = torch.linspace(-1, 1, num_classes)
    inputs = []
    for label, length in zip(targets.tolist(), lengths, strict=True):
        angle = 2 * math.pi * torch.rand((), generator=generator) + speeds[label] * torch.arange(length)
        rotation = torch.stack([angle.cos(), angle.sin()], dim=1)
        disturbance = noise * torch.randn(length, in_features, generator=generator)
        inputs.append((rotation[:, :1] * mixture[0] + rotation[:, 1:] * mixture[1]) + disturbance)
    data = ArrayDataset(inputs, targets)
    return split_dataset(data, validation=validation, test=test, seed=seed, name="sequences")
