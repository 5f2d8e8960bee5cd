"""The average of the weights against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stabletrain import ConfigurationError
from stabletrain.ema import ExponentialMovingAverage, none


def test_the_average_follows_its_formula() -> None:
    layer = nn.Linear(3, 2).double()
    average = ExponentialMovingAverage(layer, decay=0.8)
    expected = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    for update in range(12):
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(layer)
        decay = min(0.8, (1 + update) / (10 + update))
        for name, parameter in layer.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()
    for name, tensor in average.average.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-12)


def test_it_moves_on_for_parameters_in_bfloat16() -> None:
    layer = nn.Linear(1, 1, bias=False).bfloat16()
    with torch.no_grad():
        layer.weight.fill_(0.0)
    average = ExponentialMovingAverage(layer, decay=0.999)
    average.updates = 100_000
    with torch.no_grad():
        layer.weight.fill_(1.0)
    for _ in range(5000):
        average.update(layer)
    assert float(average.average["weight"]) == pytest.approx(1 - 0.999**5000, abs=1e-3)


def test_applied_puts_the_parameters_back_bit_for_bit_even_after_an_error() -> None:
    layer = nn.Linear(4, 4)
    average = ExponentialMovingAverage(layer)
    with torch.no_grad():
        layer.weight.add_(1.0)
    before = layer.weight.detach().clone()
    seen: list[bool] = []

    def fail() -> None:
        with average.applied(layer):
            seen.append(torch.equal(layer.weight, before))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [False]
    assert torch.equal(layer.weight, before)


def test_frozen_parameters_are_the_models_own() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.requires_grad_(False)
    average = ExponentialMovingAverage(layer)
    assert list(average.average) == ["bias"]
    with torch.no_grad():
        layer.weight.fill_(7.0)
        layer.bias.fill_(7.0)
    with average.applied(layer):
        assert bool((layer.weight == 7.0).all())
        assert not bool((layer.bias == 7.0).any())


def test_it_round_trips() -> None:
    layer = nn.Linear(4, 4)
    one, other = ExponentialMovingAverage(layer), ExponentialMovingAverage(nn.Linear(4, 4))
    one.update(layer)
    other.load_state_dict(one.state_dict())
    assert other.updates == 1
    assert all(torch.equal(one.average[name], other.average[name]) for name in one.average)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ConfigurationError, match=f"ema.decay is {decay}; it must be at least 0 and below 1"):
        ExponentialMovingAverage(nn.Linear(1, 1), decay=decay)


def test_none_is_nothing() -> None:
    assert none(nn.Linear(1, 1)) is None  # type: ignore[func-returns-value]
