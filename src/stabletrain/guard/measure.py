"""What the guard looks at before it decides: losses, gradients, buffers, optimizer state, learning rates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stabletrain.errors import ConfigurationError
from stabletrain.finite import all_finite, sizes


def mean_loss(loss: Tensor | Sequence[Tensor]) -> Tensor:
    """Return the mean of the microbatches' losses, NaN or Inf if one of them is.

    Args:
        loss: one loss with a single element, or one for each microbatch, without loss scaling.

    Returns:
        Shape [], float32 (float64 if a loss is), without history.

    Raises:
        ConfigurationError: for a loss of more than one element, or none at all.

    Example:
        >>> mean_loss([torch.tensor(1.0), torch.tensor(3.0)])
        tensor(2.)
    """
    losses = [loss] if isinstance(loss, Tensor) else list(loss)
    if not losses or any(item.numel() != 1 for item in losses):
        shapes = [tuple(item.shape) for item in losses]
        raise ConfigurationError(f"the guard was given losses of shapes {shapes}; it takes one or more of one element.")
    wide = torch.float64 if any(item.dtype == torch.float64 for item in losses) else torch.float32
    if len(losses) == 1:
        return losses[0].detach().reshape(()).to(wide)
    return torch.stack([item.detach().reshape(()).to(wide) for item in losses]).mean()


def gradients(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """Return every gradient that the optimizers would apply, each once.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> _ = layer(torch.ones(2)).backward()
        >>> [tuple(gradient.shape) for gradient in gradients([torch.optim.SGD(layer.parameters())])]
        [(1, 2), (1,)]
    """
    return [parameter.grad for parameter in parameters(optimizers) if parameter.grad is not None]


def parameters(optimizers: Iterable[Optimizer]) -> list[nn.Parameter]:
    """Return every parameter that the optimizers train, each once, group by group."""
    groups = [group["params"] for optimizer in optimizers for group in optimizer.param_groups]
    return list(dict.fromkeys(chain(*groups)))


def state_tensors(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """Return the floating tensors of the optimizers' state and their parameters."""
    found: list[Tensor] = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                found.append(parameter.detach())
                values = optimizer.state[parameter].values() if parameter in optimizer.state else ()
                found += [value for value in values if isinstance(value, Tensor) and not value.is_sparse]
    return found


def state_is_finite(optimizers: Iterable[Optimizer]) -> Tensor:
    """Return whether parameters and optimizer state are finite, as a tensor on their device."""
    return all_finite(state_tensors(optimizers))


def bad_learning_rate(optimizers: Iterable[Optimizer]) -> float | None:
    """Return the first learning rate that isn't a finite number of at least 0, None if all are.

    A rate that is a tensor on an accelerator isn't looked at: reading it would wait for the device.

    Example:
        >>> rate = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=float("nan"))
        >>> bad_learning_rate([rate])
        nan
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate = group.get("lr", 0.0)
            if isinstance(rate, Tensor) and rate.device.type != "cpu":
                continue
            if not (math.isfinite(rate) and rate >= 0):
                return float(rate)
    return None


class BufferJudge:
    """Judges buffers: a finite one became NaN or Inf, or a running variance grew beyond all reason.

    Batch normalisation can hide a fault: inputs times 1e4 leave loss and gradients normal and ruin the running
    variance. Buffers that held NaN or Inf before (masks of -inf) are innocent. Variances are compared by their
    norm over the channels, with the usual epsilon of 1e-5 as floor, so that a dead channel that comes to life is
    no alarm; and only once they have seen data, because their start value of 1 says nothing about it.

    Args:
        max_growth: factor by which a running variance may grow in one step.
    """

    def __init__(self, max_growth: float) -> None:
        self.max_growth = max_growth
        self.seen_data = False

    def bad(self, names: list[str], now: Tensor, before: Tensor) -> Tensor:
        """Return which buffers went bad.

        Args:
            names: of the n buffers.
            now: shape [n], norm of each after the step's forward passes.
            before: shape [n], norm of each before them.

        Returns:
            bool, shape [n], on the same device.

        Example:
            >>> judge = BufferJudge(1000.0)
            >>> judge.seen_data = True
            >>> judge.bad(["running_mean", "running_var"], torch.tensor([1e9, 1e9]), torch.tensor([1.0, 1.0]))
            tensor([False,  True])
        """
        worse = (torch.isnan(now) & ~torch.isnan(before)) | (torch.isinf(now) & torch.isfinite(before))
        if self.seen_data and any(name.endswith("running_var") for name in names):
            variance = torch.tensor([name.endswith("running_var") for name in names]).to(now.device, non_blocking=True)
            worse = worse | (variance & (now > self.max_growth * before.clamp_min(1e-5)))
        return worse


def buffer_sizes(buffers: Sequence[Tensor], *, exact: bool = False) -> Tensor:
    """Return the Euclidean norm of each buffer, shape [n]; in float64 when `exact`, so that squares don't overflow."""
    return sizes([buffer.detach() for buffer in buffers], exact=exact)


def have_seen_data(modules: Iterable[nn.Module]) -> bool:
    """Return whether running statistics were loaded rather than just made (their counter isn't 0)."""
    counters = [
        buffer
        for module in modules
        for name, buffer in module.named_buffers(recurse=True)
        if name.endswith("num_batches_tracked")
    ]
    return any(int(counter) > 0 for counter in counters)
