"""The task of predicting each next token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from stabletrain.errors import ConfigurationError
from stabletrain.task.base import AdditiveTask


class NextToken(AdditiveTask):
    """One token out of a vocabulary for each position; the loss is the mean over tokens, not over sequences.

    The data is the pair (tokens, targets); the model turns the tokens into logits [B, T, V].

    Args:
        loss: what `stabletrain.loss` offers: called with logits [N, V] and targets (int64 [N] or probabilities [N, V])
            it returns the loss of each token and their weights, or None.

    Example:
        >>> from stabletrain.loss import CrossEntropy
        >>> logits, targets = torch.zeros(2, 3, 4), torch.tensor([[0, 1, 2], [3, -1, -1]])
        >>> output = NextToken(CrossEntropy()).step(nn.Identity(), (logits, targets))
        >>> output.weight, output.loss_sum / output.weight
        (tensor(4.), tensor(1.3863))
    """

    name = "next_token"
    counts = 2

    def _counted(self, outputs: Any, targets: Any) -> Sequence[torch.Tensor]:
        targets = _as_one(targets)
        there, wanted = _told(targets), targets.argmax(2) if targets.is_floating_point() else targets
        return ((outputs.argmax(2) == wanted) & there).sum(), there.sum()

    def _metrics(self, counted: Sequence[float], samples: float) -> dict[str, float]:
        right, count = counted
        if count == 0:
            raise ConfigurationError(
                "there is nothing to evaluate: the loader gave no targets. Give it a part with samples."
            )
        return {"accuracy": right / count}

    def _losses(self, outputs: Any, targets: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the mean loss of each sample's tokens [B], and the sum of their weights [B]."""
        logits, targets = outputs, _as_one(targets)
        soft = targets.is_floating_point()
        fits = logits.dim() == 3 and logits.shape[: 3 if soft else 2] == targets.shape
        if not fits or not (soft or targets.dtype == torch.int64):
            raise ConfigurationError(
                f"the model returned {list(logits.shape)} for {targets.dtype} targets {list(targets.shape)}; logits of "
                "the shape [samples, tokens, vocabulary] and targets int64 [samples, tokens], or probabilities of the "
                "logits' shape, are needed."
            )
        counts = _told(targets)
        try:
            per_token, weights = self.loss(logits.flatten(0, 1), targets.clamp_min(0).flatten(0, 1))
        except (IndexError, RuntimeError):
            high = -1 if soft else int(targets.max())
            if high < logits.shape[2]:
                raise
            raise ConfigurationError(
                f"a target is the token {high}, but the model has {logits.shape[2]} outputs: tokens go from 0 to "
                f"{logits.shape[2] - 1}. Correct the data, or give the model more outputs (model.vocabulary)."
            ) from None
        weights = torch.ones_like(per_token) if weights is None else weights
        # `where` and not a product: what stands at a position without a target may be anything.
        sums = torch.where(counts, (per_token * weights).view_as(counts), 0.0).sum(1)
        weights = torch.where(counts, weights.view_as(counts), 0.0).sum(1)
        return torch.where(weights > 0, sums / torch.where(weights > 0, weights, 1.0), 0.0 * sums), weights


def _told(targets: torch.Tensor) -> torch.Tensor:
    """Return where there is a target, bool [B, T]; one that is NaN is there, so that it is seen."""
    return ~((targets[..., 0] if targets.is_floating_point() else targets) < 0)


def _as_one(targets: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    if isinstance(targets, torch.Tensor):
        return targets
    return nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-1)
