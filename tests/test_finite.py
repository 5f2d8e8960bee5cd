"""Norms, finiteness and scaling against float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stabletrain.finite import all_finite, first_nonfinite, global_norm, limit_norm, scale_all, sizes

NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)
TENSORS = st.lists(st.lists(NUMBERS, min_size=1, max_size=5), min_size=1, max_size=4)
FIXED = settings(max_examples=100, derandomize=True, deadline=None, database=None)


@given(TENSORS)
@FIXED
def test_the_exact_norm_is_the_float64_norm(values: list[list[float]]) -> None:
    tensors = [torch.tensor(row) for row in values]
    expected = torch.linalg.vector_norm(torch.cat(tensors).double())
    torch.testing.assert_close(global_norm(tensors, exact=True), expected, rtol=1e-12, atol=0.0)


@given(TENSORS)
@FIXED
def test_the_plain_norm_is_right_or_infinite(values: list[list[float]]) -> None:
    tensors = [torch.tensor(row) for row in values]
    norm, expected = global_norm(tensors), torch.linalg.vector_norm(torch.cat(tensors).double())
    assert norm.dtype == torch.float32
    if not torch.isinf(norm):
        # Squares below float32's smallest number may be lost.
        torch.testing.assert_close(norm.double(), expected, rtol=1e-5, atol=1e-18)
    else:
        assert expected > 1e18


@given(TENSORS, st.sampled_from((math.nan, math.inf, -math.inf)), st.integers(0, 1000))
@FIXED
def test_one_bad_element_always_shows(values: list[list[float]], bad: float, where: int) -> None:
    tensors = [torch.tensor(row) for row in values]
    assert bool(all_finite(tensors))
    row = tensors[where % len(tensors)]
    row[where % len(row)] = bad
    assert not math.isfinite(global_norm(tensors)) and not math.isfinite(global_norm(tensors, exact=True))
    assert not bool(all_finite(tensors))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sizes_of_each_dtype(dtype: torch.dtype) -> None:
    tensors = [torch.full((100,), 300.0, dtype=dtype), torch.zeros(0, dtype=dtype), torch.ones((), dtype=dtype)]
    found = sizes(tensors)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), torch.tensor([3000.0, 0.0, 1.0]).double(), rtol=1e-6, atol=0.0)


def test_mixed_dtypes_are_measured_in_the_widest() -> None:
    mixed = [torch.full((4,), 60000.0, dtype=torch.float16), torch.tensor([1e-3], dtype=torch.float64)]
    assert sizes(mixed).tolist() == [120000.0, 1e-3]
    assert sizes([torch.ones(1, dtype=torch.float16), torch.ones(1)]).dtype == torch.float32


def test_nothing_has_size_zero_and_is_finite() -> None:
    assert sizes([]).shape == (0,) and global_norm([]).item() == 0.0 and bool(all_finite([]))
    assert bool(all_finite([torch.tensor([1, 2]), torch.zeros(0)]))


def test_sparse_gradients_count_with_their_sums() -> None:
    sparse = torch.sparse_coo_tensor([[0, 0, 2]], [1.0, 2.0, 4.0], (5,), check_invariants=True)
    assert global_norm([sparse, torch.zeros(2)]).item() == 5.0


def test_the_first_bad_tensor_is_named() -> None:
    sparse = torch.sparse_coo_tensor([[0]], [math.nan], (5,), check_invariants=True)
    assert first_nonfinite([("a", torch.tensor([1])), ("b", torch.ones(2))]) is None
    assert first_nonfinite([("a", torch.ones(2)), ("b", sparse)]) == "b: 1 of 1 elements NaN"
    both = torch.tensor([math.nan, math.inf, 1.0])
    assert first_nonfinite([("b", both)]) == "b: 2 of 3 elements NaN or Inf"
    assert first_nonfinite([("b", both[1:])]) == "b: 1 of 2 elements Inf"


@pytest.mark.parametrize("factor", [0.25, torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64)])
def test_scale_all_works_in_place_on_dense_and_sparse(factor: float | torch.Tensor) -> None:
    sparse = torch.sparse_coo_tensor([[1]], [4.0], (3,), check_invariants=True)
    tensors = [torch.tensor([8.0]), sparse, torch.tensor(2.0, dtype=torch.float16)]
    scale_all(tensors, factor)
    assert tensors[0].item() == 2.0 and tensors[2].item() == 0.5 and tensors[2].dtype == torch.float16
    assert sparse.to_dense().tolist() == [0.0, 1.0, 0.0]


@given(TENSORS, st.sampled_from((1e-3, 0.5, 10.0)), st.booleans())
@FIXED
def test_limit_norm_is_the_formula(values: list[list[float]], max_norm: float, on_device: bool) -> None:
    tensors = [torch.tensor(row) for row in values]
    before = [tensor.double() for tensor in tensors]
    norm = global_norm(tensors, exact=True)
    limit_norm(tensors, norm if on_device else float(norm), max_norm)
    factor = min(1.0, max_norm / (float(norm) + 1e-6))
    for tensor, raw in zip(tensors, before, strict=True):
        # A factor below 1e-38 has fewer bits in float32.
        torch.testing.assert_close(tensor.double(), raw * factor, rtol=1e-6 if factor > 1e-37 else 0.01, atol=1e-44)


def test_limit_norm_leaves_small_gradients_untouched() -> None:
    gradient = torch.tensor([0.3, 0.4])
    version = gradient._version
    limit_norm([gradient], 0.5, 0.5)
    assert gradient._version == version
