"""Weights, first outputs, gradients: each planted fault is found, and healthy models give nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stabletrain.doctor.before.examine import examine_run
from stabletrain.doctor.before.findings import Report
from stabletrain.doctor.before.model import examine_parameters
from stabletrain.model import MLP, ConvNet, RecurrentClassifier
from stabletrain.precision import Precision

from .subjects import by_check, network, state, subject, table


def examined(model, train=None, *, keep=("model", "numbers"), **options):
    """Return the findings about model and numbers by check; the run's parts must stay as they are."""
    one = subject(train, model=model, **options)
    before = state(model)
    random = torch.random.get_rng_state()
    report = Report(subject="test")
    examine_run(one, report, progress=False)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(
        torch.equal(tensor.nan_to_num(7.0), before[name].nan_to_num(7.0)) for name, tensor in state(model).items()
    )
    assert all(parameter.grad is None for parameter in model.parameters())
    assert one.run.optimizer.state == {}
    return by_check([one for one in report.findings if one.where in keep and one.check != "edge"]), report


class Deep(nn.Sequential):
    """Many equal layers with an activation between them."""

    def __init__(self, activation: type[nn.Module], layers: int, gain: float | None = None) -> None:
        torch.manual_seed(0)
        linear = [nn.Linear(32, 32) for _ in range(layers)]
        for layer in linear if gain is not None else []:
            nn.init.normal_(layer.weight, std=gain / math.sqrt(32))
        inner = [part for layer in linear for part in (layer, activation())]
        super().__init__(nn.Linear(4, 32), activation(), *inner, nn.Linear(32, 2))


class OwnMask(nn.Module):
    """Holds a causal mask of -Inf, as many transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()
        self.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))

    def forward(self, inputs):
        return self.body(inputs)


class ZeroBranch(nn.Module):
    """A residual branch that starts at 0: its inner weights have no gradient before the first update."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer, self.head = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 2)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, inputs):
        return self.head(inputs + self.outer(self.inner(inputs).tanh()))


@pytest.mark.parametrize(
    "model",
    [
        network,
        lambda: MLP(4, 2),
        lambda: MLP(4, 2, hidden=[], batch_norm=False),
        lambda: MLP(4, 2, hidden=[32] * 6, batch_norm=False, dropout=0.0),
        lambda: Deep(nn.Tanh, 4),
        lambda: Deep(nn.ReLU, 8, gain=1.41),
        lambda: nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 2)),
        lambda: nn.Sequential(nn.Unflatten(1, (4, 1)), nn.Flatten(), nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 2)),
        OwnMask,
        ZeroBranch,
    ],
)
def test_healthy_models_give_nothing(model):
    torch.manual_seed(0)
    assert examined(model())[0] == {}


def test_shipped_models_of_other_data_give_nothing_about_their_weights():
    for model in (ConvNet(1, 10, (8, 8)), RecurrentClassifier(4, 3, layers=3), nn.TransformerDecoderLayer(16, 2, 16)):
        assert examine_parameters(model) == []
    assert examine_parameters(nn.Embedding(100, 16)) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_parameters_that_are_not_finite(value):
    model = network()
    model[2].weight.data[1, 5] = value
    found, report = examined(model)
    assert set(found) == {"parameters"}
    assert found["parameters"].severity == "broken"
    assert "2.weight" in found["parameters"].evidence
    assert "1 NaN of 32" in found["parameters"].evidence or "1 Inf of 32" in found["parameters"].evidence
    assert "numbers" in report.facts["left_out"]


def test_a_running_variance_of_inf():
    model = MLP(4, 2)
    model.layers[2].running_var[3] = math.inf
    assert "layers.2.running_var" in by_check(examine_parameters(model))["parameters"].evidence


@pytest.mark.parametrize(
    ("values", "check", "said"),
    [
        (lambda weight: weight.fill_(0.3), "uninitialised", "one value everywhere"),
        (lambda weight: weight.mul_(1e30), "uninitialised", "reach"),
        (lambda weight: weight[0].fill_(1e-40), "uninitialised", "subnormal"),
        (lambda weight: weight.normal_(std=30.0), "scale", "scaled too high"),
        (lambda weight: weight.mul_(1e-5), "scale", "scaled too low"),
    ],
)
def test_weights_that_nobody_would_draw(values, check, said):
    model = network()
    with torch.no_grad():
        values(model[0].weight)
    [found] = examine_parameters(model)
    assert found.check == check
    assert "0.weight" in found.what
    assert said in f"{found.what} {found.evidence}"


def test_the_first_loss_is_compared_with_that_of_equal_probabilities():
    found, report = examined(network())
    assert found == {}
    assert report.facts["start"]["expected_loss"] == pytest.approx(math.log(2), rel=1e-5)
    model = network()
    nn.init.normal_(model[2].weight, std=1.2)
    model[2].bias.data = torch.tensor([9.0, -9.0])
    found, _ = examined(model)
    assert set(found) == {"first_loss"}
    assert "ln 2 = 0.6931" in found["first_loss"].evidence


