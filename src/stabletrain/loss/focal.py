"""Focal loss, for one class out of several and for yes or no: easy samples count little."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F

from stabletrain.checks import number
from stabletrain.loss.base import SMOOTHING, Loss, Modes, Values, aligned, wide
from stabletrain.loss.binary import BINARY_TASKS, BinaryCrossEntropy, softened
from stabletrain.loss.cross_entropy import (
    CLASS_TASKS,
    CrossEntropy,
    balanced,
    distribution,
    shared,
    target_weights,
)
from stabletrain.loss.ignoring import apart, by_sample, checked_index
from stabletrain.loss.probability import log_probabilities, margin


class FocalLoss(Loss):
    """Focal loss: `-sum_c q_c (1 - p_c)^gamma log p_c`, so that easy samples count little.

    Values and gradients are finite for any finite logits and any gamma: p and 1 - p are sigmoids of the same margin, so
    neither of their logarithms is ever that of a rounded 0.

    Args:
        gamma: exponent, 0 (cross entropy) or more.
        class_counts: number of training samples of each class, [C], to weigh classes as `WeightedCrossEntropy` does;
            None = no weights.
        label_smoothing: share of the target that is spread evenly over all classes, from 0 to below 1.
        ignore_index: label that doesn't count; None: every label does.

    References:
        T.-Y. Lin et al.: Focal Loss for Dense Object Detection, 2017.

    Example:
        >>> per_sample, _ = FocalLoss(gamma=2.0)(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 0]))
        >>> per_sample
        tensor([0.1733, 0.0018])
    """

    modes: ClassVar[Modes] = {
        "smoothed": "gamma of at most 1, the same weights, label smoothing of 0.1",
        "plain": "cross entropy without weights",
    }
    tasks = CLASS_TASKS
    class_weights: torch.Tensor | None

    def __init__(
        self,
        gamma: float = 2.0,
        class_counts: Sequence[int] | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        self.gamma = number("gamma", gamma)
        self.label_smoothing = number("label_smoothing", label_smoothing, below=1.0)
        self.class_counts = None if class_counts is None else [int(count) for count in class_counts]
        self.ignore_index = checked_index(ignore_index)
        weights = None if self.class_counts is None else balanced(self.class_counts)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> Values:
        """Return the loss and the weight of each sample."""
        logits, targets, ignored = apart(wide(logits), targets, self.ignore_index)
        if targets.is_floating_point() or self.label_smoothing > 0:
            log_p, log_rest = log_probabilities(logits)
            focal = -shared(
                distribution(targets, logits, self.label_smoothing), torch.exp(self.gamma * log_rest) * log_p
            )
        else:
            ahead = margin(logits, targets)
            focal = -torch.exp(self.gamma * F.logsigmoid(ahead)) * F.logsigmoid(-ahead)
        weights = None if self.class_weights is None else target_weights(self.class_weights, targets, logits)
        return by_sample(focal, weights, ignored)

    def smoothed(self) -> Loss:
        """Return a focal loss with a gamma of at most 1, the same weights and a label smoothing of 0.1."""
        return FocalLoss(min(self.gamma, 1.0), self.class_counts, SMOOTHING, self.ignore_index)

    def plain(self) -> Loss:
        """Return cross entropy without weights."""
        return CrossEntropy(ignore_index=self.ignore_index)


class BinaryFocalLoss(Loss):
    """Focal loss for yes or no: `-a y (1 - p)^gamma log p - (1 - a) (1 - y) p^gamma log(1 - p)` with `p = sigmoid(x)`.

    Called with logits [B], or [B, K] for K questions a sample, and targets of that shape, numbers from 0 to 1.

    Args:
        gamma: exponent, 0 or more.
        alpha: weight a of the positive targets, between 0 and 1, that of the others being 1 - a; None: both weigh 1.
        label_smoothing: share of the target that is spread evenly over both answers, from 0 to below 1.
        ignore_index: target that doesn't count, such as -1; None: every target does.

    References:
        T.-Y. Lin et al.: Focal Loss for Dense Object Detection, 2017 (gamma 2, alpha 0.25).

    Example:
        >>> BinaryFocalLoss()(torch.tensor([0.0, 3.0]), torch.tensor([1, 1]))[0]
        tensor([1.7329e-01, 1.0928e-04])
    """

    modes: ClassVar[Modes] = {
        "smoothed": "gamma of at most 1, label smoothing of 0.1",
        "plain": "binary cross entropy without weights",
    }
    tasks = BINARY_TASKS

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: float | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        self.gamma = number("gamma", gamma)
        self.alpha = None if alpha is None else number("alpha", alpha, below=1.0, above=True)
        self.label_smoothing = number("label_smoothing", label_smoothing, below=1.0)
        self.ignore_index = checked_index(ignore_index)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> Values:
        """Return the loss of each sample, and their weights where some are ignored."""
        logits, targets = aligned(logits, targets)
        logits, targets, ignored = apart(logits, targets, self.ignore_index, classes=False)
        targets = softened(targets, self.label_smoothing)
        log_p, log_rest = F.logsigmoid(logits), F.logsigmoid(-logits)
        positive = targets * torch.exp(self.gamma * log_rest) * log_p
        negative = (1 - targets) * torch.exp(self.gamma * log_p) * log_rest
        if self.alpha is not None:
            positive, negative = self.alpha * positive, (1 - self.alpha) * negative
        return by_sample(-(positive + negative), ignored=ignored)

    def smoothed(self) -> Loss:
        """Return a focal loss with a gamma of at most 1 and a label smoothing of 0.1."""
        return BinaryFocalLoss(min(self.gamma, 1.0), self.alpha, SMOOTHING, self.ignore_index)

    def plain(self) -> Loss:
        """Return binary cross entropy without weights."""
        return BinaryCrossEntropy(ignore_index=self.ignore_index)
