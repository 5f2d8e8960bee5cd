"""Losses for classification, computed in float32 whatever the precision of the model's outputs.

A loss returns one value per sample and one weight per sample; whoever calls it sums both and divides, so that
microbatches and ranks of unequal weight still give the exact mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from stabletrain.errors import ConfigurationError

MODES = ("as_is", "smoothed", "plain")
SMOOTHING = 0.1  # label smoothing of the mode `smoothed`
NO_LABEL_IS_IGNORED = -(2**62)  # torch skips targets of -100 by default: here they are an error like any other


class Loss(nn.Module):
    """A loss of the group `loss`.

    Called with logits [B, C] of any floating type and targets, int64 [B] or probabilities [B, C], it returns the loss
    of each sample, float32 [B] (float64 for logits in float64), and their weights [B], or None where all are 1.
    """

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the loss and the weight of each sample."""
        raise NotImplementedError

    def simplified(self, mode: str) -> Loss:
        """Return the loss as simple as `mode` asks.

        Args:
            mode: `as_is`; `smoothed` (label smoothing of 0.1, focal gamma of at most 1); `plain` (cross entropy alone).

        Raises:
            ConfigurationError: for any other mode.
        """
        if mode not in MODES:
            raise ConfigurationError(f"loss_mode is {mode!r}; allowed: {', '.join(MODES)}.")
        return self if mode == "as_is" else self.smoothed() if mode == "smoothed" else CrossEntropy()

    def smoothed(self) -> Loss:
        """Return this loss with label smoothing and nothing steep in it."""
        raise NotImplementedError


class CrossEntropy(Loss):
    """Cross entropy: `-sum_c q_c log p_c` with the target's distribution q.

    Args:
        label_smoothing: share of the target that is spread evenly over all classes, from 0 to below 1.

    References:
        C. Szegedy et al.: Rethinking the Inception Architecture for Computer Vision, 2016 (label smoothing).

    Example:
        >>> per_sample, weights = CrossEntropy()(torch.zeros(2, 4), torch.tensor([0, 3]))
        >>> per_sample, weights is None
        (tensor([1.3863, 1.3863]), True)
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = _checked("label_smoothing", label_smoothing, below=1.0)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the loss of each sample, and no weights."""
        return _cross_entropy(logits, targets, self.label_smoothing), None

    def smoothed(self) -> Loss:
        """Return cross entropy with a label smoothing of 0.1."""
        return CrossEntropy(SMOOTHING)


