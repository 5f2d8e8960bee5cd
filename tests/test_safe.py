"""Safe functions: torch's bits wherever torch is right, and what is documented where it isn't."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import stabletrain
from stabletrain import ConfigurationError, safe

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
HALVES = [torch.float16, torch.bfloat16]
INF, NAN = math.inf, math.nan
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, 2.0, -3.0, 1e-3, -1e-3, 1e-7, 1e-20, 1e-30, -1e-30, 1e-38, 1e-42, 1e-45, 6e-8,
           3e4, 65504.0, 1e5, 1e10, 1e19, -1e20, 3e38, 1e-160, 1e200, 11.0, 12.0, 88.0, 89.0, 709.0, 710.0, -1000.0,
           INF, -INF, NAN]  # fmt: skip
NUMBERS = st.lists(st.one_of(st.sampled_from(SPECIAL), st.floats(), st.floats(-4.0, 4.0)), min_size=1, max_size=8)
ONE: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "log": (safe.log, torch.log),
    "sqrt": (safe.sqrt, torch.sqrt),
    "exp": (safe.exp, torch.exp),
    "acos": (safe.acos, torch.acos),
    "pow 0.5": (lambda x: safe.pow(x, 0.5), lambda x: torch.pow(x, 0.5)),
    "pow -1": (lambda x: safe.pow(x, -1), lambda x: torch.pow(x, -1)),
    "pow 2": (lambda x: safe.pow(x, 2), lambda x: torch.pow(x, 2)),
    "pow 0": (lambda x: safe.pow(x, 0.0), lambda x: torch.pow(x, 0.0)),
    "pow 2.5": (lambda x: safe.pow(x, 2.5), lambda x: torch.pow(x, 2.5)),
}
TWO: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "div": (safe.div, torch.div),
    "pow": (safe.pow, torch.pow),
}


def tensor(values: list[float], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(dtype).requires_grad_()


def with_gradients(function: Callable[..., Tensor], *arguments: Tensor) -> tuple[Tensor, ...]:
    """Return the value and the slope at each place by each argument."""
    value = function(*arguments)
    return value.detach(), *torch.autograd.grad(value, arguments, torch.ones_like(value))


def equal(one: Tensor, other: Tensor) -> Tensor:
    """Return which elements are the same number; NaN is one."""
    return (one == other) | (torch.isnan(one) & torch.isnan(other))


@given(NUMBERS, st.sampled_from(DTYPES))
@pytest.mark.parametrize("name", ONE)
def test_one_argument_gives_torchs_bits_or_something_finite(
    name: str, numbers: list[float], dtype: torch.dtype
) -> None:
    ours, torchs = ONE[name]
    x = tensor(numbers, dtype)
    value, slope = with_gradients(ours, x)
    expected, expected_slope = with_gradients(torchs, x)
    finite = torch.isfinite(x)
    assert torch.isfinite(value[finite]).all() and torch.isfinite(slope[finite]).all()
    healthy = torch.isfinite(expected) & torch.isfinite(expected_slope)
    if name == "log":  # a floor is a floor, also for the last subnormal numbers, whose slopes would fit
        healthy &= x >= (2.0**-16 if dtype == torch.float16 else torch.finfo(dtype).tiny)
    assert equal(value, expected)[healthy & finite].all()
    assert equal(slope, expected_slope)[healthy & finite].all()
    assert value.dtype == expected.dtype and slope.dtype == dtype
    assert torch.isnan(value[torch.isnan(x) & torch.isnan(expected)]).all()


@given(st.lists(st.tuples(st.sampled_from(SPECIAL), st.sampled_from(SPECIAL)), min_size=1), st.sampled_from(DTYPES))
@pytest.mark.parametrize("name", TWO)
def test_two_arguments_give_torchs_bits_or_something_finite(
    name: str, pairs: list[tuple[float, float]], dtype: torch.dtype
) -> None:
    ours, torchs = TWO[name]
    first, second = (tensor(list(column), dtype) for column in zip(*pairs, strict=True))
    value, *slopes = with_gradients(ours, first, second)
    expected, *expected_slopes = with_gradients(torchs, first, second)
    finite = torch.isfinite(first) & torch.isfinite(second)
    assert torch.isfinite(value[finite]).all() and all(torch.isfinite(slope[finite]).all() for slope in slopes)
    healthy = finite & torch.isfinite(expected)
    assert equal(value, expected)[healthy].all()
    # A numerator's gradient stays where the denominator's can't be held; of a power it is both or the base's alone.
    assert equal(slopes[0], expected_slopes[0])[healthy & torch.isfinite(expected_slopes[0])].all()
    both = healthy & torch.isfinite(expected_slopes[0]) & torch.isfinite(expected_slopes[1])
    assert equal(slopes[1], expected_slopes[1])[both].all()
    assert torch.isnan(value[(torch.isnan(first) | torch.isnan(second)) & torch.isnan(expected) & (second != 0)]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("function", "numbers", "values"),
    [
        (safe.sqrt, [0.0, -0.0, -4.0, -INF], [0.0, 0.0, 0.0, 0.0]),
        (lambda x: safe.sqrt(x, floor=0.25), [0.25, 0.0, -1.0], [0.5, 0.5, 0.5]),
        (lambda x: safe.log(x, floor=1.0), [0.5, 0.0, -1.0, -INF], [0.0, 0.0, 0.0, 0.0]),
        (lambda x: safe.exp(x, ceiling=0.0), [1.0, 1e4, INF], [1.0, 1.0, 1.0]),
        (safe.acos, [1.0, 1.5, INF, -1.0, -1.5, -INF], [0.0, 0.0, 0.0, math.pi, math.pi, math.pi]),
        (lambda x: safe.pow(x, 0.5), [0.0, -1.0, -INF], [0.0, 0.0, 0.0]),
        (lambda x: safe.pow(x, -2.0, fill=7.0), [0.0, -0.0], [7.0, 7.0]),
        (lambda x: safe.pow(x, 1.5, fill=-1.0), [-2.0], [-1.0]),
        (lambda x: safe.div(torch.zeros_like(x), x), [0.0, -0.0], [0.0, 0.0]),
        (lambda x: safe.div(3.0, x, fill=5.0), [0.0, -0.0], [5.0, 5.0]),
        (lambda x: safe.div(x, torch.zeros_like(x)), [0.0, 1.0, -2.0], [0.0, 0.0, 0.0]),
        (safe.norm, [0.0, 0.0, -0.0], [0.0]),
    ],
)
def test_singular_points_have_the_value_that_is_documented_and_gradient_0(
    function: Any, numbers: list[float], values: list[float], dtype: torch.dtype
) -> None:
    x = tensor(numbers, dtype)
    value = function(x)
    assert value.reshape(-1).tolist() == torch.tensor(values, dtype=torch.float64).to(dtype).tolist()
    (slope,) = torch.autograd.grad(value.sum(), x)
    assert slope.tolist() == [0.0] * len(numbers)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_limits_fit_the_dtype(dtype: torch.dtype) -> None:
    most, x = torch.finfo(dtype).max, tensor([0.0], dtype)
    smallest = safe.log(x).double().exp()
    assert 1.0 / smallest < most
    edge = safe._LARGEST_EXPONENT[dtype]
    above = edge * (1 + torch.finfo(dtype).eps)
    assert torch.exp(tensor([edge], dtype)).isfinite() and tensor([edge], dtype).item() == edge
    assert torch.exp(tensor([above], dtype)).isinf()
    value, slope = with_gradients(safe.exp, tensor([edge, above, INF], dtype))
    assert value[0] == value[1] == value[2] and slope.tolist() == [value[0].item(), 0.0, 0.0]
    big = tensor([most, -most], dtype)
    for value, slope in (
        with_gradients(lambda x: safe.pow(x, 3), big),
        with_gradients(lambda x: safe.div(x, x / most / 4), big),
    ):
        assert torch.isfinite(value).all() and torch.isfinite(slope).all()
    value, slope = with_gradients(lambda x: safe.pow(x, 3), big)
    assert value.tolist() == [most, -most] and slope.tolist() == [0.0, 0.0]
    small = tensor([torch.finfo(dtype).smallest_normal / 8], dtype)
    value, *slopes = with_gradients(safe.div, tensor([-most], dtype), small)
    assert value.item() == -most and [slope.item() for slope in slopes] == [0.0, 0.0]


def test_a_floor_that_the_dtype_cannot_hold_is_raised_to_one_that_it_can() -> None:
    value, slope = with_gradients(lambda x: safe.log(x, floor=1e-12), tensor([0.0, 1.0], torch.float16))
    assert value[0] == pytest.approx(math.log(1.53e-5), rel=1e-3)
    assert slope.tolist() == [0.0, 1.0]


def test_the_numerator_keeps_a_gradient_that_fits() -> None:
    value, *slopes = with_gradients(safe.div, tensor([1.0], torch.float16), tensor([1e-3], torch.float16))
    assert value.item() == pytest.approx(1000, rel=1e-2)
    assert slopes[0].item() == pytest.approx(1000, rel=1e-2) and slopes[1].item() == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-14, 1e-7, 6e-6, 1e-3, 1.0, 250.0, 2e4, 1e15, 1e19, 1e37])
@pytest.mark.parametrize("upstream", [1.0, 2.0**-14])
def test_a_norm_of_any_size_has_the_unit_vector_as_its_gradient(
    dtype: torch.dtype, size: float, upstream: float
) -> None:
    direction = torch.tensor([[1.0, -2.0, 0.5, 0.0], [1.5, 1.0, 1.0, -0.25]], dtype=torch.float64)
    x = (direction * size).to(dtype).requires_grad_()
    exact = x.detach().double()
    if exact.isinf().any() or (exact == 0).all():
        return
    expected = torch.linalg.vector_norm(exact, dim=1, keepdim=True)
    value = safe.norm(x, 1)
    (slope,) = torch.autograd.grad(value, x, torch.full_like(value, upstream))
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    torch.testing.assert_close(value.double(), expected[:, 0], rtol=4 * torch.finfo(dtype).eps, atol=step)
    torch.testing.assert_close(
        slope.double() / upstream, exact / expected, rtol=4 * torch.finfo(dtype).eps, atol=step / upstream
    )


@given(st.integers(0, 2**32), st.sampled_from(DTYPES), st.floats(-2.0, 3.0))
def test_an_ordinary_norm_has_torchs_bits(seed: int, dtype: torch.dtype, exponent: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(3, 4, 5, generator=generator) * 10**exponent).to(dtype).requires_grad_()
    for dim in (None, 0, -1, (0, 2), (0, 1, 2)):
        for keepdim in (False, True):
            ours = with_gradients(lambda x, d=dim, k=keepdim: safe.norm(x, d, keepdim=k), x)
            torchs = with_gradients(lambda x, d=dim, k=keepdim: torch.linalg.vector_norm(x, dim=d, keepdim=k), x)
            for one, other in zip(ours, torchs, strict=True):
                assert one.shape == other.shape and torch.equal(one, other)


def test_norms_that_are_not_finite_are_torchs_and_one_that_does_not_fit_is_the_largest_number() -> None:
    rows = [[1.0, INF], [1.0, NAN], [3e38, 3e38], [0.0, 0.0]]
    value, slope = with_gradients(lambda x: safe.norm(x, 1), torch.tensor(rows, requires_grad=True))
    assert value[0] == INF and torch.isnan(value[1])
    assert value[2] == torch.finfo(torch.float32).max and value[3] == 0
    assert slope[2:].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    half = safe.norm(torch.full((2,), 65504.0, dtype=torch.float16))
    assert half.item() == 65504.0
    assert safe.norm(torch.empty(0, 3), 0).tolist() == [0.0, 0.0, 0.0]
    assert safe.norm(torch.tensor(-2.0)).item() == 2.0


def test_broadcast_arguments_get_gradients_of_their_own_shape() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(4, 3, requires_grad=True), torch.rand(4, 1, requires_grad=True)
    for ours, torchs in (safe.div, torch.div), (lambda a, b: safe.pow(a.abs(), b), lambda a, b: torch.pow(a.abs(), b)):
        for one, other in zip(with_gradients(ours, a, b), with_gradients(torchs, a, b), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("second_order", [False, True])
def test_gradients_agree_with_differences_away_from_the_singular_points(second_order: bool) -> None:
    check = torch.autograd.gradgradcheck if second_order else torch.autograd.gradcheck
    x = torch.tensor([0.3, 0.7, 0.9], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1.7, -0.6, 2.2], dtype=torch.float64, requires_grad=True)
    for function in (safe.log, safe.sqrt, safe.exp, safe.acos, safe.norm, lambda x: safe.pow(x, -0.5)):
        assert check(function, (x,))
    for function in (safe.div, safe.pow):
        assert check(function, (x, y))
    assert check(lambda y: safe.pow(y, 3), (y,))
    tiny, huge = torch.full((1, 3), 1e-140, dtype=torch.float64), torch.full((1, 3), 1e140, dtype=torch.float64)
    for size in () if second_order else (tiny, huge):
        assert check(lambda x, size=size: safe.norm(x * size) / size[0, 0], (x,))


def test_no_operation_of_the_backward_pass_makes_nan() -> None:
    """Not even where it would be masked afterwards: anomaly detection has nothing to say."""
    numbers = [0.0, -1.0, 1.0, -2.0, 1e-30, 1e-45, 1e30, 1000.0]
    x, y = tensor(numbers, torch.float32), tensor(numbers[::-1], torch.float32)
    losses = [function(x).sum() for function, _ in ONE.values()]
    losses += [safe.div(x, y).sum(), safe.pow(x, y).sum(), safe.norm(torch.stack([x, 0 * x]), 1).sum()]
    with pytest.warns(UserWarning, match="Anomaly Detection"):
        detection = torch.autograd.detect_anomaly()
    with detection:
        for loss in losses:
            (0.0 * loss).backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def program(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return (
        safe.log(x), safe.sqrt(x), safe.exp(x), safe.acos(x), safe.norm(x), safe.div(x, y), safe.pow(x, y),
        safe.pow(x, 0.5), safe.div(1.0, y),
    )  # fmt: skip


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler for the CPU")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's own modules, at their first import
def test_compiled_they_give_the_same_and_stay_finite() -> None:
    compiled = torch.compile(program, fullgraph=True, dynamic=False)
    for dtype in (torch.float16,):  # a compilation takes long, and this is the format that forgives least
        x = tensor([0.0, -1.0, 1.0, 0.5, 1e-30, 1e-7, 12.0, 90.0], dtype)
        y = tensor([1.0, 0.5, 0.0, 2.0, 1e-7, -2.0, 1e-4, 3.0], dtype)
        values = compiled(x, y)
        slopes = torch.autograd.grad(sum(value.double().sum() for value in values), (x, y))
        expected = program(x, y)
        expected_slopes = torch.autograd.grad(sum(value.double().sum() for value in expected), (x, y))
        for one, other in zip((*values, *slopes), (*expected, *expected_slopes), strict=True):
            assert torch.isfinite(one).all()
            torch.testing.assert_close(one, other, rtol=8 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("autocast_dtype", HALVES)
def test_autocast_changes_what_it_changes_in_torch(autocast_dtype: torch.dtype) -> None:
    layer = torch.nn.Linear(4, 4)
    inputs = torch.randn(5, 4)
    with torch.autocast("cpu", autocast_dtype):
        hidden = layer(inputs)
        assert hidden.dtype == autocast_dtype
        pairs = [
            (safe.log(hidden.exp()), torch.log(hidden.exp())),
            (safe.sqrt(hidden.exp()), torch.sqrt(hidden.exp())),
            (safe.exp(hidden), torch.exp(hidden)),
            (safe.norm(hidden, 1), torch.linalg.vector_norm(hidden, dim=1)),
            (safe.div(hidden, hidden.float()), torch.div(hidden, hidden.float())),
            (safe.pow(hidden.abs(), 0.5), torch.pow(hidden.abs(), 0.5)),
            (safe.acos(hidden * 0.1), torch.acos(hidden * 0.1)),
        ]
        zeros = torch.relu(hidden - 1e4)
        bad = safe.log(zeros).sum() + safe.norm(zeros) + safe.div(zeros, zeros).sum() + safe.sqrt(zeros).sum()
    for ours, torchs in pairs:
        assert ours.dtype == torchs.dtype and torch.equal(ours, torchs)
    bad.backward()
    assert layer.weight.grad is not None and (layer.weight.grad == 0).all()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: safe.log(torch.tensor(3)), "torch.int64.*float16, bfloat16, float32, float64"),
        (lambda: safe.norm([1.0]), "list"),
        (lambda: safe.div(torch.ones(1), 2.0), "float"),
        (lambda: safe.pow(torch.ones(1), torch.tensor(2)), "int64"),
        (lambda: safe.log(torch.ones(1), floor=0.0), "floor=0.0"),
        (lambda: safe.sqrt(torch.ones(1), floor=-1.0), "floor=-1.0"),
        (lambda: safe.exp(torch.ones(1), ceiling=NAN), "ceiling=nan"),
    ],
)
def test_what_cannot_be_used_gets_a_message(call: Callable[[], Tensor], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        call()


def test_the_examples_of_the_documentation_hold() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "safe.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3 and text.count("assert") >= 6
    exec("".join(blocks), {})


def test_it_is_a_public_name() -> None:
    assert stabletrain.safe is safe
    assert "safe" in stabletrain.__all__
