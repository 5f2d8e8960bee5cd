"""Optimizers from torch and `pytorch_optimizer`, with their arguments checked and fused kernels where they exist."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from stabletrain.errors import ConfigurationError

Fused = bool | Literal["auto"]


def adamw(
    parameters: Iterable[Parameter],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    fused: Fused = "auto",
) -> Optimizer:
    """Build AdamW (decoupled weight decay).

    Args:
        parameters: to train.
        lr: base learning rate; the schedule's factor is multiplied in for each update.
        betas: decay of the averages of the gradient and of its square.
        eps: added to the root of the second average.
        weight_decay: share of a weight taken away each update, times the learning rate.
        fused: one kernel for all parameters; `auto`: where the device has it.

    Raises:
        ConfigurationError: for a number outside its range.

    Source:
        Loshchilov, Hutter 2019, "Decoupled Weight Decay Regularization".

    Example:
        >>> adamw([Parameter(torch.zeros(2))], lr=1e-3).param_groups[0]["fused"]
        True
    """
    parameters = _check(parameters, lr=lr, eps=eps, weight_decay=weight_decay, betas=betas)
    return torch.optim.AdamW(
        parameters, lr=lr, betas=_pair(betas), eps=eps, weight_decay=weight_decay, fused=_fused(fused, parameters)
    )


def adam(
    parameters: Iterable[Parameter],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    fused: Fused = "auto",
) -> Optimizer:
    """Build Adam; arguments as for `adamw`, with the weight decay added to the gradient.

    Source:
        Kingma, Ba 2015, "Adam: A Method for Stochastic Optimization".
    """
    parameters = _check(parameters, lr=lr, eps=eps, weight_decay=weight_decay, betas=betas)
    return torch.optim.Adam(
        parameters, lr=lr, betas=_pair(betas), eps=eps, weight_decay=weight_decay, fused=_fused(fused, parameters)
    )


def sgd(
    parameters: Iterable[Parameter],
    *,
    lr: float,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    fused: Fused = "auto",
) -> Optimizer:
    """Build stochastic gradient descent.

    Args:
        parameters: to train.
        lr: base learning rate. Torch itself takes NaN here without a word.
        momentum: decay of the gradient's running sum; 0: none.
        nesterov: look ahead along the momentum; needs one.
        weight_decay: share of a weight added to its gradient.
        fused: one kernel for all parameters; `auto`: where the device has it.

    Raises:
        ConfigurationError: for a number outside its range.
    """
    parameters = _check(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
    if nesterov and momentum == 0:
        raise ConfigurationError("optimizer.nesterov is true with optimizer.momentum 0; it needs a momentum above 0.")
    return torch.optim.SGD(
        parameters,
        lr=lr,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        fused=_fused(fused, parameters),
    )


def stable_adamw(
    parameters: Iterable[Parameter],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> Optimizer:
    """Build StableAdamW: AdamW whose rate falls for a tensor when its second average lags behind.

    The rate of a tensor is lr / max(1, RMS), RMS = sqrt(mean(g^2 / max(v, eps^2))).

    Args:
        parameters: to train.
        lr: base learning rate.
        betas: decay of the averages of the gradient and of its square.
        eps: added to the root of the second average.
        weight_decay: share of a weight taken away each update, times the learning rate.

    Raises:
        ConfigurationError: for a number outside its range.

    Source:
        Wortsman et al. 2023, "Stable and low-precision training for large-scale vision-language models".
    """
    from pytorch_optimizer import StableAdamW  # imports slowly, so only where it is asked for

    parameters = _check(parameters, lr=lr, eps=eps, weight_decay=weight_decay, betas=betas)
    built: Optimizer = StableAdamW(parameters, lr=lr, betas=_pair(betas), eps=eps, weight_decay=weight_decay)
    return built


def set_learning_rate(optimizer: Optimizer, factor: float) -> float:
    """Set each group's rate to its base rate times `factor`; return the first group's.

    Example:
        >>> optimizer = adamw([Parameter(torch.zeros(2))], lr=1e-3)
        >>> set_learning_rate(optimizer, 0.5)
        0.0005
    """
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
    return float(optimizer.param_groups[0]["lr"])


def _check(parameters: Iterable[Parameter], *, betas: Iterable[float] = (), **numbers: float) -> list[Parameter]:
    for name, value in numbers.items():
        if not isinstance(value, (int, float)) or not (math.isfinite(value) and value >= 0):
            advice = " (base_lr times lr_scale, unless optimizer.lr is given)" if name == "lr" else ""
            raise ConfigurationError(
                f"optimizer.{name} is {value!r}{advice}; it must be a finite number of at least 0."
            )
    if any(not 0 <= beta < 1 for beta in betas):
        raise ConfigurationError(f"optimizer.betas is {list(betas)}; both must be at least 0 and below 1.")
    found = [parameter for parameter in parameters if parameter.requires_grad]
    if not found:
        raise ConfigurationError("the model has no parameter with requires_grad=True, so there is nothing to train.")
    return found


def _pair(betas: Iterable[float]) -> tuple[float, float]:
    first, second = betas
    return first, second


def _fused(wish: Fused, parameters: list[Parameter]) -> bool:
    if wish != "auto":
        return wish
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda", "mps", "xpu") for p in parameters)
