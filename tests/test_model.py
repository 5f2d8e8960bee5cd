"""Models: shapes, sizes, learning signal, and independence of the samples of a batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stabletrain.errors import ConfigurationError
from stabletrain.model import MLP, ConvNet, RecurrentClassifier
from stabletrain.precision import Precision


def ragged(lengths: list[int], features: int = 3, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, features, generator=generator) for length in lengths]


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (5, 9), (1, 1)])
@pytest.mark.parametrize("channels", [(4,), (4, 6), (3, 4, 5)])
def test_convnet_takes_any_size(size: tuple[int, int], channels: tuple[int, ...]) -> None:
    if min(size) >> (len(channels) - 1) < 1:
        with pytest.raises(ConfigurationError, match="halved"):
            ConvNet(2, 5, size, channels, hidden=7)
        return
    assert ConvNet(2, 5, size, channels, hidden=7)(torch.rand(3, 2, *size)).shape == (3, 5)


def test_the_default_convnet_has_buffers_and_randomness() -> None:
    model = ConvNet(1, 10, (8, 8))
    kinds = {type(module) for module in model.modules()}
    assert {nn.BatchNorm1d, nn.BatchNorm2d, nn.Dropout} <= kinds


@pytest.mark.parametrize("hidden", [[], [5], [7, 6]])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_mlp_takes_what_it_is_told(hidden: list[int], batch_norm: bool, dropout: float) -> None:
    model = MLP(4, 3, hidden, batch_norm=batch_norm, dropout=dropout)
    assert model(torch.rand(6, 4)).shape == (6, 3)
    assert model(torch.rand(6, 2, 2)).shape == (6, 3)
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(nn.BatchNorm1d) == (len(hidden) if batch_norm else 0)
    assert kinds.count(nn.Dropout) == (len(hidden) if dropout > 0 else 0)


MODELS = {
    "convnet": (ConvNet(1, 3, (4, 4), (4, 5), hidden=6), torch.rand(8, 1, 4, 4)),
    "mlp": (MLP(4, 3, [8]), torch.rand(8, 4)),
    "recurrent": (RecurrentClassifier(3, 3, hidden=6, layers=2), ragged([4, 1, 7, 2, 2, 9, 3, 5])),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("low", [False, True])
def test_every_parameter_gets_a_finite_gradient(name: str, low: bool) -> None:
    model, inputs = MODELS[name]
    model.zero_grad()
    with Precision("bfloat16" if low else "float32").autocast():
        logits = model(inputs)
    nn.functional.cross_entropy(logits.float(), torch.arange(8) % 3).backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert torch.isfinite(parameter.grad).all(), path
        assert parameter.grad.abs().sum() > 0, path


def test_a_sequence_does_not_feel_its_neighbours() -> None:
    model = RecurrentClassifier(3, 4, layers=2).eval()
    sequences = ragged([5, 17, 1, 9])
    together = model(sequences)
    for place, sequence in enumerate(sequences):
        torch.testing.assert_close(model([sequence])[0], together[place], rtol=1e-5, atol=1e-6)
    turned = model(sequences[::-1])
    torch.testing.assert_close(turned.flip(0), together, rtol=1e-5, atol=1e-6)


def test_the_mean_goes_over_the_real_length() -> None:
    model = RecurrentClassifier(3, 2).eval()
    sequences = ragged([6, 2])
    expected = torch.stack([model.recurrent(sequence)[0].mean(0) for sequence in sequences])
    torch.testing.assert_close(model(sequences), model.classifier(expected), rtol=1e-5, atol=1e-6)


def test_sequences_of_one_length_may_come_as_one_tensor() -> None:
    model = RecurrentClassifier(3, 2).eval()
    sequences = ragged([4, 4, 4])
    assert torch.equal(model(torch.stack(sequences)), model(sequences))


def test_nan_in_one_sequence_stays_there() -> None:
    model = RecurrentClassifier(3, 2).eval()
    sequences = ragged([4, 7])
    sequences[1][2, 0] = float("nan")
    finite = torch.isfinite(model(sequences)).all(1)
    assert finite.tolist() == [True, False]


def test_an_empty_sequence_gets_a_message() -> None:
    with pytest.raises(ConfigurationError, match="place 1 of the batch has no time step"):
        RecurrentClassifier(3, 2)([torch.zeros(2, 3), torch.zeros(0, 3)])
