"""Kullback-Leibler divergence, for distillation and for targets that are distributions."""

from __future__ import annotations

import torch

from stabletrain.checks import number
from stabletrain.loss.base import Loss, Values, wide
from stabletrain.loss.cross_entropy import distribution, shared
from stabletrain.loss.ignoring import apart, by_sample, checked_index
from stabletrain.loss.probability import log_softmax

LEAST_TEMPERATURE = 0.05


class KLDivergence(Loss):
    """Kullback-Leibler divergence: `T^2 sum_c q_c (log q_c - log p_c)` from the target q to `p = softmax(x / T)`.

    Called with logits [B, C, ...] and targets of that shape, or labels int64 [B, ...], each a distribution of one
    class.

    Args:
        temperature: T, at least 0.05; a factor T^2 keeps the gradient's size.
        target_logits: true: the targets are a teacher's logits, and `q = softmax(t / T)`; false: probabilities.
        ignore_index: label that doesn't count; None: every label does.

    References:
        S. Kullback, R. A. Leibler: On Information and Sufficiency, 1951; G. Hinton et al.: Distilling the Knowledge in
        a Neural Network, 2015 (the temperature).

    Example:
        >>> KLDivergence()(torch.zeros(2, 2), torch.tensor([[0.5, 0.5], [1.0, 0.0]]))[0]
        tensor([0.0000, 0.6931])
    """

    tasks = ("classification", "supervised")

    def __init__(self, temperature: float = 1.0, target_logits: bool = False, ignore_index: int | None = None) -> None:
        super().__init__()
        self.temperature = number("temperature", temperature, least=LEAST_TEMPERATURE)
        self.target_logits = target_logits
        self.ignore_index = checked_index(ignore_index)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> Values:
        """Return the loss of each sample, and their weights where some are ignored."""
        logits, targets, ignored = apart(wide(logits), targets, self.ignore_index)
        log_p = log_softmax(logits / self.temperature)
        if self.target_logits and targets.is_floating_point():
            log_q = log_softmax(targets.detach().to(logits.dtype) / self.temperature)
            shares, own = torch.exp(log_q), torch.exp(log_q) * log_q
        else:
            shares = distribution(targets, logits, 0.0)
            own = torch.xlogy(shares, shares)
        values = own.sum(1) - shared(shares, log_p)
        return by_sample(self.temperature**2 * values, ignored=ignored)
