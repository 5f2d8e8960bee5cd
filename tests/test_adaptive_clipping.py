"""Clippings that remember or look at weights: against their formulas in float64, and fed with what would ruin them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import Parameter

from stabletrain.clipping import AGC, AdaGC, AutoClip, ZClip
from stabletrain.errors import ConfigurationError
from stabletrain.finite import global_norm

NAN, INF = math.nan, math.inf
ADAPTIVE: dict[str, Callable[[], Any]] = {
    "autoclip": lambda: AutoClip(percentile=50.0, history=16),
    "zclip": lambda: ZClip(warmup=5),
    "adagc": lambda: AdaGC(warmup=5),
}
NORMS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


def clipped(clip: Any, norms: list[float], *, on_device: bool = False) -> list[float]:
    """Return the norms that gradients of these norms have after clipping."""
    weight = clip.__dict__.setdefault("weight", Parameter(torch.zeros(2, dtype=torch.float64)))
    found = []
    for norm in norms:
        weight.grad = torch.tensor([0.6, -0.8], dtype=torch.float64) * norm
        clip.clip([weight], torch.tensor(norm, dtype=torch.float64) if on_device else norm)
        found.append(float(weight.grad.norm()))
    return found


# ------------------------------------------------------------------------------------------------------ the formulas


def zclip_by_hand(norms: list[float], warmup: int, max_norm: float) -> list[float]:
    first: list[float] = []
    mean = variance = 0.0
    found = []
    for norm in norms:
        counted = norm
        if len(first) < warmup:
            first.append(norm)
            if len(first) == warmup:
                mean, variance = float(np.mean(first)), float(np.var(first))
        else:
            z = (norm - mean) / (math.sqrt(variance) + 1e-6)
            if z > 2.5:
                counted = mean + 2.5 * math.sqrt(variance) / (z / 2.5)
            mean = 0.97 * mean + 0.03 * counted
            variance = 0.97 * variance + 0.03 * (counted - mean) ** 2
        limit = min(counted, max_norm)
        found.append(norm * limit / (norm + 1e-6) if norm > limit else norm)
    return found


def autoclip_by_hand(norms: list[float], percentile: float, history: int) -> list[float]:
    found = []
    for count, norm in enumerate(norms, start=1):
        limit = float(np.percentile(norms[max(0, count - history) : count], percentile))
        found.append(norm * limit / (norm + 1e-6) if norm > limit else norm)
    return found


def adagc_by_hand(norms: list[float], warmup: int) -> list[float]:
    average = INF
    found = []
    for step, norm in enumerate(norms, start=1):
        if step == 1 or step < warmup:
            after = norm * min(1.0, 1.0 / (norm + 1e-6))
            average = min(average, after)
        else:
            after = norm * min(1.0, 1.05 * average / norm)
            average = 0.98 * average + 0.02 * after
        found.append(after)
    return found


@settings(max_examples=25, deadline=None)
@given(norms=NORMS, on_device=st.booleans(), warmup=st.integers(2, 12))
def test_each_follows_its_formula(norms: list[float], on_device: bool, warmup: int) -> None:
    for clip, expected in (
        (ZClip(warmup=warmup, max_norm=30.0), zclip_by_hand(norms, warmup, 30.0)),
        (AutoClip(percentile=10.0, history=7), autoclip_by_hand(norms, 10.0, 7)),
        (AutoClip(percentile=63.0), autoclip_by_hand(norms, 63.0, 4096)),
        (AdaGC(warmup=warmup), adagc_by_hand(norms, warmup)),
    ):
        assert clipped(clip, norms, on_device=on_device) == pytest.approx(expected, rel=1e-9), type(clip)


def test_the_defaults_are_the_papers() -> None:
    assert (AutoClip().percentile, AGC().share, AGC().eps) == (10.0, 0.01, 1e-3)
    zclip, adagc = ZClip(), AdaGC()
    assert (zclip.alpha, zclip.z_limit, zclip.warmup, zclip.max_norm) == (0.97, 2.5, 25, 1.0)
    assert (adagc.absolute, adagc.relative, adagc.beta, adagc.warmup) == (1.0, 1.05, 0.98, 100)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_agc_limits_each_unit_to_a_share_of_its_weights(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shapes = [(3, 4), (4, 3, 2, 2), (5,), (), (1, 4), (4, 1), (2, 3, 3)]
    parameters = [Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    parameters[0].data[1] = 0.0  # counts as eps
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
        if parameter.ndim > 1:
            parameter.grad[0] *= 1e-4  # a unit below its limit
    expected = []
    for parameter in parameters:
        weight, gradient = parameter.detach().double(), parameter.grad.double()
        vector = sum(size > 1 for size in weight.shape) < 2  # numbers and vectors are one unit
        units = [(...,)] if vector else [(row,) for row in range(len(weight))]
        for unit in units:
            limit = 0.01 * max(float(weight[unit].norm()), 1e-3)
            if float(gradient[unit].norm()) > limit:
                gradient[unit] *= limit / float(gradient[unit].norm())
        expected.append(gradient)
    before = [parameter.grad.clone() for parameter in parameters]
    AGC().clip(parameters, 1.0)
    for parameter, wanted, was in zip(parameters, expected, before, strict=True):
        rounding = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-2, "atol": 1e-6}
        torch.testing.assert_close(parameter.grad.double(), wanted, **rounding)
        if parameter.ndim > 1 and 1 not in parameter.shape[:1] and parameter.shape != (4, 1):
            assert torch.equal(parameter.grad[0], was[0])


def test_agc_leaves_out_the_last_linear_layer_or_what_it_is_told() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Softmax(1))

    def untouched(clip: AGC) -> list[str]:
        clip.begin([model])
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        clip.clip(list(model.parameters()), 1.0)
        return [name for name, p in model.named_parameters() if torch.equal(p.grad, torch.ones_like(p))]

    assert untouched(AGC()) == ["2.weight", "2.bias"]
    assert untouched(AGC(exclude=["0.*"])) == ["0.weight", "0.bias"]
    assert untouched(AGC(exclude=[])) == []
    with pytest.raises(ConfigurationError, match=r"clipping.exclude: '1.\*' matches no parameter"):
        AGC(exclude=["1.*"]).begin([model])


def test_agc_and_adagc_take_sparse_gradients() -> None:
    for make in (AGC, lambda: AdaGC(warmup=1)):
        torch.manual_seed(0)
        embedding = nn.Embedding(5, 3, sparse=True)
        dense = Parameter(embedding.weight.detach().clone())
        one, other = make(), make()
        for _ in range(2):
            embedding.weight.grad = None
            embedding(torch.tensor([1, 1, 4])).square().sum().backward()
            dense.grad = embedding.weight.grad.to_dense()
            norm = float(global_norm([dense.grad]))
            one.clip([embedding.weight], norm)
            other.clip([dense], norm)
            torch.testing.assert_close(embedding.weight.grad.to_dense(), dense.grad)


# ------------------------------------------------------------------------------------------- what would ruin them


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("on_device", [False, True])
def test_what_says_nothing_leaves_no_trace(name: str, on_device: bool) -> None:
    norms = [1.0, 1.5, 0.7, 1.2, 0.9, 1.1, 40.0, 1.3]
    clean, fed = ADAPTIVE[name](), ADAPTIVE[name]()
    between = [NAN, INF, 1e30, 0.0]
    expected, found = [], []
    for place, norm in enumerate(norms):
        found += clipped(fed, [norm], on_device=on_device)
        expected += clipped(clean, [norm], on_device=on_device)
        after = clipped(fed, [between[place % 4]], on_device=on_device)
        assert after[0] == pytest.approx(between[place % 4], nan_ok=True) or between[place % 4] == 1e30
        assert same(fed.state_dict(), clean.state_dict()), (place, between[place % 4])
    assert found == expected
    assert found[6] < 2.0  # and it is still at work: a spike is limited


@pytest.mark.parametrize("name", ADAPTIVE)
def test_nothing_but_zeros_and_nan_first_is_no_beginning(name: str) -> None:
    fed, clean = ADAPTIVE[name](), ADAPTIVE[name]()
    clipped(fed, [0.0, NAN, 0.0, INF])
    assert clipped(fed, [0.5, 0.8, 3.0]) == clipped(clean, [0.5, 0.8, 3.0])


def test_a_tensor_that_comes_later_has_a_warm_up_of_its_own() -> None:
    first, late = Parameter(torch.zeros(2)), Parameter(torch.zeros(2))
    clip = AdaGC(warmup=3)
    for _ in range(6):
        first.grad = torch.tensor([0.3, 0.4])
        clip.clip([first, late], 0.5)
    for norm, expected in ((20.0, 20.0 / math.hypot(20.0, 0.5)), (0.2, 0.2), (5.0, 1.05 * 0.2)):
        first.grad, late.grad = torch.tensor([0.3, 0.4]), torch.tensor([norm, 0.0])
        clip.clip([first, late], math.hypot(norm, 0.5))
        assert float(late.grad.norm()) == pytest.approx(expected, rel=1e-5)
        assert float(first.grad.norm()) == pytest.approx(0.5, rel=1e-6)
    # Another order, as of other groups: each keeps its own average.
    for parameter in (first, late):
        parameter.grad = torch.tensor([3.0, 4.0])
    clip.clip([late, first], math.hypot(5, 5))
    assert float(first.grad.norm()) == pytest.approx(1.05 * 0.5, rel=1e-5)
    assert float(late.grad.norm()) < 0.25


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ZClip(alpha=1.0), r"clipping.alpha is 1.0; it must be a number of at least 0 and below 1"),
        (lambda: ZClip(z_limit=0), "clipping.z_limit is 0; it must be a positive number"),
        (lambda: ZClip(warmup=1), "clipping.warmup is 1; it must be a whole number, 2 or more"),
        (lambda: ZClip(max_norm=NAN), "clipping.max_norm is nan"),
        (lambda: AutoClip(percentile=101), "clipping.percentile is 101; it must be a number from 0 to 100"),
        (lambda: AutoClip(history=0), "clipping.history is 0"),
        (lambda: AdaGC(beta=-0.1), "clipping.beta is -0.1"),
        (lambda: AdaGC(absolute=INF), "clipping.absolute is inf"),
        (lambda: AdaGC(relative="2"), "clipping.relative is '2'"),
        (lambda: AdaGC(warmup=2.5), "clipping.warmup is 2.5"),
        (lambda: AGC(share=0), "clipping.share is 0"),
        (lambda: AGC(eps=-1), "clipping.eps is -1"),
        (lambda: AGC(exclude="head"), "clipping.exclude is 'head'; it must be auto or a list"),
    ],
)
def test_numbers_outside_their_range_are_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        make()
