"""Attention pooling: from the states of a sequence or a bag to one vector."""

from __future__ import annotations

import math

import torch
from torch import nn

from stabletrain.checks import whole
from stabletrain.errors import ConfigurationError


class AttentionPooling(nn.Module):
    """Mean of the states weighted by what a small network scores them: `softmax(v . tanh(W h))`.

    Weights and sum are computed in float32 (float64 for states in float64), whatever the precision of the states. What
    is masked has weight 0 exactly, and neither its value nor its gradient, be they NaN, reaches the others. A row that
    is masked as a whole gives zeros.

    Args:
        width: numbers in each state, W.
        hidden: width of the scoring network.
        clamp: scores are kept from -clamp to clamp, so that no state outweighs another by more than exp(2 clamp);
            above 0; None = no limit.

    Raises:
        ConfigurationError: for widths below 1, and a clamp that is no finite number above 0.

    References:
        Z. Yang et al.: Hierarchical Attention Networks for Document Classification, 2016.
        M. Ilse, J. Tomczak, M. Welling: Attention-based Deep Multiple Instance Learning, 2018.

    Example:
        >>> pooling = AttentionPooling(width=2, hidden=4)
        >>> states, mask = torch.ones(2, 3, 2), torch.tensor([[True, True, False], [False, False, False]])
        >>> pooling(states, mask).round(decimals=4).tolist()
        [[1.0, 1.0], [0.0, 0.0]]
    """

    def __init__(self, width: int, hidden: int, clamp: float | None = None) -> None:
        super().__init__()
        for name, value in (("width", width), ("hidden", hidden)):
            whole(f"{name} of the attention pooling", value)
        if clamp is not None and (isinstance(clamp, bool) or not 0 < clamp < math.inf):
            raise ConfigurationError(
                f"clamp of the attention pooling is {clamp!r}; a finite number above 0, or null (no limit), is allowed."
            )
        self.hidden = nn.Linear(width, hidden)
        self.score = nn.Linear(hidden, 1, bias=False)
        self.clamp = clamp

    def forward(self, states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the pooled states [B, W].

        Args:
            states: [B, T, W].
            mask: bool [B, T], True where a state counts; None = all do.
        """
        return self._pooled(_wide(states, mask), self.weights(states, mask))

    def weights(self, states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weight of each state [B, T]: from 0, in sum 1, or 0 where a row is masked as a whole.

        Args:
            states: [B, T, W].
            mask: bool [B, T], True where a state counts; None = all do.
        """
        if mask is not None:
            states = states.masked_fill(~mask.unsqueeze(2), 0.0)
        scores = _wide(self.score(torch.tanh(self.hidden(states))).squeeze(2))
        if self.clamp is not None:
            scores = scores.clamp(-self.clamp, self.clamp)
        if mask is None:
            return scores.softmax(1)
        # The lowest finite number, not -inf: a row of -inf alone would be NaN, and so would its gradient.
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(1).masked_fill(~mask, 0.0)

    @staticmethod
    def _pooled(states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        # A product and a sum, since autocast would lower a matrix product.
        return (weights.unsqueeze(2) * states).sum(1)


def _wide(tensor: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return wide if mask is None else wide.masked_fill(~mask.unsqueeze(2), 0.0)
