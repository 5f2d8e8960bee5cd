"""Clipping against torch and against the formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from stabletrain.clipping import NoClipping, Norm, Value
from stabletrain.errors import ConfigurationError
from stabletrain.finite import global_norm


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    found = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), ())]
    for parameter in found:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return found


def gradients(found: list[nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.grad for parameter in found if parameter.grad is not None]


@pytest.mark.parametrize("max_norm", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("on_device", [False, True])
def test_norm_is_what_torch_does(max_norm: float, on_device: bool) -> None:
    ours, theirs = gradients(parameters()), parameters()
    norm = global_norm(ours)
    Norm(max_norm)(ours, norm if on_device else float(norm))
    torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    for got, wanted in zip(ours, gradients(theirs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0.0)


def test_value_is_what_torch_does_also_for_sparse_gradients() -> None:
    ours, theirs = gradients(parameters()), parameters()
    Value(0.5)(ours, 1.0)
    torch.nn.utils.clip_grad_value_(theirs, 0.5)
    assert all(torch.equal(got, wanted) for got, wanted in zip(ours, gradients(theirs), strict=True))
    # Twice 0.4 in one place is 0.8, which is more than 0.5.
    sparse = torch.sparse_coo_tensor([[0, 0, 2]], [0.4, 0.4, -3.0], (4,), check_invariants=True)
    Value(0.5)([sparse], 1.0)
    assert sparse.to_dense().tolist() == [0.5, 0.0, -0.5, 0.0]


def test_no_clipping_does_nothing_and_says_that_it_limits_nothing() -> None:
    gradient = torch.tensor([1e30])
    NoClipping()([gradient], 1e30)
    assert gradient.item() == torch.tensor(1e30).item() and NoClipping.limits is False


@pytest.mark.parametrize("limit", [0, -1.0, math.nan, math.inf, "5", None])
@pytest.mark.parametrize("kind", [Norm, Value])
def test_a_limit_must_be_a_positive_number(kind: Any, limit: Any) -> None:
    with pytest.raises(ConfigurationError, match="must be a positive number"):
        kind(limit)
