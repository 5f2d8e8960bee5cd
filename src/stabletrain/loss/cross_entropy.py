"""Cross entropy, with and without weights of the classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F

from stabletrain.checks import number
from stabletrain.errors import ConfigurationError
from stabletrain.loss.base import SMOOTHING, Loss, Modes, Values, wide
from stabletrain.loss.ignoring import apart, by_sample, checked_index
from stabletrain.loss.probability import log_softmax, margin

CLASS_TASKS = ("classification", "next_item", "next_token", "segmentation", "supervised")


class CrossEntropy(Loss):
    """Cross entropy: `-sum_c q_c log p_c` with the target's distribution q.

    Called with logits [B, C] or [B, C, ...] and targets, int64 [B, ...] or probabilities of the logits' shape.

    Args:
        label_smoothing: share of the target that is spread evenly over all classes, from 0 to below 1.
        ignore_index: label that doesn't count; None: every label does.

    References:
        C. Szegedy et al.: Rethinking the Inception Architecture for Computer Vision, 2016 (label smoothing).

    Example:
        >>> per_sample, weights = CrossEntropy()(torch.zeros(2, 4), torch.tensor([0, 3]))
        >>> per_sample, weights is None
        (tensor([1.3863, 1.3863]), True)
    """

    modes: ClassVar[Modes] = {"smoothed": "label smoothing of 0.1", "plain": "no label smoothing"}
    tasks = CLASS_TASKS

    def __init__(self, label_smoothing: float = 0.0, ignore_index: int | None = None) -> None:
        super().__init__()
        self.label_smoothing = number("label_smoothing", label_smoothing, below=1.0)
        self.ignore_index = checked_index(ignore_index)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> Values:
        """Return the loss of each sample, and their weights where some are ignored."""
        logits, targets, ignored = apart(wide(logits), targets, self.ignore_index)
        return by_sample(cross_entropy(logits, targets, self.label_smoothing), ignored=ignored)

    def smoothed(self) -> Loss:
        """Return cross entropy with a label smoothing of 0.1."""
        return CrossEntropy(SMOOTHING, self.ignore_index)

    def plain(self) -> Loss:
        """Return cross entropy without label smoothing."""
        return CrossEntropy(ignore_index=self.ignore_index)


class WeightedCrossEntropy(Loss):
    """Cross entropy in which every class weighs the same in total, however rare it is.

    The weight of class c is `total / (C * count_c)`, and 0 for a class without samples. A sample whose target is a
    mixture weighs the mixture of the weights.

    Args:
        class_counts: number of training samples of each class, [C].
        label_smoothing: share of the target that is spread evenly over all classes, from 0 to below 1.
        ignore_index: label that doesn't count; None: every label does.

    References:
        G. King, L. Zeng: Logistic Regression in Rare Events Data, 2001.

    Example:
        >>> WeightedCrossEntropy([30, 10, 0]).class_weights
        tensor([0.4444, 1.3333, 0.0000])
    """

    modes: ClassVar[Modes] = {
        "smoothed": "the same weights, label smoothing of 0.1",
        "plain": "cross entropy without weights",
    }
    tasks = CLASS_TASKS
    class_weights: torch.Tensor

    def __init__(
        self, class_counts: Sequence[int], label_smoothing: float = 0.0, ignore_index: int | None = None
    ) -> None:
        super().__init__()
        self.class_counts = [int(count) for count in class_counts]
        self.label_smoothing = number("label_smoothing", label_smoothing, below=1.0)
        self.ignore_index = checked_index(ignore_index)
        # No part of the state: it follows from the data, and would make checkpoints differ between losses.
        self.register_buffer("class_weights", balanced(self.class_counts), persistent=False)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> Values:
        """Return the loss and the weight of each sample."""
        logits, targets, ignored = apart(wide(logits), targets, self.ignore_index)
        values = cross_entropy(logits, targets, self.label_smoothing)
        return by_sample(values, target_weights(self.class_weights, targets, logits), ignored)

    def smoothed(self) -> Loss:
        """Return the same weights with a label smoothing of 0.1."""
        return WeightedCrossEntropy(self.class_counts, SMOOTHING, self.ignore_index)

    def plain(self) -> Loss:
        """Return cross entropy without weights."""
        return CrossEntropy(ignore_index=self.ignore_index)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Return the cross entropy [B, ...] of logits [B, C, ...], float32 or float64, and labels or probabilities."""
    if not targets.is_floating_point() and label_smoothing == 0:
        return -F.logsigmoid(-margin(logits, targets))
    return -shared(distribution(targets, logits, label_smoothing), log_softmax(logits))


def shared(shares: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return the sum over classes of share * value; a class without a share adds nothing, whatever its value."""
    return torch.where(shares == 0, 0.0, shares * values).sum(1)


def distribution(targets: torch.Tensor, logits: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Return the targets as probabilities in the logits' shape, smoothed."""
    if not targets.is_floating_point():
        targets = torch.zeros_like(logits).scatter(1, targets.unsqueeze(1), 1.0)
    if targets.shape != logits.shape:
        raise RuntimeError(f"probabilities {list(targets.shape)} for logits {list(logits.shape)}")
    targets = targets.to(logits.dtype)
    return targets if label_smoothing == 0 else targets * (1 - label_smoothing) + label_smoothing / logits.shape[1]


def balanced(class_counts: list[int]) -> torch.Tensor:
    """Return the weight of each class, total / (C * count), and 0 for a class without samples."""
    total = sum(class_counts)
    if total == 0 or min(class_counts) < 0:
        raise ConfigurationError(
            f"class_counts is {class_counts}; the number of samples of each class is needed: whole numbers from 0, "
            "not all 0. `auto` takes them from the training part."
        )
    return torch.tensor([0.0 if count == 0 else total / (len(class_counts) * count) for count in class_counts])


def target_weights(class_weights: torch.Tensor, targets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return the weight of each target [B, ...]; of a mixture, the mixture of the weights."""
    if logits.shape[1] != len(class_weights):
        raise ConfigurationError(
            f"the model has {logits.shape[1]} outputs, but class_counts has {len(class_weights)} classes: give both "
            "the same number."
        )
    class_weights = class_weights.to(device=logits.device, dtype=logits.dtype)
    if targets.is_floating_point():
        return (targets.to(class_weights.dtype) * class_weights.view(-1, *[1] * (targets.dim() - 2))).sum(1)
    return class_weights.index_select(0, targets.flatten()).view(targets.shape)
