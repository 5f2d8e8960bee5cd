"""A class for each place of a sample, such as the pixels of an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from stabletrain.errors import ConfigurationError
from stabletrain.task.base import AdditiveTask, counting, share
from stabletrain.task.classification import check_labels


class Segmentation(AdditiveTask):
    """A class for each place of a sample; reports loss, the share of right places, and Dice.

    The data is the pair (inputs, targets); the model turns the inputs into logits [B, C, ...], and the targets are
    class numbers int64 [B, ...]. With one logit a place, [B, 1, ...], it is yes or no, and the targets go from 0 to 1.
    Places whose label the loss ignores don't count.

    Args:
        loss: over places, such as `stabletrain.loss.Dice` or `CrossEntropy`.

    Example:
        >>> from stabletrain.loss import CrossEntropy
        >>> data = (torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64))
        >>> Segmentation(CrossEntropy()).step(torch.nn.Identity(), data).loss_sum
        tensor(0.6931)
    """

    name = "segmentation"
    counts = 4

    def _losses(self, logits: Any, targets: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        fits = isinstance(logits, torch.Tensor) and isinstance(targets, torch.Tensor) and logits.dim() >= 3
        one = fits and logits.shape[1] == 1
        shapes = [logits.shape[:1] + logits.shape[2:], *([logits.shape] if one else [])] if fits else []
        if targets is None or (getattr(targets, "shape", None) not in shapes):
            given = list(logits.shape) if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
            raise ConfigurationError(
                f"the model returned {given} for targets of the shape {list(getattr(targets, 'shape', []))}; logits "
                "[samples, classes, ...] and class numbers [samples, ...] of the same places are needed."
            )
        if not one and self._first_on(logits.device):
            check_labels(self.loss, targets, logits.shape[1], places=logits.dim() - 1)
        try:
            per_sample, weights = self.loss(logits, targets)
        except (IndexError, RuntimeError):
            if not one:
                check_labels(self.loss, targets, logits.shape[1], places=logits.dim() - 1)
            raise
        return per_sample, weights

    def _counted(self, logits: torch.Tensor, targets: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return right places, places, the sum of the samples' Dice, and the samples that have one."""
        if logits.shape[1] == 1:
            targets = targets.reshape(logits.shape[:1] + logits.shape[2:])
            counts = counting(self.loss, targets)
            predicted, targets = (logits[:, 0] > 0).long(), (targets > 0.5).long()
            classes = 2
        else:
            counts = counting(self.loss, targets)
            predicted, classes = logits.argmax(1), logits.shape[1]
        right = ((predicted == targets) & counts).sum()
        both: list[torch.Tensor] = []
        for label in range(classes):
            there, said = (targets == label) & counts, (predicted == label) & counts
            sizes = there.flatten(1).sum(1) + said.flatten(1).sum(1)
            common = (there & said).flatten(1).sum(1)
            both.append(torch.stack([2.0 * common / sizes.clamp_min(1), (sizes > 0).double()]))
        overlap, present = torch.stack(both).sum(0)
        dice = overlap / present.clamp_min(1)
        return right, counts.sum(), dice.sum(), (present > 0).sum()

    def _metrics(self, counted: Sequence[float], samples: float) -> dict[str, float]:
        """Return accuracy and Dice, the mean over samples of the mean over classes that are there or predicted."""
        right, places, dice, with_places = counted
        return {"accuracy": share(right, places), "dice": share(dice, with_places)}