class WeightedCrossEntropy(Loss):
    """Cross entropy in which every class weighs the same in total, however rare it is.

    The weight of class c is `total / (C * count_c)`, and 0 for a class without samples. A sample whose target is a
    mixture weighs the mixture of the weights.

    Args:
        class_counts: number of training samples of each class, [C].
        label_smoothing: share of the target that is spread evenly over all classes, from 0 to below 1.

    References:
        G. King, L. Zeng: Logistic Regression in Rare Events Data, 2001.

    Example:
        >>> WeightedCrossEntropy([30, 10, 0]).class_weights
        tensor([0.4444, 1.3333, 0.0000])
    """

    class_weights: torch.Tensor

    def __init__(self, class_counts: Sequence[int], label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.class_counts = [int(count) for count in class_counts]
        self.label_smoothing = _checked("label_smoothing", label_smoothing, below=1.0)
        # No part of the state: it follows from the data, and would make checkpoints differ between losses.
        self.register_buffer("class_weights", _balanced(self.class_counts), persistent=False)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the loss and the weight of each sample."""
        per_sample = _cross_entropy(logits, targets, self.label_smoothing)
        return per_sample, _sample_weights(self.class_weights, targets, logits)

    def smoothed(self) -> Loss:
        """Return the same weights with a label smoothing of 0.1."""
        return WeightedCrossEntropy(self.class_counts, SMOOTHING)


class FocalLoss(Loss):
    """Focal loss: `-sum_c q_c (1 - p_c)^gamma log p_c`, so that easy samples count little.

    Values and gradients are finite for any finite logits and any gamma: everything starts from `log_softmax`, and the
    logarithm of 1 - p is kept away from 0, where p rounds to 1 (there the loss is 0 anyway).

    Args:
        gamma: exponent, 0 (cross entropy) or more.
        class_counts: number of training samples of each class, [C], to weigh classes as `WeightedCrossEntropy` does;
            None = no weights.
        label_smoothing: share of the target that is spread evenly over all classes, from 0 to below 1.

    References:
        T.-Y. Lin et al.: Focal Loss for Dense Object Detection, 2017.

    Example:
        >>> per_sample, _ = FocalLoss(gamma=2.0)(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 0]))
        >>> per_sample
        tensor([0.1733, 0.0018])
    """

    class_weights: torch.Tensor | None

    def __init__(
        self, gamma: float = 2.0, class_counts: Sequence[int] | None = None, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        self.gamma = _checked("gamma", gamma)
        self.label_smoothing = _checked("label_smoothing", label_smoothing, below=1.0)
        self.class_counts = None if class_counts is None else [int(count) for count in class_counts]
        weights = None if self.class_counts is None else _balanced(self.class_counts)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the loss and the weight of each sample."""
        weights = None if self.class_weights is None else _sample_weights(self.class_weights, targets, logits)
        if self.gamma == 0:
            return _cross_entropy(logits, targets, self.label_smoothing), weights
        log_p = _wide(logits).log_softmax(1)
        if targets.is_floating_point() or self.label_smoothing > 0:
            shares = _distribution(targets, log_p, self.label_smoothing)
            return -(shares * self._focal(log_p)).sum(1), weights
        return -self._focal(log_p.gather(1, targets.unsqueeze(1)).squeeze(1)), weights

    def _focal(self, log_p: torch.Tensor) -> torch.Tensor:
        """Return (1 - p)^gamma log p."""
        log_rest = torch.log((-torch.expm1(log_p)).clamp_min(1e-30))
        return torch.exp(self.gamma * log_rest) * log_p

    def smoothed(self) -> Loss:
        """Return a focal loss with a gamma of at most 1, the same weights and a label smoothing of 0.1."""
        return FocalLoss(min(self.gamma, 1.0), self.class_counts, SMOOTHING)


def _checked(name: str, value: float, below: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < below:
        allowed = "a finite number from 0" if math.isinf(below) else f"a number from 0 to below {below:g}"
        raise ConfigurationError(f"{name} is {value!r}; {allowed} is allowed.")
    return float(value)


def _balanced(class_counts: list[int]) -> torch.Tensor:
    """Return the weight of each class, total / (C * count), and 0 for a class without samples."""
    total = sum(class_counts)
    if total == 0 or min(class_counts) < 0:
        raise ConfigurationError(
            f"class_counts is {class_counts}; the number of samples of each class is needed: whole numbers from 0, "
            "not all 0. `auto` takes them from the training part."
        )
    return torch.tensor([0.0 if count == 0 else total / (len(class_counts) * count) for count in class_counts])


def _sample_weights(class_weights: torch.Tensor, targets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return the weight of each sample [B]; of a mixture, the mixture of the weights."""
    if logits.shape[1] != len(class_weights):
        raise ConfigurationError(
            f"the model has {logits.shape[1]} outputs, but class_counts has {len(class_weights)} classes: give both "
            "the same number."
        )
    class_weights = class_weights.to(device=logits.device, dtype=_wide(logits[:0]).dtype)
    if targets.is_floating_point():
        return (targets.to(class_weights.dtype) * class_weights).sum(1)
    return class_weights.index_select(0, targets)


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    wide = _wide(logits)
    if targets.is_floating_point():
        return F.cross_entropy(wide, targets.to(wide.dtype), reduction="none", label_smoothing=label_smoothing)
    return F.cross_entropy(
        wide, targets, reduction="none", label_smoothing=label_smoothing, ignore_index=NO_LABEL_IS_IGNORED
    )


def _distribution(targets: torch.Tensor, log_p: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Return the targets as probabilities, smoothed."""
    if not targets.is_floating_point():
        targets = torch.zeros_like(log_p).scatter_(1, targets.unsqueeze(1), 1.0)
    return targets.to(log_p.dtype) * (1 - label_smoothing) + label_smoothing / log_p.shape[1]
