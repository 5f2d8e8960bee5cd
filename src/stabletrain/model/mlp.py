"""A multi-layer perceptron for tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class MLP(nn.Module):
    """Hidden layers of linear, BatchNorm (if wanted), ReLU and dropout, then a linear layer.

    Args:
        in_features: numbers per sample; inputs of more dimensions are laid flat.
        num_classes: number of logits.
        hidden: width of each hidden layer; empty = a linear model.
        batch_norm: normalise after each hidden linear layer.
        dropout: share of hidden values set to 0, from 0 to below 1.

    Example:
        >>> MLP(in_features=30, num_classes=2, hidden=[16])(torch.zeros(4, 30)).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        hidden: Sequence[int] = (64, 64),
        batch_norm: bool = True,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        width = in_features
        for after in hidden:
            layers.append(nn.Linear(width, after, bias=not batch_norm))
            layers += [nn.BatchNorm1d(after)] if batch_norm else []
            layers.append(nn.ReLU())
            layers += [nn.Dropout(dropout)] if dropout > 0 else []
            width = after
        self.layers = nn.Sequential(*layers, nn.Linear(width, num_classes))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits [B, num_classes] of features [B, in_features]."""
        logits: torch.Tensor = self.layers(features)
        return logits
