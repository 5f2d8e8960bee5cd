"""Dice loss, for segmentation."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from stabletrain.checks import number
from stabletrain.loss.base import Loss, Values, aligned, wide
from stabletrain.loss.cross_entropy import distribution
from stabletrain.loss.ignoring import apart, checked_index
from stabletrain.loss.probability import log_probabilities


class Dice(Loss):
    """Soft Dice loss: `1 - mean_c (2 sum p_c t_c + s) / (sum p_c + sum t_c + s)`, the sums over a sample's places.

    Called with logits [B, C, ...] and labels int64 [B, ...] or shares [B, C, ...]; or with one logit a place, [B, 1,
    ...], and targets from 0 to 1, [B, ...] or [B, 1, ...]. Places to be ignored take part in no sum.

    Args:
        smooth: s, above 0: a class that is neither there nor predicted has the loss 0 then, not 0/0.
        ignore_index: label that doesn't count; None: every label does.

    References:
        F. Milletari et al.: V-Net, 2016; C. H. Sudre et al.: Generalised Dice Overlap as a Deep Learning Loss Function,
        2017 (sums without squares).

    Example:
        >>> logits = torch.tensor([[[[9.0, 9.0]], [[-9.0, -9.0]]]])
        >>> Dice()(logits, torch.tensor([[[0, 0]]]))[0], Dice()(logits, torch.tensor([[[1, 1]]]))[0]
        (tensor([1.8276e-08]), tensor([0.6667]))
    """

    tasks = ("segmentation", "supervised")

    def __init__(self, smooth: float = 1.0, ignore_index: int | None = None) -> None:
        super().__init__()
        self.smooth = number("smooth", smooth, above=True)
        self.ignore_index = checked_index(ignore_index)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> Values:
        """Return the loss of each sample, and a weight of 0 where all of it is ignored."""
        logits = wide(logits)
        if logits.dim() < 2 or logits.shape[1] == 1:
            logits, targets = aligned(logits, targets)
            logits, targets, ignored = apart(logits, targets, self.ignore_index, classes=False)
            # As the exponential of a logarithm, whose gradient p (1 - p) is not rounded to 0 where p is near 1.
            p, rest, shares = torch.exp(F.logsigmoid(logits)), torch.exp(F.logsigmoid(-logits)), targets
            p, rest, shares = (part.unsqueeze(1) for part in (p, rest, shares))
        else:
            logits, targets, ignored = apart(logits, targets, self.ignore_index)
            p, rest = (torch.exp(part) for part in log_probabilities(logits))
            shares = distribution(targets, logits, 0.0)
        if ignored is not None:
            hidden = ignored.unsqueeze(1)
            p, rest, shares = (torch.where(hidden, 0.0, part) for part in (p, rest, shares))
        p, rest, shares = (part.flatten(2) if part.dim() > 2 else part.unsqueeze(2) for part in (p, rest, shares))
        # p + t - 2 p t = p (1 - t) + t (1 - p): what is missing to 1, without taking a number from one near it.
        missing = (p * (1 - shares) + shares * rest).sum(2)
        per_sample = (missing / (p.sum(2) + shares.sum(2) + self.smooth)).mean(1)
        if ignored is None:
            return per_sample, None
        counts = ~(ignored.flatten(1).all(1) if ignored.dim() > 1 else ignored)
        return torch.where(counts, per_sample, 0.0), counts.to(per_sample.dtype)
