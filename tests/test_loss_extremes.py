"""Every loss at its extremes: values and gradients are finite in every format, and point where those of float64 do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loss_cases import CASES, IGNORED, Case
from test_task import CountWaits

EDGES = torch.tensor([-1e4, -88.0, -20.0, -17.0, -1.0, -0.0, 1e-6, 1.0, 17.0, 20.0, 88.0, 1e4], dtype=torch.float64)


def drawn(case: Case, seed: int, samples: int, scale: float | None) -> tuple[list[Tensor], Any]:
    """Return outputs in float64, normal of a scale or (None) of extreme numbers and some ordinary ones, and targets."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for shape in case.outputs:
        values = torch.randn(samples, *shape, generator=generator, dtype=torch.float64)
        if scale is None:
            extreme = EDGES[torch.randint(len(EDGES), values.shape, generator=generator)]
            values = torch.where(torch.rand(values.shape, generator=generator) < 0.7, extreme, values)
        else:
            values = (values * scale).clamp(-1e4, 1e4)
        tensors.append(values)
    return tensors, case.targets(samples, generator)


def run(case: Case, tensors: list[Tensor], targets: Any) -> tuple[Tensor, list[Tensor]]:
    """Return the mean loss as the trainer takes it, and the gradient of each output."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    values, weights = case.call(leaves, targets)
    total = values.sum() if weights is None else (values * weights).sum()
    weight = float(len(values)) if weights is None else weights.sum().item()
    loss = total / (weight if weight > 0 else 1.0)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return loss.detach(), [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True)]


def check(case: Case, tensors: list[Tensor], targets: Any, dtype: torch.dtype) -> None:
    rounded = [tensor.to(dtype) for tensor in tensors]
    loss, grads = run(case, rounded, targets)
    exact, exact_grads = run(case, [tensor.double() for tensor in rounded], targets)
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-3, atol=1e-5)
    info = torch.finfo(dtype)
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        assert grad.dtype == dtype
        inside = exact_grad.abs() < info.max  # beyond it Inf is right, and a loss scaler sees it
        assert torch.isfinite(grad[inside]).all()
        assert not torch.isnan(grad).any()
        norm = float(exact_grad.norm())
        if inside.all() and norm > info.tiny:
            cosine = float((grad.double() * exact_grad).sum() / (grad.double().norm() * norm))
            assert cosine > 0.99 and abs(float(grad.double().norm()) / norm - 1) < 0.02, f"{grad}, not {exact_grad}"


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    samples=st.sampled_from([1, 2, 5]),
    scale=st.sampled_from([None, None, 1e-2, 1.0, 30.0, 1e4]),
    one_class=st.booleans(),
)
def test_values_and_gradients_at_extremes(
    name: str, seed: int, samples: int, scale: float | None, one_class: bool
) -> None:
    case = CASES[name]
    tensors, targets = drawn(case, seed, samples, scale)
    if one_class and isinstance(targets, Tensor) and not targets.is_floating_point():
        targets = torch.full_like(targets, int(targets.flatten()[0]))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check(case, tensors, targets, dtype)


@pytest.mark.parametrize("name", CASES)
def test_an_empty_batch_has_no_loss_and_no_gradient(name: str) -> None:
    tensors, targets = drawn(CASES[name], 0, 0, 1.0)
    loss, grads = run(CASES[name], tensors, targets)
    assert float(loss) == 0.0
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in tensors]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.ignores])
def test_what_is_ignored_does_not_count(name: str) -> None:
    case = CASES[name]
    tensors, targets = drawn(case, 1, 6, 2.0)
    targets[:3] = targets[:3] * 0  # so that a loss over pairs has some
    out = torch.tensor([4, 5])
    left, kept = run(case, [tensor[:4] for tensor in tensors], targets[:4])
    targets[out] = IGNORED
    for tensor in tensors:
        tensor[out] = float("nan")  # not even this may come through
    loss, grads = run(case, tensors, targets)
    torch.testing.assert_close(loss, left)
    for grad, expected in zip(grads, kept, strict=True):
        torch.testing.assert_close(grad[:4], expected)
        assert torch.equal(grad[out], torch.zeros_like(grad[out]))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.ignores])
def test_a_batch_of_ignored_labels_has_no_loss_and_no_gradient(name: str) -> None:
    tensors, targets = drawn(CASES[name], 2, 4, None)
    loss, grads = run(CASES[name], tensors, torch.full_like(targets, IGNORED))
    assert float(loss) == 0.0
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


@pytest.mark.parametrize("name", CASES)
def test_autocast_and_low_precision_change_nothing(name: str) -> None:
    case = CASES[name]
    tensors, targets = drawn(case, 3, 4, 1.0)
    low = [tensor.bfloat16() for tensor in tensors]
    expected, expected_weights = case.call([tensor.float() for tensor in low], targets)
    with torch.autocast("cpu", torch.bfloat16):
        values, weights = case.call(low, targets)
    assert values.dtype == torch.float32
    assert torch.equal(values, expected)
    assert (weights is None) == (expected_weights is None)
    assert weights is None or torch.equal(weights, expected_weights)


@pytest.mark.parametrize("name", [name for name in CASES if name != "ctc"])  # torch's own CTC reads the lengths
def test_no_loss_waits_for_the_device(name: str) -> None:
    case = CASES[name]
    tensors, targets = drawn(case, 4, 4, 1.0)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    loss = case.loss()
    with CountWaits() as count:
        values, weights = case.call(leaves, targets, loss)
        (values if weights is None else values * weights).sum().backward()
    assert count.waits == 0
