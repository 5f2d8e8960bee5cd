"""Initial weights: each rule against its formula, every parameter written, and the seed that decides them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from composed import checked
from stabletrain.build import build, build_model
from stabletrain.errors import ConfigurationError
from stabletrain.initialisation import ByType, Default, Orthogonal, ScaledResidual, TruncatedNormal, Xavier
from stabletrain.model import MLP, ConvNet, RecurrentClassifier, Transformer
from stabletrain.randomness import key, keyed

RULES: dict[str, Callable[..., ByType]] = {
    "truncated_normal": TruncatedNormal,
    "xavier": Xavier,
    "orthogonal": Orthogonal,
    "scaled_residual": lambda **options: ScaledResidual(residual=["*"], **options),
}


class Everything(nn.Module):
    """A module of each type that has a rule of its own, with every parameter that it may have."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            [
                nn.Linear(5, 7),
                nn.Bilinear(3, 4, 5),
                nn.Conv1d(4, 6, 3, groups=2),
                nn.Conv2d(3, 4, 3),
                nn.Conv3d(2, 3, 2),
                nn.ConvTranspose2d(3, 4, 3),
                nn.Embedding(9, 5, padding_idx=2),
                nn.EmbeddingBag(9, 5, padding_idx=-1),
                nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2),
                nn.GRU(3, 4),
                nn.RNN(3, 4, nonlinearity="relu"),
                nn.LSTMCell(3, 4),
                nn.GRUCell(3, 4),
                nn.RNNCell(3, 4),
                nn.MultiheadAttention(8, 2, add_bias_kv=True),
                nn.MultiheadAttention(8, 2, kdim=4, vdim=6),
                nn.TransformerDecoderLayer(8, 2, 16),
                nn.BatchNorm2d(4),
                nn.InstanceNorm1d(4, affine=True),
                nn.LayerNorm(4),
                nn.GroupNorm(2, 4),
                nn.RMSNorm(4),
                nn.PReLU(3),
            ]
        )


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_parameter_of_every_known_module_is_written(name: str, dtype: torch.dtype) -> None:
    results = []
    for fill in (math.nan, 1e30):  # whatever was there has no influence
        model = Everything().to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(fill)
        with keyed(key(1)):
            RULES[name]()(model)
        results.append([parameter.detach() for parameter in model.parameters()])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
        assert float(one.abs().max()) < 10
        assert one.dtype == dtype


def test_types_have_their_rules() -> None:
    model = Everything()
    with keyed(key(2)):
        Xavier(forget_bias=0.5)(model)
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
            assert bool((parameter == (0.0 if name.endswith("bias") else 1.0)).all()), name
        elif isinstance(module, (nn.LSTM, nn.LSTMCell)) and "bias_ih" in name:
            assert parameter.reshape(4, -1).tolist() == [[0.0] * 4, [0.5] * 4, [0.0] * 4, [0.0] * 4], name
        elif "bias" in name.rpartition(".")[2] and "bias_" not in name.replace("bias_ih", "").replace("bias_hh", ""):
            assert int(parameter.count_nonzero()) == 0, name
        elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            empty = [row for row in range(9) if int(parameter[row].count_nonzero()) == 0]
            assert empty == [module.padding_idx], name
        else:
            assert int(parameter.count_nonzero()) == parameter.numel(), name


def test_a_truncated_normal_is_cut_where_it_should_be() -> None:
    for std, cut in ((0.02, 3.0), (0.01, 2.0), (0.5, 1.0)):
        weight = torch.empty(1000, 400)
        with keyed(key(3)):
            TruncatedNormal(std, cut).matrix(weight)
        # Of a standard normal within (-c, c): variance 1 - 2 c pdf(c) / (1 - 2 cdf(-c)).
        density = math.exp(-(cut**2) / 2) / math.sqrt(2 * math.pi)
        inside = math.erf(cut / math.sqrt(2))
        expected = std * math.sqrt(1 - 2 * cut * density / inside)
        assert float(weight.std()) == pytest.approx(expected, rel=0.01)
        assert float(weight.abs().max()) == pytest.approx(cut * std, rel=0.02)
        assert float(weight.abs().max()) <= cut * std
        assert float(weight.mean()) == pytest.approx(0.0, abs=0.01 * std)


