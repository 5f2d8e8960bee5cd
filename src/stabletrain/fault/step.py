"""Faults in a step: its loss, its gradients, its buffers, the weights after it, and the validation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stabletrain.errors import ConfigurationError
from stabletrain.fault.base import Planned, Surroundings, check_factor
from stabletrain.finite import scale_all
from stabletrain.tree import local


class NanLoss(Planned):
    """The loss of the step's first microbatch is NaN, and so are the gradients that come from it."""

    def loss(self, steps: int, loss_sum: Tensor) -> Tensor:
        """Return NaN with the loss's graph, once in each step."""
        return loss_sum * math.nan if self._happens(steps) else loss_sum


class NanGradient(Planned):
    """One element of a gradient is NaN after the backward pass, at a finite loss."""

    @torch.no_grad()
    def after_backward(self, steps: int, model: nn.Module) -> None:
        """Make the first element of the first gradient NaN."""
        if self._happens(steps):
            _spoil_first([item._values() if item.is_sparse else item for item in _gradients(model)])


class Spike(Planned):
    """All gradients are far larger than usual, but finite.

    Args:
        at: the step, counted over the run from 0; None: step 100, or never in a run that is shorter.
        times: how many steps, from there on.
        factor: how many times larger; above 1.
    """

    def __init__(self, at: int | None = None, times: int = 1, factor: float = 1e4) -> None:
        super().__init__(at, times)
        self.factor = check_factor("factor", factor)

    @torch.no_grad()
    def after_backward(self, steps: int, model: nn.Module) -> None:
        """Multiply all gradients by the factor."""
        if self._happens(steps):
            scale_all(_gradients(model), self.factor)


class NanBuffer(Planned):
    """One element of a floating buffer, such as a running mean, is NaN after the forward passes."""

    def _check_possible(self, run: Surroundings) -> None:
        if not _floating(run.model.buffers()):
            raise ConfigurationError("the model has no floating buffer that could be NaN: choose another fault.")

    @torch.no_grad()
    def after_backward(self, steps: int, model: nn.Module) -> None:
        """Make the first element of the first floating buffer NaN, while the step can still be undone."""
        if self._happens(steps):
            _spoil_first(_floating(model.buffers()))


class Fp16Overflow(Planned):
    """The gradients overflow in float16 while the loss stays what it is: what a loss scale that is too high does.

    Args:
        at: the step, counted over the run from 0; None: step 100, or never in a run that is shorter.
        times: how many steps, from there on.
        scale: factor on the gradients that the backward pass begins with; above 1.
    """

    def __init__(self, at: int | None = None, times: int = 1, scale: float = 1e12) -> None:
        super().__init__(at, times)
        self.scale = check_factor("scale", scale)

    def _check_possible(self, run: Surroundings) -> None:
        if not run.loss_scale:
            raise ConfigurationError(
                "fault=fp16_overflow needs a run in float16: choose precision=fp16 or precision=fp16_conservative."
            )

    def loss(self, steps: int, loss_sum: Tensor) -> Tensor:
        """Return the same number with a gradient that is larger by `scale`, once in each step."""
        if not self._happens(steps):
            return loss_sum
        return loss_sum + (loss_sum - loss_sum.detach()) * (self.scale - 1.0)


class NanWeight(Planned):
    """One weight is NaN after the update: a fault of the memory or of an optimizer."""

    @torch.no_grad()
    def after_update(self, steps: int, model: nn.Module, optimizer: Optimizer) -> None:
        """Make the first element of the first trained parameter NaN."""
        if self._happens(steps):
            _spoil_first(_floating(parameter for parameter in model.parameters() if parameter.requires_grad))


class NanValidation(Planned):
    """The validation's loss is NaN although training is healthy.

    Args:
        at: the first validation after this step, counted over the run from 0; None: step 100.
        times: how many validations, from there on. One that is repeated without a step in between is healthy.
    """

    def __init__(self, at: int | None = None, times: int = 1) -> None:
        super().__init__(at, times)
        self._done = 0  # validations that were bad

    def validation(self, steps: int, metrics: dict[str, float]) -> dict[str, float]:
        """Return the metrics with the loss NaN, as often as was asked."""
        if steps <= self.at or steps <= self._last or self._done >= self.times:
            return metrics
        self._last, self._done = steps, self._done + 1
        return {**metrics, "loss": math.nan}

    def state_dict(self) -> dict[str, Any]:
        """Return the last time it happened, and how often it did."""
        return {**super().state_dict(), "done": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what a fault of the same kind remembered; of another kind, nothing."""
        super().load_state_dict(state)
        if state.get("kind") == type(self).__name__:
            self._done = int(state["done"])


def _gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def _floating(items: Any) -> list[Tensor]:
    return [tensor for tensor in items if tensor.is_floating_point() and tensor.numel() > 0]


def _spoil_first(found: list[Tensor]) -> None:
    own = local(found[0]) if found else torch.empty(0)  # of a sharded tensor, what this process holds
    if own.numel() > 0:
        own[(0,) * own.dim()] = math.nan
