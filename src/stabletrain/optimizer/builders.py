"""The optimizers: their arguments are checked, and their parameters divided into groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from stabletrain.errors import ConfigurationError
from stabletrain.optimizer.groups import Given, NoDecay, Trained, check_numbers, grouped, pair_of_betas
from stabletrain.tree import is_distributed

Fused = bool | Literal["auto"]
Groups = Sequence[Mapping[str, Any]]


def adamw(
    parameters: Given,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    no_decay: NoDecay = "auto",
    groups: Groups = (),
    fused: Fused = "auto",
) -> Optimizer:
    """Build AdamW (decoupled weight decay).

    m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2; w <- (1 - lr decay) w - lr (m / (1 - b1^t)) /
    (sqrt(v / (1 - b2^t)) + eps).

    Args:
        parameters: the model, or its parameters; bare parameters are told apart by their shapes only.
        lr: base learning rate; the schedule's factor is multiplied in for each update.
        betas: decay of the averages of the gradient and of its square.
        eps: added to the root of the second average.
        weight_decay: share of a weight taken away each update, times the learning rate.
        no_decay: what has no weight decay: `auto` (norms, biases, embeddings), or name patterns.
        groups: exceptions, such as `[{"match": "head.*", "lr_factor": 10, "weight_decay": 0.0}]`: any setting of the
            optimizer, or a factor on the learning rate. The first whose name pattern matches counts.
        fused: one kernel for all parameters; `auto`: where the device has it.

    Raises:
        ConfigurationError: for a number outside its range, or a pattern that matches nothing.

    Source:
        Loshchilov, Hutter 2019, "Decoupled Weight Decay Regularization" (arXiv 1711.05101); torch's.

    Example:
        >>> adamw(torch.nn.Linear(2, 1), lr=1e-3).param_groups[0]["fused"]
        True
    """
    check_numbers(lr=lr, eps=eps, weight_decay=weight_decay)
    settings = {"lr": lr, "betas": pair_of_betas(betas), "eps": eps, "weight_decay": weight_decay}
    trained = Trained(parameters)
    divided = grouped(trained, settings, no_decay=no_decay, groups=groups)
    return torch.optim.AdamW(divided, fused=_fused(fused, trained))


def adam(
    parameters: Given,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    no_decay: NoDecay = "auto",
    groups: Groups = (),
    fused: Fused = "auto",
) -> Optimizer:
    """Build Adam; arguments and formula as for `adamw`, with the weight decay added to the gradient: g + decay w.

    Source:
        Kingma, Ba 2015, "Adam: A Method for Stochastic Optimization" (arXiv 1412.6980); torch's.
    """
    check_numbers(lr=lr, eps=eps, weight_decay=weight_decay)
    settings = {"lr": lr, "betas": pair_of_betas(betas), "eps": eps, "weight_decay": weight_decay}
    trained = Trained(parameters)
    divided = grouped(trained, settings, no_decay=no_decay, groups=groups)
    return torch.optim.Adam(divided, fused=_fused(fused, trained))


def sgd(
    parameters: Given,
    *,
    lr: float,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    no_decay: NoDecay = "auto",
    groups: Groups = (),
    fused: Fused = "auto",
) -> Optimizer:
    """Build stochastic gradient descent: b <- momentum b + g; w <- w - lr b.

    Args:
        parameters: as for `adamw`.
        lr: base learning rate. Torch itself takes NaN here without a word.
        momentum: decay of the gradient's running sum; 0: none.
        nesterov: look ahead along the momentum: w <- w - lr (g + momentum b); needs one.
        weight_decay: share of a weight added to its gradient.
        no_decay: as for `adamw`.
        groups: as for `adamw`.
        fused: one kernel for all parameters; `auto`: where the device has it.

    Raises:
        ConfigurationError: for a number outside its range, or a pattern that matches nothing.

    Source:
        Sutskever, Martens, Dahl, Hinton 2013, "On the importance of initialization and momentum in deep learning", in
        torch's form, where the rate is no part of the momentum.
    """
    check_numbers(lr=lr, momentum=momentum, weight_decay=weight_decay)
    if nesterov and momentum == 0:
        raise ConfigurationError("optimizer.nesterov is true with optimizer.momentum 0; it needs a momentum above 0.")
    settings = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
    trained = Trained(parameters)
    divided = grouped(trained, settings, no_decay=no_decay, groups=groups)
    return torch.optim.SGD(divided, lr=lr, fused=_fused(fused, trained))


def adafactor(
    parameters: Given,
    *,
    lr: float,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
    weight_decay: float = 0.0,
    no_decay: NoDecay = "auto",
    groups: Groups = (),
) -> Optimizer:
    """Build Adafactor, whose second average of a matrix is a row and a column: memory of rows + columns.

    With s = 1 - t^beta2_decay: R <- s R + (1 - s) mean of g^2 over columns, C likewise over rows; V = R C / mean(R);
    for vectors V <- s V + (1 - s) g^2. U = g / max(sqrt(V), eps1). w <- (1 - lr decay) w - rate U / max(1, RMS(U) / d),
    with rate = min(lr, 1 / sqrt(t)) max(eps2, RMS(w)).

    Args:
        parameters: as for `adamw`.
        lr: base learning rate, as a share of each tensor's root mean square; usually about 1e-2.
        beta2_decay: exponent of the average's decay, at most 0.
        eps: least root of the second average (None: the format's own epsilon), and least size of a tensor that counts.
        d: root mean square of the update beyond which it is scaled down, at least 1.
        weight_decay: share of a weight taken away each update, times the learning rate.
        no_decay: as for `adamw`.
        groups: as for `adamw`.

    Raises:
        ConfigurationError: for a number outside its range, a pattern that matches nothing, or sharded parameters.

    Source:
        Shazeer, Stern 2018, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost" (arXiv 1804.04235), as in
        torch.
    """
    first, second = eps
    check_numbers(lr=lr, weight_decay=weight_decay, d=d)
    check_numbers("optimizer.eps: ", first=0.0 if first is None else first, second=second)
    if beta2_decay > 0 or d < 1:
        raise ConfigurationError(
            f"optimizer.beta2_decay is {beta2_decay} and optimizer.d {d}; at most 0 and at least 1 are allowed."
        )
    trained = Trained(parameters)
    _refuse_sharded("adafactor", trained)
    settings = {"lr": lr, "beta2_decay": beta2_decay, "eps": (first, second), "d": d, "weight_decay": weight_decay}
    return torch.optim.Adafactor(grouped(trained, settings, no_decay=no_decay, groups=groups))


def lion(
    parameters: Given,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.1,
    no_decay: NoDecay = "auto",
    groups: Groups = (),
) -> Optimizer:
    """Build Lion: w <- (1 - lr decay) w - lr sign(b1 m + (1 - b1) g); m <- b2 m + (1 - b2) g.

    Every element moves by lr, however large the gradient is. It has no eps, and nothing to divide by.

    Args:
        parameters: as for `adamw`.
        lr: base learning rate; a third to a tenth of AdamW's.
        betas: decay within the update, and of the average.
        weight_decay: share of a weight taken away each update, times the learning rate; 3 to 10 times AdamW's.
        no_decay: as for `adamw`.
        groups: as for `adamw`.

    Raises:
        ConfigurationError: for a number outside its range, or a pattern that matches nothing.

    Source:
        Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms" (arXiv 2302.06675); `pytorch_optimizer`'s.
    """
    from pytorch_optimizer import Lion  # imports slowly, so only where it is asked for

    check_numbers(lr=lr, weight_decay=weight_decay)
    settings = {"lr": lr, "betas": pair_of_betas(betas), "weight_decay": weight_decay}
    built: Optimizer = Lion(grouped(Trained(parameters), settings, no_decay=no_decay, groups=groups), lr=lr)
    return built


def stable_adamw(
    parameters: Given,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    no_decay: NoDecay = "auto",
    groups: Groups = (),
) -> Optimizer:
    """Build StableAdamW: AdamW whose rate falls for a tensor when its second average lags behind.

    The rate of a tensor is lr / max(1, RMS), RMS = sqrt(mean(g^2 / max(v, eps^2))), also for the weight decay; the
    averages' decays are corrected for their start as in Adafactor: b (1 - b^(t-1)) / (1 - b^t).

    Args:
        parameters: as for `adamw`.
        lr: base learning rate.
        betas: decay of the averages of the gradient and of its square.
        eps: added to the root of the second average.
        weight_decay: share of a weight taken away each update, times the learning rate.
        no_decay: as for `adamw`.
        groups: as for `adamw`.

    Raises:
        ConfigurationError: for a number outside its range, a pattern that matches nothing, or sharded parameters.

    Source:
        Wortsman et al. 2023, "Stable and low-precision training for large-scale vision-language models"
        (arXiv 2304.13013); `pytorch_optimizer`'s.
    """
    from pytorch_optimizer import StableAdamW

    check_numbers(lr=lr, eps=eps, weight_decay=weight_decay)
    trained = Trained(parameters)
    _refuse_sharded("stable_adamw", trained)
    settings = {"lr": lr, "betas": pair_of_betas(betas), "eps": eps, "weight_decay": weight_decay}
    built: Optimizer = StableAdamW(grouped(trained, settings, no_decay=no_decay, groups=groups), lr=lr)
    return built


def adopt(
    parameters: Given,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.9999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    no_decay: NoDecay = "auto",
    groups: Groups = (),
) -> Optimizer:
    """Build ADOPT: Adam whose gradient is divided by the second average from before it, and so converges for any b2.

    m <- b1 m + (1 - b1) clip(g / max(sqrt(v), eps), t^(1/4)), where t counts the updates before this one;
    w <- (1 - lr decay) w - lr m; then v <- b2 v + (1 - b2) g^2. The first update only sets v to g^2.

    Args:
        parameters: as for `adamw`.
        lr: base learning rate.
        betas: decay of the averages of the normalised gradient and of the gradient's square.
        eps: least root of the second average.
        weight_decay: share of a weight taken away each update, times the learning rate.
        no_decay: as for `adamw`.
        groups: as for `adamw`.

    Raises:
        ConfigurationError: for a number outside its range, or a pattern that matches nothing.

    Source:
        Taniguchi et al. 2024, "ADOPT: Modified Adam Can Converge with Any beta2 with the Optimal Rate"
        (arXiv 2411.02853); `pytorch_optimizer`'s.
    """
    from pytorch_optimizer import ADOPT

    check_numbers(lr=lr, eps=eps, weight_decay=weight_decay)
    settings = {"lr": lr, "betas": pair_of_betas(betas), "eps": eps, "weight_decay": weight_decay}
    divided = grouped(Trained(parameters), settings, no_decay=no_decay, groups=groups)
    built: Optimizer = ADOPT(divided, lr=lr, weight_decouple=True, clip_lambda=_limit_of_adopt)
    return built


def _limit_of_adopt(step: float) -> float:
    """Return t^(1/4); the library counts the update that only sets v, the paper doesn't."""
    return math.pow(step - 1, 0.25)


def _refuse_sharded(name: str, trained: Trained) -> None:
    if any(is_distributed(parameter) for parameter in trained.parameters):
        raise ConfigurationError(
            f"optimizer={name} takes means over whole tensors, and parallel=fsdp2 divides them. Use parallel=ddp or "
            "optimizer=adamw."
        )


def _fused(wish: Fused, trained: Trained) -> bool:
    if wish != "auto":
        return wish
    devices = ("cpu", "cuda", "mps", "xpu")
    return all(p.is_floating_point() and p.device.type in devices for p in trained.parameters)
