"""An exponential moving average of the weights, which often evaluates better than the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stabletrain.errors import ConfigurationError


def none(model: nn.Module) -> None:
    """Keep no average."""


class ExponentialMovingAverage:
    """Averages the parameters over the updates: average = decay * average + (1 - decay) * parameter.

    Kept in float32 at least: in bfloat16 an average with decay 0.999 stands still. In the first updates the decay is
    min(decay, (1 + n) / (10 + n)), so that the random start is soon forgotten. Buffers and frozen
    parameters are taken from the model.

    Args:
        model: whose parameters are averaged.
        decay: share of the old average that stays at each update, at least 0 and below 1.

    Raises:
        ConfigurationError: for a decay outside its range.

    Source:
        Polyak, Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging", in its exponential form.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> average = ExponentialMovingAverage(layer, decay=0.5)
        >>> with torch.no_grad():
        ...     _ = layer.weight.fill_(3.0)
        >>> average.update(layer)
        >>> with average.applied(layer):
        ...     layer.weight.item() != 3.0
        True
        >>> layer.weight.item()
        3.0
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ConfigurationError(f"ema.decay is {decay}; it must be at least 0 and below 1.")
        self.decay = decay
        self.updates = 0
        self.average = {name: _wide(parameter.detach()).clone() for name, parameter in trained(model)}

    @torch.no_grad()
    def restart(self, model: nn.Module) -> None:
        """Begin anew from these parameters."""
        for tensor, (_, parameter) in zip(self.average.values(), trained(model), strict=True):
            tensor.copy_(parameter)
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the parameters after an update."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = [_wide(parameter.detach()) for _, parameter in trained(model)]
        torch._foreach_lerp_(list(self.average.values()), current, 1 - decay)
        self.updates += 1

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Put the average in the parameters' place inside the block, and put them back bit for bit."""
        kept = [parameter.detach().clone() for _, parameter in trained(model)]
        _copy_into(model, list(self.average.values()))
        try:
            yield
        finally:
            _copy_into(model, kept)

    def state_dict(self) -> dict[str, Any]:
        """Return the average, by parameter name, and the number of updates."""
        return {"average": dict(self.average), "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over average and number of updates."""
        for name, tensor in self.average.items():
            tensor.copy_(state["average"][name])
        self.updates = int(state["updates"])


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters that take a gradient, with their names."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@torch.no_grad()
def _copy_into(model: nn.Module, tensors: list[Tensor]) -> None:
    for (_, parameter), tensor in zip(trained(model), tensors, strict=True):
        parameter.copy_(tensor)
