"""What the benchmarks train: four models with data in memory, small enough for a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stabletrain.data import ArrayDataset, Splits, digits
from stabletrain.task import Output


@dataclass(frozen=True)
class Workload:
    """A model, its data and its loss.

    Args:
        name: for the table.
        model: makes the model, always with the same weights.
        inputs: shape [N, ...].
        targets: shape [N] or [N, T].
        batch_size: samples per step.
        loss: from the model's output and the targets to a mean.
    """

    name: str
    model: Callable[[], nn.Module]
    inputs: Tensor
    targets: Tensor
    batch_size: int
    loss: Callable[[Tensor, Tensor], Tensor]

    def splits(self) -> Splits:
        """Return the data as the trainer takes it, without validation and test."""
        return Splits(train=ArrayDataset(self.inputs, self.targets))


class MeanLoss:
    """The task for a loss that is already a mean over the batch."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.loss = loss

    def step(self, model: nn.Module, data: Any) -> Output:
        """Return the loss times the batch size, and that size."""
        inputs, targets = data
        return Output(loss_sum=self.loss(model(inputs), targets) * len(targets), weight=len(targets))

    def evaluate(self, model: nn.Module, loader: Any) -> dict[str, float]:
        """Measure nothing: only steps are timed."""
        return {}


class Transformer(nn.Module):
    """A language model: width 128, 4 layers, 4 heads, sequences of 64 tokens out of 64."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 128)
        self.position = nn.Parameter(torch.randn(64, 128) * 0.02)
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(128, 64)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(64))

    def forward(self, tokens: Tensor) -> Tensor:
        """Turn tokens [B, 64] into logits [B, 64, 64]."""
        hidden = self.layers(self.embedding(tokens) + self.position, mask=self.mask, is_causal=True)
        return self.head(hidden)


class Recurrent(nn.Module):
    """An LSTM over 60 steps of 110 features, 64 hidden, 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(110, 64, batch_first=True)
        self.head = nn.Linear(64, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Turn [B, 60, 110] into logits [B, 3]."""
        return self.head(self.lstm(inputs)[0][:, -1])


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Let `make` give the same weights each time."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return make()

    return build


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy over all tokens."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def workloads() -> dict[str, Workload]:
    """Return all four by name."""
    from stabletrain.model import ConvNet

    torch.manual_seed(0)
    images = digits(seed=0).train
    tokens = torch.randint(0, 64, (320, 65))
    small = nn.Sequential
    return {
        "transformer": Workload(
            "transformer", seeded(Transformer), tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), 16, token_loss
        ),
        "lstm": Workload(
            "lstm", seeded(Recurrent), torch.randn(1280, 60, 110), torch.randint(0, 3, (1280,)), 32, F.cross_entropy
        ),
        "digits": Workload(
            "digits",
            seeded(lambda: ConvNet(in_channels=1, num_classes=10, image_size=(8, 8))),
            images.inputs,
            images.targets,
            64,
            F.cross_entropy,
        ),
        "mlp": Workload(
            "mlp",
            seeded(lambda: small(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))),
            torch.randn(6400, 64),
            torch.randint(0, 10, (6400,)),
            64,
            F.cross_entropy,
        ),
    }
