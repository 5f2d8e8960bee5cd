"""Squared error, and its robust relative."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from stabletrain.checks import number
from stabletrain.loss.base import Loss, Values, aligned
from stabletrain.loss.ignoring import by_sample

REGRESSION_TASKS = ("regression", "supervised")


class MeanSquaredError(Loss):
    """Squared error: the mean of `(x - y)^2` over a sample's numbers.

    Called with outputs and targets of one shape, [B] or [B, ...]; [B, 1] and [B] are the same, and nothing is
    broadcast.

    References:
        C. F. Gauss: Theoria combinationis observationum erroribus minimis obnoxiae, 1823.

    Example:
        >>> MeanSquaredError()(torch.tensor([[1.0], [3.0]]), torch.tensor([1.0, 1.0]))
        (tensor([0., 4.]), None)
    """

    tasks = REGRESSION_TASKS

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> Values:
        """Return the loss of each sample, and no weights."""
        outputs, targets = aligned(outputs, targets)
        return by_sample((outputs - targets).square())


class Huber(Loss):
    """Huber loss: `e^2 / 2` for an error of at most delta, `delta (|e| - delta / 2)` beyond; its gradient is bounded.

    Args:
        delta: error up to which it is quadratic, above 0, in the targets' unit.

    References:
        P. J. Huber: Robust Estimation of a Location Parameter, 1964.

    Example:
        >>> Huber()(torch.tensor([0.5, 100.0]), torch.zeros(2))[0]
        tensor([ 0.1250, 99.5000])
    """

    tasks = REGRESSION_TASKS

    def __init__(self, delta: float = 1.0) -> None:
        super().__init__()
        self.delta = number("delta", delta, above=True)

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> Values:
        """Return the loss of each sample, and no weights."""
        outputs, targets = aligned(outputs, targets)
        return by_sample(F.huber_loss(outputs, targets, reduction="none", delta=self.delta))