class SeesLabel(nn.Module):
    """The first column tells the class, and the model passes it on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(20.0))

    def forward(self, inputs):
        return torch.stack([-inputs[:, 0], inputs[:, 0]], 1) * self.weight


def test_a_first_loss_that_is_too_low():
    found, _ = examined(SeesLabel())
    assert set(found) == {"first_loss"}
    assert "too low" in found["first_loss"].what


def test_an_output_that_does_not_depend_on_the_input():
    model = network()
    nn.init.zeros_(model[2].weight)
    model[0].bias.data -= 100.0  # every unit is off
    found, _ = examined(model)
    assert "constant_output" in found
    assert "dead" in found


def test_dead_rectifiers():
    model = network()
    model[0].bias.data -= 100.0
    found, _ = examined(model)
    assert set(found) == {"dead", "constant_output"}
    assert "0.weight" in found["dead"].evidence
    assert "100% of the units of 1" in found["dead"].evidence


class Detached(nn.Module):
    """Loses the graph on the way, and keeps a layer that nothing uses."""

    def __init__(self, cut: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.unused, self.cut = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(3, 3), cut

    def forward(self, inputs):
        hidden = self.body(inputs).tanh()
        return self.head(hidden.detach() if self.cut else hidden)


def test_parameters_without_a_gradient():
    found, _ = examined(Detached(cut=False))
    assert set(found) == {"no_gradient"}
    assert found["no_gradient"].evidence.startswith("unused.weight, unused.bias:")
    found, _ = examined(Detached(cut=True))
    assert found["no_gradient"].evidence.startswith("body.weight, body.bias, unused.weight, unused.bias:")


def test_vanishing_gradients():
    found, _ = examined(Deep(nn.Sigmoid, 14))
    assert set(found) == {"vanishing", "constant_output"}  # neither does anything come through forward
    assert "the gradient at 0 is" in found["vanishing"].evidence


def test_exploding_gradients():
    found, _ = examined(Deep(nn.Identity, 16, gain=4.0))
    assert "exploding" in found
    assert found["exploding"].remedy == "clipping=norm_tight"


class Overflows(nn.Module):
    """A product that is too large for float16 alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(4, 64), nn.Linear(64, 2)
        with torch.no_grad():
            self.head.weight.mul_(1e-6)

    def forward(self, inputs):
        return self.head(self.first(inputs) * 1e5) * 10


class Divides(nn.Module):
    """0/0 in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 2), nn.Identity()

    def forward(self, inputs):
        values = self.layer(inputs)
        return self.norm(values / (values - values))


class EndlessSlope(nn.Module):
    """A root of 0: its loss is finite, its gradient isn't."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, inputs):
        values = self.layer(inputs)
        return values + (values * 0).sqrt()


class Refuses(nn.Module):
    """A model that expects other inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(9, 2)

    def forward(self, inputs):
        return self.layer(inputs)


def test_a_loss_that_is_not_finite():
    found, report = examined(Divides())
    assert set(found) == {"loss"}
    assert found["loss"].severity == "broken"
    assert "the first module whose output isn't finite is norm" in found["loss"].evidence
    assert "left_out" in report.facts


def test_a_gradient_that_is_not_finite():
    found, _ = examined(EndlessSlope())
    assert set(found) == {"gradient"}
    assert "layer.weight, layer.bias" in found["gradient"].evidence


def test_a_model_that_does_not_fit_the_data():
    found, _ = examined(Refuses())
    assert set(found) == {"forward"}
    assert "RuntimeError" in found["forward"].evidence


def test_what_overflows_in_float16_is_cured_by_bfloat16():
    half = lambda device: Precision("float16", device=device)  # noqa: E731
    found, report = examined(Overflows(), precision=half)
    assert found["loss"].severity == "broken"
    assert found["loss"].remedy == "precision=bf16"
    assert report.code == 3


def test_the_headroom_of_each_module_is_measured_in_each_precision():
    model = network()
    _, report = examined(model)
    inputs = table().inputs
    headroom = report.facts["headroom"]
    assert set(headroom) == {"fp32", "bf16", "fp16"}
    assert set(headroom["fp16"]) == {"0", "1", "2"}
    largest = float(model[0](inputs).detach().abs().max())
    assert 65504 / largest * 0.99 <= headroom["fp16"]["0"] < 65504 / largest * 3
    assert headroom["fp32"]["0"] > 1e37


def test_little_headroom_is_a_warning():
    data = table()
    data.inputs.mul_(9e3)
    found, _ = examined(network(), data, precision=lambda device: Precision("float16", device=device))
    assert found["headroom"].remedy == "precision=bf16"
    assert "module 0 (Linear)" in found["headroom"].evidence
