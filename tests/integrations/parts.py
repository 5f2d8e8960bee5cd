"""A small network, batches of which some are bad, and how two runs are compared: the same for every library."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from guard.worlds import flatten

FEATURES, CLASSES, SAMPLES = 6, 3, 8


class Network(nn.Module):
    """With dropout, and with batch normalisation if wanted; it returns a loss if it is given labels."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        middle = [nn.BatchNorm1d(16)] if norm else []
        self.layers = nn.Sequential(
            nn.Linear(FEATURES, 16), *middle, nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, CLASSES)
        )

    def forward(self, inputs: Tensor, labels: Tensor | None = None, **_: Any) -> dict[str, Tensor]:
        outputs = self.layers(inputs)
        if labels is None:
            return {"logits": outputs}
        return {"loss": nn.functional.cross_entropy(outputs, labels), "logits": outputs}


def network(norm: bool = True) -> Network:
    torch.manual_seed(3)
    return Network(norm)


def batches(
    count: int, bad: Iterable[int] = (), without: Iterable[int] = (), *, large: Iterable[int] = ()
) -> list[dict[str, Tensor]]:
    """Return batches whose content depends on their number alone; `bad` ones hold a NaN, those in `without` lack."""
    made = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        inputs = torch.randn(SAMPLES, FEATURES, generator=generator)
        labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
        if number in bad:
            inputs[1, 2] = math.nan
        if number in large:
            inputs *= 1e4  # batch normalisation hides it from loss and gradients
        if number not in without:
            made.append({"inputs": inputs, "labels": labels})
    return made


def schedule(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda update: 1.0 / (1 + 0.1 * update))


def state(model: nn.Module, optimizer: Any, scheduler: Any = None, scaler: Any = None) -> dict[str, Any]:
    """Return every tensor and number of a run that a rejected step may not change."""
    found: dict[str, Any] = {}
    flatten("model", model.state_dict(), found)
    flatten("optimizer", optimizer.state_dict(), found)
    if scheduler is not None:
        flatten("scheduler", scheduler.state_dict(), found)
    if scaler is not None:
        flatten("scaler", scaler.state_dict(), found)
    found["randomness"] = torch.get_rng_state()
    return found


class InfiniteGradient(torch.autograd.Function):
    """The identity, whose gradient is Inf: an overflow at a finite loss."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * math.inf
