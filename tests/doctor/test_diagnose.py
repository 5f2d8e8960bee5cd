"""`stabletrain.diagnose`: where a step went bad, in anybody's model, and nothing else is changed."""

from __future__ import annotations

import inspect
import json
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stabletrain
from stabletrain.errors import ConfigurationError

INPUTS, TARGETS = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)), torch.arange(8.0)[:, None]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))


def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def changed(tensor: Tensor, *places: tuple[int, int], value: float = math.nan) -> Tensor:
    tensor = tensor.clone()
    for place in places:
        tensor[place] = value
    return tensor


def line_of(function: Callable[..., Any], text: str) -> int:
    lines, first = inspect.getsourcelines(function)
    [found] = [number for number, line in enumerate(lines, first) if text in line]
    return found


def test_a_healthy_step_has_no_cause() -> None:
    found = stabletrain.diagnose(network(), squares, (INPUTS, TARGETS))
    assert found.cause is None and found.operation is None and list(found.samples) == []
    assert str(found).startswith("healthy")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_inputs_are_named(value: float) -> None:
    batch = (changed(INPUTS, (3, 1), (6, 0), value=value), TARGETS)
    found = stabletrain.diagnose(network(), squares, batch)
    assert (found.cause, found.confidence, list(found.samples)) == ("data", "high", [3, 6])
    assert found.operation is None and found.source == "batch 0"
    assert [remedy.held for remedy in found.remedies] == [True]


def test_bad_labels_are_told_from_bad_inputs() -> None:
    found = stabletrain.diagnose(network(), squares, (INPUTS, changed(TARGETS, (2, 0))))
    assert (found.cause, list(found.samples), found.source) == ("label", [2], "batch 1")


