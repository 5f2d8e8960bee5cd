"""Bayesian personalised ranking: what was chosen is to score higher than what wasn't."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from stabletrain.loss.base import Loss, Values, pair_of
from stabletrain.loss.ignoring import by_sample


class BPR(Loss):
    """Bayesian personalised ranking: `softplus(n - p) = -log sigmoid(p - n)` of a positive and a negative score.

    Called with the scores p [B] and n [B], or n [B, N] for N negatives, over which the mean is taken; a pair, or one
    tensor [B, 2]. Targets aren't looked at.

    References:
        S. Rendle et al.: BPR: Bayesian Personalized Ranking from Implicit Feedback, 2009.

    Example:
        >>> BPR()((torch.tensor([1.0, -1e4]), torch.tensor([1.0, 1e4])), None)[0]
        tensor([6.9315e-01, 2.0000e+04])
    """

    tasks = ("recommendation", "supervised")

    def forward(self, outputs: Any, targets: Any = None) -> Values:
        """Return the loss of each sample, and no weights."""
        positive, negative = pair_of(outputs, "the scores of what was chosen and of what wasn't")
        positive = positive.flatten(1) if positive.dim() > 1 else positive.unsqueeze(1)
        negative = negative.flatten(1) if negative.dim() > 1 else negative.unsqueeze(1)
        values: torch.Tensor = -F.logsigmoid(positive - negative)
        return by_sample(values)
