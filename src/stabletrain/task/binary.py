"""Yes or no."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from stabletrain.task.base import Batch, LossTask, alone, counting, share


class Binary(LossTask):
    """Yes or no, for one question a sample or several; reports loss, accuracy and AUC.

    The data is the pair (inputs, targets); the model turns the inputs into logits [B] or [B, 1], or [B, K] for K
    questions, and the targets, from 0 to 1, have that shape. Yes is a logit above 0, and a target above 1/2. The AUC
    needs all scores at once, so each of several processes evaluates all samples.

    Args:
        loss: of yes-or-no targets, such as `stabletrain.loss.BinaryCrossEntropy`.

    Example:
        >>> from stabletrain.loss import BinaryCrossEntropy
        >>> output = Binary(BinaryCrossEntropy()).step(nn.Identity(), (torch.zeros(3, 1), torch.tensor([0, 1, 1])))
        >>> output.loss_sum, output.weight
        (tensor(2.0794), 3.0)
    """

    name = "binary"
    counts = 2

    def evaluate(self, model: nn.Module, loader: Iterable[Batch]) -> dict[str, float]:
        """Return loss, accuracy and AUC over all samples, with the model in evaluation mode.

        Args:
            model: from the inputs to logits.
            loader: microbatches whose data is the pair (inputs, targets).

        Returns:
            `loss`, `accuracy` over all targets that count, and `auc`, of several questions the mean over those whose
            answers differ; 1/2 where none do.

        Raises:
            ConfigurationError: for a loader without samples, and for outputs and targets that don't fit each other.
        """
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def see(outputs: torch.Tensor, targets: torch.Tensor) -> None:
            seen.append((outputs.reshape(targets.shape).double(), targets))

        found = self._measured(model, loader, alone, see)
        scores, answers = (torch.cat(column).cpu() for column in zip(*seen, strict=True))
        table = (part.reshape(len(part), -1).unbind(1) for part in (scores, answers, counting(self.loss, answers)))
        areas = [auc(score[used], answer[used] > 0.5) for score, answer, used in zip(*table, strict=True)]
        known = [area for area in areas if area is not None]
        return {**found, "auc": sum(known) / len(known) if known else 0.5}

    def _counted(self, outputs: Any, targets: torch.Tensor) -> Sequence[torch.Tensor]:
        counts = counting(self.loss, targets)
        right = (outputs.reshape(targets.shape) > 0) == (targets > 0.5)
        return (right & counts).sum(), counts.sum()

    def _metrics(self, counted: Sequence[float], samples: float) -> dict[str, float]:
        right, counts = counted
        return {"accuracy": share(right, counts)}


def auc(scores: torch.Tensor, positive: torch.Tensor) -> float | None:
    """Return the area under the ROC curve: the probability that a positive scores above a negative, ties counting 1/2.

    Args:
        scores: [N].
        positive: bool [N].

    Returns:
        From 0 to 1; None where all answers are the same; NaN where a score is.

    References:
        H. B. Mann, D. R. Whitney: On a Test of Whether One of Two Random Variables is Stochastically Larger, 1947.

    Example:
        >>> auc(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([False, False, True, True]))
        0.875
    """
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if positives == 0 or negatives == 0:
        return None
    if bool(torch.isnan(scores).any()):
        return math.nan
    _, place, size = torch.unique(scores, return_inverse=True, return_counts=True)
    rank = (size.cumsum(0) - 0.5 * (size - 1).double())[place]  # the mean rank of equal scores
    return float((rank[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))
