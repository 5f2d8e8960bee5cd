"""The negative log-likelihood of a normal distribution whose mean and variance the model predicts."""

from __future__ import annotations

import math
from typing import Any

import torch

from stabletrain.checks import number
from stabletrain.loss.base import Loss, Values, aligned, pair_of, wide
from stabletrain.loss.ignoring import by_sample
from stabletrain.loss.regression import REGRESSION_TASKS


class GaussianNLL(Loss):
    """Gaussian negative log-likelihood: `(log v + (y - m)^2 / v) / 2`, without the constant `log(2 pi) / 2`.

    Called with mean m and log v, or v itself: a pair of tensors [B, ...] or one tensor [B, 2, ...]; targets [B, ...]. A
    variance below its floor is computed with as the floor, but its gradient is the one that it has there, so that it
    can come back.

    Args:
        log_variance: true: the second output is log v, which may be any number; false: v.
        floor: smallest variance, above 0, in the square of the targets' unit.

    References:
        D. A. Nix, A. S. Weigend: Estimating the Mean and Variance of the Target Probability Distribution, 1994.

    Example:
        >>> GaussianNLL()(torch.tensor([[1.0, 0.0], [1.0, -1e4]]), torch.tensor([3.0, 1.0]))[0]
        tensor([ 2.0000, -6.9078])
    """

    tasks = REGRESSION_TASKS

    def __init__(self, log_variance: bool = True, floor: float = 1e-6) -> None:
        super().__init__()
        self.log_variance = log_variance
        self.floor = number("floor", floor, above=True)

    def forward(self, outputs: Any, targets: torch.Tensor) -> Values:
        """Return the loss of each sample, and no weights."""
        mean, spread = pair_of(outputs, "a mean and a variance")
        mean, targets = aligned(mean, targets)
        spread = wide(spread).reshape(mean.shape)
        if self.log_variance:
            log_variance = _at_least(spread, math.log(self.floor))
        else:
            log_variance = _at_least(spread, self.floor).log()
        return by_sample(0.5 * (log_variance + (targets - mean).square() * torch.exp(-log_variance)))

    def prediction(self, outputs: Any) -> torch.Tensor:
        """Return the mean."""
        return pair_of(outputs, "a mean and a variance")[0]


def _at_least(values: torch.Tensor, floor: float) -> torch.Tensor:
    """Return the values, at least the floor, with the gradient of the values themselves."""
    return values - values.detach() + values.detach().clamp_min(floor)
