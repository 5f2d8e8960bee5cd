"""One class out of several, judged so that rare classes count as much as frequent ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from stabletrain.checks import whole
from stabletrain.errors import ConfigurationError
from stabletrain.task.classification import Classification


class BalancedClassification(Classification):
    """One class out of several for each sample; reports loss, accuracy, macro F1 and balanced accuracy.

    And `majority_accuracy`, what always answering the most frequent of these classes would score. The metrics follow
    from how often each class was taken for each, counts which add up over processes.

    Args:
        loss: what `stabletrain.loss` offers.
        num_classes: number of classes, C.

    Raises:
        ConfigurationError: for less than 2 classes.

    Example:
        >>> from stabletrain.data import ArrayDataset, OrderedLoader
        >>> from stabletrain.loss import CrossEntropy
        >>> data = ArrayDataset(torch.eye(2)[[0, 0, 0, 1]], torch.tensor([0, 0, 1, 1]))
        >>> found = BalancedClassification(CrossEntropy(), 2).evaluate(nn.Identity(), OrderedLoader(data, batch_size=3))
        >>> found["balanced_accuracy"], round(found["macro_f1"], 4), found["majority_accuracy"]
        (0.75, 0.7333, 0.5)
    """

    def __init__(self, loss: nn.Module, num_classes: int) -> None:
        super().__init__(loss)
        whole("num_classes of the task", num_classes, 2)
        self.num_classes = num_classes
        self.counts = super().counts + num_classes**2

    def _counted(self, outputs: Any, targets: torch.Tensor) -> Sequence[torch.Tensor]:
        return *super()._counted(outputs, targets), *self._confusion(outputs, targets).flatten()

    def _metrics(self, counted: Sequence[float], samples: float) -> dict[str, float]:
        own = super().counts
        confusion = torch.tensor(counted[own:]).view(self.num_classes, self.num_classes)
        return {**super()._metrics(counted[:own], samples), **balanced_metrics(confusion)}

    def _confusion(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return how often class i was taken for class j, float64 [C, C], without a wait for the device."""
        if logits.shape[1] != self.num_classes:
            raise ConfigurationError(
                f"the model has {logits.shape[1]} outputs, but the task was told {self.num_classes} classes: they must "
                "be the same (model.num_classes, task.num_classes)."
            )
        classes = targets.argmax(1) if targets.is_floating_point() else targets
        # A loss may leave labels out that are no class number.
        counts = (classes >= 0) & (classes < self.num_classes) & (classes != getattr(self.loss, "ignore_index", None))
        places = classes.clamp(0, self.num_classes - 1) * self.num_classes + logits.argmax(1)
        empty = torch.zeros(self.num_classes**2, dtype=torch.float64, device=logits.device)
        return empty.index_add_(0, places, counts.double()).view(self.num_classes, self.num_classes)


def balanced_metrics(confusion: torch.Tensor) -> dict[str, float]:
    """Return what a confusion matrix tells about all classes alike.

    Args:
        confusion: how often class i (row) was taken for class j (column), [C, C].

    Returns:
        `macro_f1`, the mean of 2 TP / (2 TP + FP + FN) over the classes that occur or were answered;
        `balanced_accuracy`, the mean of TP / (TP + FN) over the classes that occur; `majority_accuracy`, the share of
        the most frequent class. All 0 where nothing was counted.

    References:
        F. Pedregosa et al.: Scikit-learn, 2011, whose `f1_score(average="macro")` and `balanced_accuracy_score` these
        equal.

    Example:
        >>> balanced_metrics(torch.tensor([[8.0, 0.0], [1.0, 1.0]]))["balanced_accuracy"]
        0.75
    """
    right, real, answered = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    f1 = (2 * right / (real + answered))[real + answered > 0]
    recall = (right / real)[real > 0]
    whole = confusion.sum()
    return {
        "macro_f1": float(f1.mean()) if len(f1) > 0 else 0.0,
        "balanced_accuracy": float(recall.mean()) if len(recall) > 0 else 0.0,
        "majority_accuracy": float(real.max() / whole) if whole > 0 else 0.0,
    }