def test_xavier_has_glorots_bound() -> None:
    layers = (nn.Linear(30, 50), nn.Conv2d(3, 16, 5), nn.ConvTranspose2d(16, 3, 5))
    for layer, fans in zip(layers, (30 + 50, (3 + 16) * 25, (3 + 16) * 25), strict=True):
        with keyed(key(4)):
            Xavier(gain=2.0)(layer)
        bound = 2.0 * math.sqrt(6 / fans)
        assert float(layer.weight.detach().abs().max()) == pytest.approx(bound, rel=0.02)
        assert float(layer.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_parts_that_stand_above_each_other_are_matrices_of_their_own() -> None:
    lstm, attention = nn.LSTM(40, 50), nn.MultiheadAttention(48, 2)
    with keyed(key(5)):
        Xavier()(lstm)
        Xavier()(attention)
    for gate in lstm.weight_ih_l0.detach().chunk(4):
        assert float(gate.abs().max()) == pytest.approx(math.sqrt(6 / 90), rel=0.02)
    for part in attention.in_proj_weight.detach().chunk(3):
        assert float(part.abs().max()) == pytest.approx(math.sqrt(6 / 96), rel=0.02)
    for kind, gates in ((nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)):
        layer = kind(3, 5, num_layers=2)
        with keyed(key(6)):
            Orthogonal(gain=3.0)(layer)
        for name in ("weight_hh_l0", "weight_hh_l1"):
            for gate in getattr(layer, name).detach().chunk(gates):
                torch.testing.assert_close(gate @ gate.T, torch.eye(5), rtol=0, atol=1e-5)  # without the gain
    linear, conv = nn.Linear(4, 6), nn.Conv2d(3, 4, 2)
    with keyed(key(7)):
        Orthogonal(gain=3.0)(linear)
        Orthogonal(gain=3.0)(conv)
    weight, kernel = linear.weight.detach(), conv.weight.detach().flatten(1)
    torch.testing.assert_close(weight.T @ weight, 9 * torch.eye(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(kernel @ kernel.T, 9 * torch.eye(4), rtol=0, atol=1e-4)


def test_what_writes_to_the_residual_stream_is_scaled_by_the_depth() -> None:
    ours = Transformer(11, width=64, layers=8, heads=2)
    layer = nn.TransformerEncoderLayer(64, 2, 256)
    theirs = nn.TransformerEncoder(layer, 8, enable_nested_tensor=False)
    for model in (ours, theirs):
        plain = copy.deepcopy(model)
        with keyed(key(8)):
            ScaledResidual(0.1)(model)
        with keyed(key(8)):
            TruncatedNormal(0.1)(plain)
        scaled = 0
        for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
            last = any(
                word in name for word in ("attention.output", "feedforward.output", "out_proj.weight", "linear2.weight")
            )
            torch.testing.assert_close(one, other / 4 if last else other)  # sqrt(2 * 8)
            scaled += last
        assert scaled == 16
    ScaledResidual(0.1, depth=2)(ours)
    assert float(ours.blocks[0].feedforward.output.weight.detach().std()) == pytest.approx(0.1 * 0.987 / 2, rel=0.02)


@pytest.mark.parametrize(
    "model",
    [MLP(4, 3), ConvNet(1, 3, (8, 8)), RecurrentClassifier(3, 2), Transformer(7, qk_norm=True, head_norm=True)],
    ids=["mlp", "convnet", "recurrent", "transformer"],
)
def test_our_models_have_a_rule_for_each_parameter(model: nn.Module) -> None:
    for rule in (TruncatedNormal(), Xavier(), Orthogonal()):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(math.nan)
        rule(model)
        assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()), rule


class Scaled(nn.Module):
    """A layer with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.temperature = nn.Parameter(torch.tensor(3.0))


def test_a_parameter_that_no_rule_knows_is_named_or_kept() -> None:
    model = Scaled()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigurationError) as error:
        Xavier()(model)
    assert all(word in str(error.value) for word in ("temperature", "Xavier", "initialisation.others=keep"))
    assert "layer" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # nothing is half done
    Xavier(others="keep")(model)
    assert model.temperature.item() == 3.0
    assert not torch.equal(model.layer.weight, before["layer.weight"])


def test_shared_weights_are_written_once_and_stay_shared() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    TruncatedNormal(0.02)(model)
    assert model[1].weight is model[0].weight
    assert int(model[0].weight[0].count_nonzero()) == 0


def test_a_rule_that_leaves_something_out_is_caught() -> None:
    class Lazy(TruncatedNormal):
        def matrix(self, weight: torch.Tensor) -> None:
            super().matrix(weight[:-1])

    with pytest.raises(ConfigurationError, match=r"1\.weight"):
        Lazy()(nn.Sequential(nn.ReLU(), nn.Linear(3, 4)))
    with pytest.raises(ConfigurationError, match="weight has no shape yet"):
        Xavier()(nn.LazyLinear(3))


def test_the_default_writes_nothing() -> None:
    model = Scaled()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Default()(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("build_rule", "words"),
    [
        (lambda: TruncatedNormal(0.0), ["std", "0.0", "above 0"]),
        (lambda: TruncatedNormal(math.nan), ["std", "nan"]),
        (lambda: TruncatedNormal(0.02, -1), ["cut", "-1"]),
        (lambda: Xavier(gain=True), ["gain", "True"]),
        (lambda: Xavier(forget_bias=math.inf), ["forget_bias", "inf"]),
        (lambda: Xavier(others="skip"), ["others", "skip", "error, keep"]),
        (lambda: ScaledResidual(depth=0), ["depth", "0"]),
        (lambda: ScaledResidual()(MLP(2, 2)), ["attention.output", "initialisation.residual", "layers.1.weight"]),
    ],
)
def test_bad_arguments_get_one_message(build_rule: Callable[[], Any], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as error:
        build_rule()
    assert all(word in str(error.value) for word in words), error.value


SMALL = ("experiment=tabular", "epochs=1", "batch_size=128", "tracking=none", "checkpoint=none", "device=cpu")


def test_the_seed_decides_the_weights_and_given_ones_win(tmp_path: Any) -> None:
    def weights(*given: str) -> dict[str, torch.Tensor]:
        return build(
            checked(*SMALL, "initialisation=orthogonal", *given), tmp_path / str(len(list(tmp_path.iterdir())))
        ).model.state_dict()

    first, again, other = weights(), weights(), weights("seed=1")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["layers.1.weight"], other["layers.1.weight"])
    weight = first["layers.1.weight"]
    columns = weight.T @ weight
    torch.testing.assert_close(columns, torch.eye(len(columns)), rtol=0, atol=1e-5)
    from safetensors.torch import save_file

    save_file(other, str(tmp_path / "given.safetensors"))
    taken = weights(f"init_from={tmp_path / 'given.safetensors'}")
    assert all(torch.equal(taken[name], value) for name, value in other.items())


def test_a_config_from_before_the_group_still_builds_its_model() -> None:
    config = {name: value for name, value in checked(*SMALL).items() if name != "initialisation"}
    config["model"] |= {"in_features": 3, "num_classes": 2}
    assert isinstance(build_model(config), MLP)
