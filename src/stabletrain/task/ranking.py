"""Two classes, judged by how well their samples are ranked, too."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from stabletrain.errors import ConfigurationError
from stabletrain.task.base import Batch, Total, alone
from stabletrain.task.classification import Classification

LARGEST = 32.0  # margins beyond are counted as this
BINS = 1 << 17


class RankedClassification(Classification):
    """One class out of two for each sample; reports loss, accuracy and AUC.

    As `Classification`, whose two logits are compared: the margin is the second one less the first. The AUC is the
    probability that a sample of the second class has a larger margin than one of the first, ties counting 1/2. So that
    processes can add up what they saw, margins are counted in 2^17 equal bins from -32 to 32: two that are less than
    1/2048 apart may count as a tie. The AUC is therefore off by at most half the share of pairs that are that close.

    Args:
        loss: as for `Classification`.

    References:
        H. B. Mann, D. R. Whitney: On a test of whether one of two random variables is stochastically larger than the
        other, Annals of Mathematical Statistics 18, 1947.

    Example:
        >>> from stabletrain.data import ArrayDataset, OrderedLoader
        >>> from stabletrain.loss import CrossEntropy
        >>> logits = torch.tensor([[0.0, -1.0], [0.0, 2.0], [0.0, 1.0], [0.0, 3.0]])
        >>> data = ArrayDataset(logits, torch.tensor([0, 0, 1, 1]))
        >>> RankedClassification(CrossEntropy()).evaluate(nn.Identity(), OrderedLoader(data, batch_size=3))["auc"]
        0.75
    """

    def evaluate(self, model: nn.Module, loader: Iterable[Batch], total: Total = alone) -> dict[str, float]:
        """Return loss, accuracy and AUC over all samples, with the model in evaluation mode.

        Args:
            model: from the inputs to logits [B, 2].
            loader: microbatches whose data is the pair (inputs, targets).
            total: adds a tensor up over all processes, each of which sees a share of the microbatches.

        Returns:
            `loss` and `accuracy` as `Classification` has them, and `auc`, from 0 to 1; 1/2 where a class has no sample,
            NaN where a margin is NaN.

        Raises:
            ConfigurationError: for other than two logits, and what `Classification` refuses.
        """
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        found = self._measured(model, loader, total, lambda logits, targets: seen.append((logits, targets)))
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        counts = torch.zeros(2 * BINS + 1, dtype=torch.float64, device=seen[0][0].device if seen else device)
        for logits, targets in seen:
            places = _places(logits, targets)
            counts.index_add_(0, places, torch.ones_like(places, dtype=torch.float64))
        return {**found, "auc": _area(total(counts).cpu())}


def _places(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return each sample's place among the counts: bins of class 0, bins of class 1, NaN."""
    if logits.shape[1] != 2:
        raise ConfigurationError(
            f"the AUC compares two classes, but the model has {logits.shape[1]} outputs. Choose task=classification, "
            "or data with two classes."
        )
    classes = targets.argmax(1) if targets.is_floating_point() else targets
    margin = logits[:, 1].double() - logits[:, 0].double()
    inside = (margin.nan_to_num(0.0).clamp(-LARGEST, LARGEST) / (2 * LARGEST) + 0.5) * BINS
    places = inside.long().clamp_max(BINS - 1) + classes * BINS
    return torch.where(margin.isnan(), 2 * BINS, places)


def _area(counts: torch.Tensor) -> float:
    """Return the AUC that the counts tell."""
    first, second, nan = counts[:BINS], counts[BINS:-1], counts[-1]
    if nan > 0:
        return math.nan
    pairs = first.sum() * second.sum()
    below = first.cumsum(0) - first / 2
    return float((second * below).sum() / pairs) if pairs > 0 else 0.5
