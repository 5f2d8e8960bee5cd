"""The range test: the largest stable rate within a factor of 2, against models where it is known."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from stabletrain.clipping import NoClipping
from stabletrain.data import ArrayDataset
from stabletrain.doctor.before.rate import examine_rate, find_range
from stabletrain.optimizer import adamw, sgd
from stabletrain.schedule import Constant
from stabletrain.task import Output

from .subjects import network, state, subject


class Squares:
    """Half the squared error, summed over features and averaged over samples."""

    def step(self, model, data):
        inputs, targets = data
        return Output(0.5 * (model(inputs) - targets).square().sum(), float(len(inputs)))

    def evaluate(self, model, loader, total=None):
        return {"loss": 0.0}


def quadratic(curvature: float, rate: float, momentum: float = 0.0, **options):
    """Return a run whose loss is `curvature` / 2 * distance^2: stable below 2 (1 + momentum) / curvature."""
    inputs = torch.full((64, 1), curvature**0.5)
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(3.0)
    data = ArrayDataset(inputs, torch.zeros(64, 1))
    return subject(
        data,
        model=model,
        validation=data,
        task=Squares(),
        optimizer=partial(sgd, lr=rate, momentum=momentum),
        clipping=NoClipping(),
        schedule=Constant,
        config=("optimizer=sgd", f"base_lr={rate}"),
        **options,
    )


@pytest.mark.parametrize("curvature", [0.5, 40.0, 3e3])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_the_largest_stable_rate_of_a_quadratic_loss(curvature, momentum):
    limit = 2 * (1 + momentum) / curvature
    found = find_range(quadratic(curvature, 1e-4, momentum))
    assert limit / 2 <= found.stable <= limit * 1.1
    assert limit / 1.1 <= found.unstable <= 2 * limit * 1.1
    assert found.unstable <= 2.01 * found.stable


def test_a_rate_above_it_is_told_with_one_that_holds():
    one = quadratic(40.0, 0.2)
    [finding], _ = examine_rate(one)
    assert (finding.check, finding.severity) == ("rate", "warning")
    assert finding.remedy == f"base_lr={float(finding.remedy.partition('=')[2]):g}"
    again, _ = examine_rate(quadratic(40.0, float(finding.remedy.partition("=")[2])))
    assert again == []
    [finding], _ = examine_rate(quadratic(40.0, 5.0))
    assert finding.severity == "broken"
    assert examine_rate(quadratic(40.0, 0.01))[0] == []


def test_a_rate_of_the_optimizers_own_is_changed_there():
    one = quadratic(40.0, 0.2)
    one.config = {**one.config, "base_lr": 1e-4, "optimizer": {**one.config["optimizer"], "lr": 0.2}}
    [finding], _ = examine_rate(one)
    assert finding.remedy.startswith("optimizer.lr=")


def test_nothing_of_the_run_changes():
    model = network()
    one = subject(model=model, optimizer=partial(adamw, lr=1e-3))
    before, random = state(model), torch.random.get_rng_state()
    found = find_range(one)
    assert found.stable > 1e-2
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())
    assert one.run.optimizer.state == {}
    assert one.run.optimizer.param_groups[0]["lr"] == 1e-3
    again = find_range(one)
    assert again.trials == found.trials


def test_bad_samples_are_left_out():
    data = quadratic(40.0, 1e-4).run.loader.dataset
    data.inputs[5] = float("nan")
    one = quadratic(40.0, 1e-4)
    one.run.loader.dataset.inputs[5] = float("nan")
    assert find_range(one).stable is None
    one.bad_samples = [5]
    assert 0.025 <= find_range(one).stable <= 0.055


def test_a_model_that_no_rate_suits_says_why_nothing_was_measured():
    one = quadratic(40.0, 1e-4)
    one.run.model.weight.data.fill_(float("nan"))
    findings, found = examine_rate(one)
    assert findings == []
    assert "the untrained model's loss is nan" in found.said


def test_when_the_time_is_over_what_is_known_is_returned():
    found = find_range(quadratic(40.0, 1e-4), seconds=0.0)
    assert len(found.trials) == 1
    assert "the time was over" in found.said