def test_the_line_of_a_backward_operation_is_that_of_its_forward() -> None:
    class Distance(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.inner(x)
            squared = (h - h.detach()).square().sum(1)
            return squared.sqrt()  # the root

    model = nn.Sequential(Distance())
    found = stabletrain.diagnose(model, lambda model, batch: model(batch).sum(), INPUTS)
    operation = found.operation
    assert operation is not None
    assert (operation.name, operation.in_backward, operation.module) == ("sqrt", True, "0")
    assert (operation.file, operation.line) == (__file__, line_of(Distance.forward, "# the root"))
    assert (found.cause, found.reached) == ("domain", "gradient of 0.inner.weight")
    assert any("safe.sqrt" in remedy.override and remedy.held for remedy in found.remedies)


def test_innocent_infinities_are_passed_over() -> None:
    def attention(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        scores = (model(batch[0]) @ batch[0].T).masked_fill(batch[1], -math.inf)
        weights = torch.softmax(scores, -1)  # here
        return (weights @ batch[0]).square().sum()

    mask = torch.ones(8, 8).triu(1).bool()
    model = nn.Linear(4, 4)
    assert stabletrain.diagnose(model, attention, (INPUTS, mask)).cause is None
    mask[5] = True
    found = stabletrain.diagnose(model, attention, (INPUTS, mask))
    assert found.cause == "masked_attention"
    assert found.operation is not None and found.operation.name == "softmax"
    assert found.operation.line == line_of(attention, "# here")


def test_a_bad_parameter_is_the_source() -> None:
    model = network()
    with torch.no_grad():
        model[4].weight[0, 3] = math.nan
    found = stabletrain.diagnose(model, squares, (INPUTS, TARGETS))
    assert (found.cause, found.source, list(found.samples)) == ("weights", "parameter 4.weight", [])
    assert bool(torch.isnan(model[4].weight[0, 3]))  # it is as it was
    assert [remedy.held for remedy in found.remedies] == [True]


def _random_gamma(model: nn.Module, batch: Tensor) -> Tensor:
    seen = batch * torch.rand(len(batch), 1)
    return model(seen / seen.abs().sum(1, keepdim=True)).mean()


def _share_of_positives(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    loss = F.binary_cross_entropy_with_logits(model(batch[0]).squeeze(1), batch[1], reduction="none")
    return (loss * batch[1]).sum() / batch[1].sum()


def _margin(model: nn.Module, batch: Tensor) -> Tensor:
    violation = model(batch).squeeze(1) - 1e3
    return violation[violation > 0].mean()


def _scaled_by_state(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) / model.scale).mean()


def _with_scale(buffer: bool) -> nn.Module:
    model = nn.Linear(4, 1)
    if buffer:
        model.register_buffer("scale", torch.zeros(1))
    else:
        model.scale = nn.Parameter(torch.zeros(1))
    return model


def _after_a_large_step() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e14)
    return model


@pytest.mark.parametrize(
    ("cause", "model", "loss", "batch"),
    [
        (
            "augmentation",
            nn.Linear(4, 1),
            _random_gamma,
            changed(INPUTS, *((2, column) for column in range(4)), value=0),
        ),
        ("domain", nn.Linear(4, 1), lambda model, batch: (model(batch) / (batch[0, 0] - batch[0, 0])).mean(), INPUTS),
        ("label", nn.Linear(4, 1), _share_of_positives, (INPUTS, torch.zeros(8))),
        ("loss_setting", nn.Linear(4, 1), _margin, INPUTS),
        ("weights", _with_scale(buffer=False), _scaled_by_state, INPUTS),
        ("initialization", _with_scale(buffer=True), _scaled_by_state, INPUTS),
        ("weights", _after_a_large_step(), lambda model, batch: model(batch).square().mean(), INPUTS),
    ],
    ids=["augmentation", "domain", "labels alone", "empty choice", "parameter", "buffer", "large step"],
)
def test_what_a_bad_value_is_made_of_decides_the_cause(
    cause: str, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any
) -> None:
    assert stabletrain.diagnose(model, loss, batch).cause == cause


def test_half_precision_that_overflows_is_cured_by_float32() -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return (model(batch) * 3e4 * 3e4).mean()

    found = stabletrain.diagnose(nn.Linear(4, 4), loss, INPUTS)
    assert found.cause == "overflow"
    [precision] = [remedy for remedy in found.remedies if remedy.group == "precision"]
    assert precision.held


def test_everything_is_left_as_it_was() -> None:
    model = network()
    squares(model, (INPUTS, TARGETS)).backward()
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    copies = [gradient.clone() for gradient in gradients]
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    stabletrain.diagnose(model, squares, (changed(INPUTS, (0, 0)), TARGETS))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is gradient for parameter, gradient in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(gradient, copy) for gradient, copy in zip(gradients, copies, strict=True))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    assert model.training and all(not module._forward_hooks for module in model.modules())


def test_bad_weights_are_put_back_where_a_try_fails() -> None:
    """The loss refuses the finite weights that the doctor tries, by an error that isn't torch's."""

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        if bool(torch.isfinite(model.weight).all()):
            raise KeyError("finite")
        return model(batch).sum()

    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight[1, 2] = math.nan
    before = model.weight.detach().clone()
    with pytest.raises(KeyError):
        stabletrain.diagnose(model, loss, INPUTS)
    assert torch.equal(model.weight.detach().isnan(), before.isnan())
    assert torch.equal(model.weight.detach().nan_to_num(), before.nan_to_num())


def test_a_label_that_torch_refuses_is_a_label() -> None:
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    found = stabletrain.diagnose(nn.Linear(4, 4), lambda m, b: F.cross_entropy(m(b[0]), b[1]), (INPUTS, labels))
    assert found.cause == "label"


def test_an_error_of_the_users_code_is_raised() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        stabletrain.diagnose(nn.Linear(3, 4), lambda m, b: m(b).sum(), INPUTS)


def test_a_loss_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="returned a tensor of shape"):
        stabletrain.diagnose(nn.Linear(4, 4), lambda m, b: m(b), INPUTS)


def test_the_content_is_json() -> None:
    found = stabletrain.diagnose(network(), squares, (changed(INPUTS, (1, 1)), TARGETS))
    content = json.loads(json.dumps(found.content(), allow_nan=False))
    assert {"reproduced", "cause", "confidence", "operation", "samples", "remedies"} <= content.keys()
    assert (content["cause"], content["samples"]) == ("data", [1])
