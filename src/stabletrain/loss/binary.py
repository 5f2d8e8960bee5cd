"""Binary cross entropy, from logits."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F

from stabletrain.checks import number
from stabletrain.loss.base import SMOOTHING, Loss, Modes, Values, aligned
from stabletrain.loss.ignoring import apart, by_sample, checked_index

BINARY_TASKS = ("binary", "segmentation", "supervised")


class BinaryCrossEntropy(Loss):
    """Binary cross entropy: `-w y log p - (1 - y) log(1 - p)` with `p = sigmoid(x)`, from the logit x.

    Called with logits [B], or [B, K] for K questions a sample, and targets of that shape, numbers from 0 to 1.

    Args:
        positive_weight: weight w of the positive targets, above 0; 1: both weigh the same.
        label_smoothing: share of the target that is spread evenly over both answers, from 0 to below 1.
        ignore_index: target that doesn't count, such as -1; None: every target does.

    References:
        D. R. Cox: The Regression Analysis of Binary Sequences, 1958.

    Example:
        >>> BinaryCrossEntropy()(torch.tensor([0.0, 1e4]), torch.tensor([1, 1]))[0]
        tensor([0.6931, 0.0000])
    """

    modes: ClassVar[Modes] = {
        "smoothed": "the same weight, label smoothing of 0.1",
        "plain": "no weight, no label smoothing",
    }
    tasks = BINARY_TASKS

    def __init__(
        self, positive_weight: float = 1.0, label_smoothing: float = 0.0, ignore_index: int | None = None
    ) -> None:
        super().__init__()
        self.positive_weight = number("positive_weight", positive_weight, above=True)
        self.label_smoothing = number("label_smoothing", label_smoothing, below=1.0)
        self.ignore_index = checked_index(ignore_index)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> Values:
        """Return the loss of each sample, and their weights where some are ignored."""
        logits, targets = aligned(logits, targets)
        logits, targets, ignored = apart(logits, targets, self.ignore_index, classes=False)
        targets = softened(targets, self.label_smoothing)
        # Two log-sigmoids, not x - x y + log(1 + exp(-x)): at a large x with y = 1 the first two terms lose the third.
        values = -self.positive_weight * targets * F.logsigmoid(logits) - (1 - targets) * F.logsigmoid(-logits)
        return by_sample(values, ignored=ignored)

    def smoothed(self) -> Loss:
        """Return the same weight with a label smoothing of 0.1."""
        return BinaryCrossEntropy(self.positive_weight, SMOOTHING, self.ignore_index)

    def plain(self) -> Loss:
        """Return binary cross entropy without weight and smoothing."""
        return BinaryCrossEntropy(ignore_index=self.ignore_index)


def softened(targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Return yes-or-no targets of which a share is spread evenly over both answers."""
    return targets if label_smoothing == 0 else targets * (1 - label_smoothing) + label_smoothing / 2
