"""Connectionist temporal classification: a sequence is labelled without saying where each label stands."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from stabletrain.errors import ConfigurationError
from stabletrain.loss.base import Loss, Values, wide


class CTC(Loss):
    """CTC: `-log sum over all alignments of the product of p_t`, divided by the number of the target's labels.

    Called with logits [B, T, C], or the pair of logits and lengths int64 [B], where not all T steps count; and with
    targets int64 [B, S], the labels padded at the end with `padding`. A target that is too long for its input has no
    alignment: its loss is 0 and its weight too, not Inf. Computed in float64, since sums over many steps of logarithms
    of large size lose their digits in float32. (On CUDA torch has no deterministic backward pass for it.)

    Args:
        blank: class that stands for no label.
        padding: number that fills up shorter targets; no class.

    References:
        A. Graves et al.: Connectionist Temporal Classification, 2006.

    Example:
        >>> loss, targets = CTC(), torch.tensor([[1, 1, -1], [1, 2, 1]])
        >>> loss(torch.zeros(2, 3, 3), targets)
        (tensor([1.6479, 1.0986]), tensor([1., 1.]))
        >>> loss(torch.zeros(1, 2, 3), targets[:1])
        (tensor([0.]), tensor([0.]))
    """

    tasks = ("supervised",)

    def __init__(self, blank: int = 0, padding: int = -1) -> None:
        super().__init__()
        for name, value in (("blank", blank), ("padding", padding)):
            if isinstance(value, bool) or not isinstance(value, int) or (name == "blank" and value < 0):
                raise ConfigurationError(
                    f"{name} is {value!r}; a whole number{' from 0' * (name == 'blank')} is allowed."
                )
        if blank == padding:
            raise ConfigurationError(f"blank and padding are both {blank}; padding must be no class, for example -1.")
        self.blank, self.padding = blank, padding

    def forward(self, outputs: Any, targets: torch.Tensor) -> Values:
        """Return the loss and the weight of each sample."""
        logits, lengths = outputs if isinstance(outputs, (tuple, list)) and len(outputs) == 2 else (outputs, None)
        if (
            not isinstance(logits, torch.Tensor)
            or logits.dim() != 3
            or targets.dim() != 2
            or len(logits) != len(targets)
        ):
            shape = list(logits.shape) if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
            raise ConfigurationError(
                f"the model returned {shape} for targets of the shape {list(targets.shape)}; CTC needs logits "
                "[samples, steps, classes], alone or with their lengths, and padded labels [samples, labels]."
            )
        if lengths is None:
            lengths = torch.full((len(logits),), logits.shape[1], device=logits.device)
        if len(logits) == 0:
            return wide(logits).flatten(1).sum(1), None
        counted = targets != self.padding
        count = counted.sum(1)
        labels = torch.where(counted, targets, 0)
        # Two equal labels in a row need a blank between them.
        needed = count + ((targets[:, 1:] == targets[:, :-1]) & counted[:, 1:]).sum(1)
        log_p = logits.double().log_softmax(2).transpose(0, 1)
        values = F.ctc_loss(log_p, labels, lengths, count, blank=self.blank, reduction="none", zero_infinity=True)
        fits = needed <= lengths
        values = torch.where(fits, values / count.clamp_min(1), 0.0).to(wide(logits[:0]).dtype)
        return values, fits.to(values.dtype)
