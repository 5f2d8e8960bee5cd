"""Randomness is a function of where one stands: the same key gives the same draws, and nothing else is disturbed."""

from __future__ import annotations

import os
import random
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from processes import run
from stabletrain.randomness import key, keyed, keyed_all, uniform

PARTS = st.lists(st.one_of(st.integers(), st.text(max_size=5)), min_size=1, max_size=4).map(tuple)


@given(PARTS, PARTS)
def test_keys_are_equal_for_equal_parts_only(first: tuple[int | str, ...], second: tuple[int | str, ...]) -> None:
    assert (key(*first) == key(*second)) == (first == second)
    assert 0 <= key(*first) < 2**63


def test_a_key_is_the_same_in_another_process() -> None:
    code = "from stabletrain.randomness import key; print(key(3, 'order', 7))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "123"}
    other = run([sys.executable, "-c", code], environment=environment)
    assert int(other.stdout) == key(3, "order", 7)


def draws() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random()


def test_keyed_seeds_torch_and_puts_it_back() -> None:
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    with keyed(key(1)):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(4), expected)
    with keyed(key(1)):
        assert torch.equal(torch.rand(3), inside)
    with keyed(key(2)):
        assert not torch.equal(torch.rand(3), inside)


def test_keyed_all_seeds_three_generators_and_puts_them_back() -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    expected = draws()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    with keyed_all(key(1)):
        inside = draws()
    assert draws() == expected
    with keyed_all(key(1)):
        assert draws() == inside
    with keyed_all(key(2)):
        assert all(one != other for one, other in zip(draws(), inside, strict=True))


@pytest.mark.parametrize("block", [keyed, keyed_all])
def test_generators_are_put_back_after_an_error(block: Any) -> None:
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), block(key(1)):
        float(torch.rand(())) / 0
    assert torch.equal(torch.get_rng_state(), before)


def test_uniform_numbers_belong_to_sample_and_column_alone():
    indices = torch.tensor([5, 0, 2**40, 7])
    drawn = uniform(key(1, 2), indices, 3)
    assert drawn.dtype == torch.float64
    for row, index in enumerate(indices.tolist()):
        assert torch.equal(uniform(key(1, 2), torch.tensor([index]), 3)[0], drawn[row])
        assert torch.equal(uniform(key(1, 2), torch.tensor([index]), 2)[0], drawn[row, :2])
    assert len(set(drawn.flatten().tolist()) | set(uniform(key(1, 3), indices, 3).flatten().tolist())) == 24


def test_uniform_numbers_are_uniform_and_independent():
    drawn = uniform(key("test"), torch.arange(20_000), 4)
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) < 1
    # Bars of 5 standard errors: the mean has sqrt(1/12 n), a correlation 1 / sqrt(n), a share sqrt(p (1 - p) / n).
    assert torch.allclose(drawn.mean(0), torch.full((4,), 0.5, dtype=torch.float64), atol=5 * (12 * 20_000) ** -0.5)
    both = torch.cat([drawn, drawn.roll(1, 0)], 1).T.corrcoef()
    assert float((both - torch.eye(8)).abs().max()) < 5 * 20_000**-0.5
    counts = torch.histc(drawn, bins=16, min=0, max=1) / drawn.numel()
    assert float((counts - 1 / 16).abs().max()) < 5 * (1 / 16 * 15 / 16 / drawn.numel()) ** 0.5
    lowest_bits = (drawn * 2**53).long() & 1
    assert abs(float(lowest_bits.double().mean()) - 0.5) < 5 * (4 * drawn.numel()) ** -0.5
