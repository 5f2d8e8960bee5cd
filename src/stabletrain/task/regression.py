"""Numbers to be predicted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from stabletrain.task.base import AdditiveTask


class Regression(AdditiveTask):
    """Numbers to be predicted, one a sample or several; reports loss, MAE, RMSE and R2.

    The data is the pair (inputs, targets); what the loss compares with the targets (the outputs themselves, or the mean
    of a distribution) has their shape, where [B, 1] is [B].

    Args:
        loss: of numbers, such as `stabletrain.loss.MeanSquaredError`.

    Example:
        >>> from stabletrain.loss import MeanSquaredError
        >>> data = (torch.zeros(2, 1), torch.tensor([1.0, 3.0]))
        >>> output = Regression(MeanSquaredError()).step(torch.nn.Identity(), data)
        >>> output.loss_sum, output.weight
        (tensor(10.), 2.0)
    """

    name = "regression"
    counts = 5

    def _counted(self, outputs: Any, targets: torch.Tensor) -> Sequence[torch.Tensor]:
        prediction: Any = getattr(self.loss, "prediction", None)
        predicted = outputs if prediction is None else prediction(outputs)
        targets = targets.double()
        error = predicted.reshape(targets.shape).double() - targets
        numbers = torch.full_like(error.sum(), targets.numel())
        return error.abs().sum(), error.square().sum(), targets.sum(), targets.square().sum(), numbers

    def _metrics(self, counted: Sequence[float], samples: float) -> dict[str, float]:
        """Return MAE and RMSE, in the targets' unit, and R2 over all numbers; 0 where the targets don't differ."""
        absolute, squared, targets, squares, numbers = counted
        numbers = max(numbers, 1.0)
        spread = squares - targets * targets / numbers
        known = spread > 1e-12 * squares  # below that it is rounding
        return {
            "mae": absolute / numbers,
            "rmse": math.sqrt(squared / numbers),
            "r2": 1 - squared / spread if known else 0.0 * squared,
        }
