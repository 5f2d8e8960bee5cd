"""The z-loss, added to any loss over a softmax: it keeps the logits from drifting."""

from __future__ import annotations

from typing import ClassVar

import torch

from stabletrain.checks import number
from stabletrain.errors import ConfigurationError
from stabletrain.loss.base import Loss, Modes, Values, wide
from stabletrain.loss.cross_entropy import CLASS_TASKS, CrossEntropy, WeightedCrossEntropy
from stabletrain.loss.focal import FocalLoss
from stabletrain.loss.ignoring import apart, by_sample
from stabletrain.loss.kl import KLDivergence

SOFTMAX_LOSSES = (CrossEntropy, WeightedCrossEntropy, FocalLoss, KLDivergence)


class ZLoss(Loss):
    """A loss over a softmax, plus `coefficient * log(sum_c exp x_c)^2`.

    A softmax doesn't see a number that is added to all logits, so they drift; the z-loss draws them back. It stays in
    every mode of the loss that it is added to: it is there for stability.

    Args:
        loss: cross entropy, weighted or not, focal loss or Kullback-Leibler divergence.
        coefficient: 0 or more.

    References:
        A. Chowdhery et al.: PaLM: Scaling Language Modeling with Pathways, 2022, section 5 (1e-4).

    Raises:
        ConfigurationError: for a loss without a softmax.

    Example:
        >>> ZLoss(CrossEntropy(), coefficient=0.1)(torch.full((1, 2), 3.0), torch.tensor([0]))[0]
        tensor([2.0571])
    """

    modes: ClassVar[Modes] = {"smoothed": "the other loss smoothed", "plain": "the other loss plain"}
    tasks: ClassVar[tuple[str, ...] | None] = CLASS_TASKS

    def __init__(self, loss: Loss, coefficient: float = 1e-4) -> None:
        super().__init__()
        if not isinstance(loss, SOFTMAX_LOSSES):
            names = ", ".join(one.__name__ for one in SOFTMAX_LOSSES)
            raise ConfigurationError(
                f"the z-loss was to be added to {type(loss).__name__}, which has no softmax over classes; allowed: "
                f"{names}. On the command line: loss=z_loss loss@loss.loss=focal"
            )
        self.loss = loss
        self.coefficient = number("coefficient", coefficient)
        self.ignore_index = loss.ignore_index
        self.tasks = loss.tasks  # type: ignore[misc]  # those of this one
        self.modes = {mode: f"{words}; the z-loss stays" for mode, words in loss.modes.items()}  # type: ignore[misc]

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> Values:
        """Return the loss and the weight of each sample."""
        values, weights = self.loss(logits, targets)
        logits, _, ignored = apart(wide(logits), targets, self.ignore_index)
        added, _ = by_sample(self.coefficient * logits.logsumexp(1).square(), ignored=ignored)
        return values + added, weights

    def smoothed(self) -> Loss:
        """Return the z-loss with the smoothed loss."""
        return ZLoss(self.loss.smoothed(), self.coefficient)

    def plain(self) -> Loss:
        """Return the z-loss with the plain loss."""
        return ZLoss(self.loss.plain(), self.coefficient)
