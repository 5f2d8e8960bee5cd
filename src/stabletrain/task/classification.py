"""One class out of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from stabletrain.errors import ConfigurationError
from stabletrain.task.base import AdditiveTask, counting, share


class Classification(AdditiveTask):
    """One class out of several for each sample; reports loss and accuracy.

    The data is the pair (inputs, targets); the model turns the inputs, any tree of tensors and lists, into logits [B,
    C]. Samples whose label the loss ignores don't count for the accuracy either.

    Args:
        loss: what `stabletrain.loss` offers: called with logits and targets (int64 [B] or probabilities [B, C]) it
            returns the loss of each sample and their weights, or None.

    Example:
        >>> from stabletrain.loss import CrossEntropy
        >>> output = Classification(CrossEntropy()).step(nn.Identity(), (torch.zeros(3, 2), torch.tensor([0, 1, 1])))
        >>> output.loss_sum, output.weight
        (tensor(2.0794), 3.0)
    """

    name = "classification"
    counts = 2

    def _counted(self, outputs: Any, targets: torch.Tensor) -> Sequence[torch.Tensor]:
        if targets.is_floating_point():
            right = outputs.argmax(1) == targets.argmax(1)
            return right.sum(), torch.full_like(right.sum(), len(targets))
        counts = counting(self.loss, targets)
        return ((outputs.argmax(1) == targets) & counts).sum(), counts.sum()

    def _metrics(self, counted: Sequence[float], samples: float) -> dict[str, float]:
        right, counts = counted
        return {"accuracy": share(right, counts)}

    def _losses(self, logits: Any, targets: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not isinstance(logits, torch.Tensor) or not isinstance(targets, torch.Tensor):
            raise ConfigurationError(
                f"the model returned a {type(logits).__name__} for targets of the type {type(targets).__name__}; "
                "logits [samples, classes] and class numbers are needed. task=supervised takes anything."
            )
        if logits.dim() != 2 or len(logits) != len(targets):
            raise ConfigurationError(
                f"the model returned {list(logits.shape)} for {len(targets)} samples; logits of the shape [samples, "
                f"classes] = [{len(targets)}, C] are needed."
            )
        if self._first_on(logits.device):
            check_labels(self.loss, targets, logits.shape[1])
        try:
            per_sample, weights = self.loss(logits, targets)
        except (IndexError, RuntimeError):
            check_labels(self.loss, targets, logits.shape[1])
            raise
        return per_sample, weights


def check_labels(loss: nn.Module, targets: torch.Tensor, classes: int, *, places: int = 1) -> None:
    """Raise ConfigurationError where a target is no class number below `classes`, or has another number of classes.

    Args:
        loss: may ignore a label.
        targets: class numbers, or probabilities.
        classes: outputs of the model.
        places: dimensions of the class numbers, 1: one for each sample.
    """
    if targets.is_floating_point():
        if targets.dim() != places + 1 or targets.shape[1] != classes:
            raise ConfigurationError(
                f"the targets are probabilities of the shape {list(targets.shape)}, but the model has {classes} "
                "outputs: the number of classes must be the same (num_classes)."
            )
        return
    if targets.dtype != torch.int64 or targets.dim() != places:
        shape = "[B]" if places == 1 else "[B, ...]"
        raise ConfigurationError(
            f"the targets are {targets.dtype} of the shape {list(targets.shape)}; class numbers, int64 {shape}, are "
            "needed."
        )
    counted = targets[counting(loss, targets)]
    if counted.numel() == 0:
        return
    low, high = int(counted.min()), int(counted.max())
    if low < 0 or high >= classes:
        raise ConfigurationError(
            f"a target has the label {low if low < 0 else high}, but the model has {classes} outputs: labels go from "
            f"0 to {classes - 1}. Correct the label, or give the model more outputs (model.num_classes)."
        )
