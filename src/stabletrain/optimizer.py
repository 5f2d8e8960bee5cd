"""Optimizers from torch and `pytorch_optimizer`, with their arguments checked and fused kernels where they exist."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any, Literal

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


def hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return each parameter group's settings, without the parameters.

    Example:
        >>> hyperparameters(adamw([Parameter(torch.zeros(2))], lr=1e-3))[0]["lr"]
        0.001
    """
    names = ("params", "param_names")
    return [
        {name: copy.deepcopy(value) for name, value in group.items() if name not in names}
        for group in optimizer.param_groups
    ]


def with_changed(
    state: dict[str, Any], before: list[dict[str, Any]], now: list[dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, tuple[Any, Any]]]:
    """Put the settings that were changed since a state was saved into it; the others stay as training left them.

    An optimizer takes its settings from the state that it loads, so a new learning rate would be lost.

    Args:
        state: the optimizer's saved state.
        before: settings of the groups as they were built in the run that saved it.
        now: settings of the groups as they are built now.

    Returns:
        The state to load, and by name what was changed: before and now.

    Raises:
        ConfigurationError: there are more groups or fewer.

    Example:
        >>> saved = {"state": {}, "param_groups": [{"lr": 0.0004, "initial_lr": 0.001, "eps": 1e-8, "params": [0]}]}
        >>> state, changed = with_changed(saved, [{"lr": 0.001, "eps": 1e-8}], [{"lr": 0.005, "eps": 1e-8}])
        >>> state["param_groups"], changed
        ([{'lr': 0.005, 'initial_lr': 0.005, 'eps': 1e-08, 'params': [0]}], {'lr': (0.001, 0.005)})
    """
    if len(before) != len(now):
        raise ConfigurationError(
            f"the optimizer had {len(before)} parameter groups and has {len(now)}; group the parameters as before."
        )
    groups: list[dict[str, Any]] = []
    changed: dict[str, tuple[Any, Any]] = {}
    for saved, old, new in zip(state["param_groups"], before, now, strict=True):
        differing = {name: value for name, value in new.items() if name not in old or not _equal(old[name], value)}
        changed |= {name: (old.get(name), value) for name, value in differing.items()}
        if "lr" in differing and "initial_lr" in saved:
            differing["initial_lr"] = differing["lr"]  # the base rate, from which `set_learning_rate` goes
        groups.append({**saved, **differing})
    return {**state, "param_groups": groups}, changed


def _equal(one: Any, other: Any) -> bool:
    # A pair may come back from a file as a list.
    pairs = (list, tuple)
    return list(one) == list(other) if isinstance(one, pairs) and isinstance(other, pairs) else bool(one == other)


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
