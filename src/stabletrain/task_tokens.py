"""The task of predicting each next token."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from stabletrain.errors import ConfigurationError
from stabletrain.task import Batch, Output


class NextToken:
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

    def __init__(self, loss: nn.Module) -> None:
        self.loss = loss

    def step(self, model: nn.Module, data: Any) -> Output:
        """Return the loss of one microbatch, summed over its tokens.

        Args:
            model: from tokens to logits [B, T, V].
            data: the pair (tokens, targets): targets int64 [B, T], or a list of B tensors [length]; below 0 = none. Or
                probabilities [B, T, V].

        Raises:
            ConfigurationError: for logits and targets that don't fit each other.
        """
        tokens, targets = data
        per_token, weights = self._losses(model(tokens), _as_one(targets))
        with torch.no_grad():
            per_sample = per_token.sum(1) / weights.sum(1).clamp_min(torch.finfo(weights.dtype).tiny)
        return Output(per_token.sum(), weights.sum(), per_sample_loss=per_sample)

    def evaluate(
        self,
        model: nn.Module,
        loader: Iterable[Batch],
        total: Callable[[torch.Tensor], torch.Tensor] = lambda own: own,
    ) -> dict[str, float]:
        """Return the mean loss and the share of right answers over all tokens, with the model in evaluation mode.

        Args:
            model: from tokens to logits [B, T, V]; its modules are put back into the modes that they had.
            loader: microbatches whose data is the pair (tokens, targets).
            total: adds a tensor up over all processes, each of which sees a share of the microbatches.

        Returns:
            `loss` (nats per token) and `accuracy`.

        Raises:
            ConfigurationError: for a loader without targets, and for logits and targets that don't fit each other.
        """
        modes = [(module, module.training) for module in model.modules()]
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        model.eval()
        try:
            with torch.no_grad():
                for batch in loader:
                    tokens, targets = batch.data[0], _as_one(batch.data[1])
                    logits = model(tokens)
                    per_token, weights = self._losses(logits, targets)
                    counts, wanted = _told(targets), targets.argmax(2) if targets.is_floating_point() else targets
                    right = ((logits.argmax(2) == wanted) & counts).sum()
                    sums = sums + torch.stack([per_token.sum(), weights.sum(), right, counts.sum()]).double()
        finally:
            for module, mode in modes:
                module.training = mode
        loss, weight, right_answers, count = total(sums).tolist()
        if count == 0:
            raise ConfigurationError(
                "there is nothing to evaluate: the loader gave no targets. Give it a part with samples."
            )
        # With all weights 0 there is no mean; the product keeps a NaN a NaN.
        return {"loss": loss / weight if weight != 0 else 0.0 * loss, "accuracy": right_answers / count}

    def _losses(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weighted loss of each token and its weight, both [B, T] and 0 where there is no target."""
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
        per_token = torch.where(counts, (per_token * weights).view_as(counts), 0.0)
        return per_token, torch.where(counts, weights.view_as(counts), 0.0)


def _told(targets: torch.Tensor) -> torch.Tensor:
    """Return where there is a target, bool [B, T]; one that is NaN is there, so that it is seen."""
    return ~((targets[..., 0] if targets.is_floating_point() else targets) < 0)


def _as_one(targets: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    if isinstance(targets, torch.Tensor):
        return targets
    return nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-1)
