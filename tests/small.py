"""Small networks, data and operations that several tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stabletrain.data import ArrayDataset


class Multiply(torch.autograd.Function):
    """The identity, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient * ctx.factor, None


class Normalised(nn.Module):
    """Batch normalisation and dropout, from 5 features to 3 classes; notes how many samples it sees in training."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
        self.seen = 0
        self.largest = 0  # batch

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.seen, self.largest = self.seen + len(inputs), max(self.largest, len(inputs))
        logits: Tensor = self.layers(inputs)
        return logits


class RootOfDistance(nn.Module):
    """Its gradient is NaN for a sample of zeros, at a finite loss and whatever the loss scale."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.layer(inputs)
        return logits * (logits * inputs.abs().sum(1, keepdim=True)).square().sum(1, keepdim=True).sqrt()


def points(count: int = 96) -> ArrayDataset:
    """Return points around three centres, and which centre that is."""
    targets = torch.arange(count) % 3
    inputs = torch.randn(count, 5, generator=torch.Generator().manual_seed(0)) + targets[:, None]
    return ArrayDataset(inputs, targets)
