"""Optimizers against their formulas in float64, and the arguments they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from stabletrain import ConfigurationError
from stabletrain.optimizer import adam, adamw, set_learning_rate, sgd, stable_adamw


def steps(make: Any, gradients: list[Tensor], **options: Any) -> Tensor:
    weight = Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64))
    optimizer = make([weight], no_decay=[], **options)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def gradients() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(5)]


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_and_adamw_follow_their_formula(decoupled: bool) -> None:
    lr, first, second, eps, decay = 0.1, 0.9, 0.999, 1e-8, 0.05
    weight = torch.linspace(-1, 1, 6, dtype=torch.float64)
    mean, square = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for step, gradient in enumerate(gradients(), start=1):
        if decoupled:
            weight = weight * (1 - lr * decay)
        else:
            gradient = gradient + decay * weight
        mean = first * mean + (1 - first) * gradient
        square = second * square + (1 - second) * gradient**2
        weight = weight - lr * (mean / (1 - first**step)) / ((square / (1 - second**step)).sqrt() + eps)
    found = steps(adamw if decoupled else adam, gradients(), lr=lr, weight_decay=decay)
    torch.testing.assert_close(found, weight, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_follows_its_formula(nesterov: bool) -> None:
    weight, velocity = torch.linspace(-1, 1, 6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for gradient in gradients():
        gradient = gradient + 0.05 * weight
        velocity = 0.9 * velocity + gradient
        weight = weight - 0.1 * (gradient + 0.9 * velocity if nesterov else velocity)
    found = steps(sgd, gradients(), lr=0.1, momentum=0.9, weight_decay=0.05, nesterov=nesterov)
    torch.testing.assert_close(found, weight, rtol=1e-10, atol=1e-12)


def test_stable_adamw_limits_the_update_when_its_average_lags_behind() -> None:
    quiet = [torch.full((6,), 1e-3, dtype=torch.float64)] * 20
    spike = [*quiet, torch.full((6,), 10.0, dtype=torch.float64)]

    def last_move(make: Any) -> float:
        before = steps(make, quiet, lr=0.1, weight_decay=0.0, betas=(0.9, 0.99))
        return float((steps(make, spike, lr=0.1, weight_decay=0.0, betas=(0.9, 0.99)) - before).abs().max())

    assert last_move(stable_adamw) < 0.5 * last_move(adamw)


def test_the_schedule_multiplies_the_base_rate() -> None:
    optimizer = adamw([Parameter(torch.zeros(2))], lr=0.5)
    assert set_learning_rate(optimizer, 0.1) == pytest.approx(0.05)
    assert set_learning_rate(optimizer, 0.5) == 0.25  # of the base rate, not of the last one


def test_parameters_that_are_frozen_are_left_out() -> None:
    frozen = Parameter(torch.zeros(2), requires_grad=False)
    assert len(adamw([frozen, Parameter(torch.zeros(3))], lr=0.1).param_groups[0]["params"]) == 1
    with pytest.raises(ConfigurationError, match="nothing to train"):
        adamw([frozen], lr=0.1)


@pytest.mark.parametrize("make", [adam, adamw, sgd, stable_adamw])
@pytest.mark.parametrize("rate", [-1e-3, math.nan, math.inf])
def test_a_bad_learning_rate_is_refused(make: Any, rate: float) -> None:
    with pytest.raises(ConfigurationError, match=rf"optimizer.lr is {rate} .*must be a finite number of at least 0"):
        make([Parameter(torch.zeros(2))], lr=rate)


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (adamw, {"betas": (0.9, 1.0)}, r"optimizer.betas is \[0.9, 1.0\]"),
        (adamw, {"eps": -1.0}, "optimizer.eps is -1.0"),
        (adam, {"weight_decay": math.nan}, "optimizer.weight_decay is nan"),
        (sgd, {"momentum": -0.1}, "optimizer.momentum is -0.1"),
        (sgd, {"momentum": 0.0, "nesterov": True}, "optimizer.nesterov is true"),
    ],
)
def test_other_bad_numbers_are_refused(make: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        make([Parameter(torch.zeros(2))], lr=0.1, **options)
