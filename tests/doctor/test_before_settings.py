"""Settings that are known for trouble: each one alone is found, with an override that exists."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from composed import checked
from stabletrain.doctor.before.settings import examine_settings
from stabletrain.doctor.before.subject import Subject
from stabletrain.doctor.built import built
from stabletrain.precision import Precision

from .subjects import by_check, network, subject


def examined(*overrides):
    config = checked("device=cpu", *overrides)
    with built(config) as run:
        return by_check(examine_settings(Subject(run, config)))


@pytest.mark.parametrize("experiment", ["digits", "tabular", "sequences"])
@pytest.mark.parametrize("preset", ["normal", "stable", "safe"])
def test_shipped_settings_give_nothing(experiment, preset):
    assert examined(f"experiment={experiment}", f"preset={preset}") == {}


@pytest.mark.parametrize(
    ("overrides", "check", "severity", "remedy"),
    [
        (("loss=focal", "loss.gamma=0.5"), "focal_gamma", "warning", "loss.gamma=1.0"),
        (("optimizer.eps=0.0",), "eps", "warning", "optimizer.eps=1e-8"),
        (("schedule=constant",), "warm_up", "warning", "schedule.warmup_epochs=3"),
        (("warmup_epochs=0",), "warm_up", "warning", "warmup_epochs=3"),
        (("warmup_from=1.0",), "warm_up", "warning", "warmup_from=0.1"),
        (("batch_size=4",), "batch_norm", "warning", "batch_size=8"),
        (("accumulate=4",), "batch_norm", "warning", "accumulate=1"),
        (("accumulate=2",), "batch_norm", "note", "accumulate=1"),
        (("optimizer.lr=1.0", "optimizer.weight_decay=1.0"), "weight_decay", "broken", "optimizer.weight_decay=0.01"),
        (("base_lr=0",), "rate", "warning", "base_lr=1e-4"),
    ],
)
def test_one_setting(overrides, check, severity, remedy):
    found = examined("experiment=tabular", *overrides)
    assert set(found) == {check}
    assert (found[check].severity, found[check].remedy) == (severity, remedy)
    if remedy != "base_lr=1e-4":
        key = remedy.partition("=")[0]
        kept = [word for word in overrides if word.partition("=")[0] != key]
        assert check not in examined("experiment=tabular", *kept, remedy)  # it cures what it is for


def test_a_mild_focal_loss_and_small_batches_without_batch_norm_are_fine():
    assert examined("experiment=tabular", "loss=focal", "loss.gamma=1.0") == {}
    assert examined("experiment=tabular", "model.batch_norm=false", "batch_size=4", "accumulate=2") == {}


class Tempered(nn.Module):
    """Divides its logits by a temperature."""

    def __init__(self, temperature: float, scale: float = 1.0) -> None:
        super().__init__()
        self.body, self.temperature = network(), temperature
        self.logit_scale = nn.Parameter(torch.tensor(scale))

    def forward(self, inputs):
        return self.body(inputs) / self.temperature * self.logit_scale.exp()


@pytest.mark.parametrize(("value", "severity"), [(0.0, "broken"), (-1.0, "broken"), (0.001, "warning"), (0.07, None)])
def test_temperatures(value, severity):
    found = by_check(examine_settings(subject(model=Tempered(value))))
    assert set(found) == ({"temperature"} if severity else set()) | set(found) - {"temperature"}
    assert found["temperature"].severity == severity if severity else "temperature" not in found


def test_a_logit_scale_beyond_that_of_clip():
    assert "temperature" not in by_check(examine_settings(subject(model=Tempered(1.0, math.log(100)))))
    assert (
        "model.logit_scale is 5"
        in by_check(examine_settings(subject(model=Tempered(1.0, 5.0))))["temperature"].evidence
    )


class OwnNorm(nn.Module):
    """A normalisation of somebody's own."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.body, self.eps = network(), eps

    def forward(self, inputs):
        return self.body((inputs - inputs.mean(1, keepdim=True)) / (inputs.std(1, keepdim=True) + self.eps))


@pytest.mark.parametrize(
    ("eps", "dtype", "there"),
    [
        (1e-8, "float16", True),
        (1e-8, "bfloat16", False),
        (1e-8, "float32", False),
        (0.0, "float32", True),
        (1e-4, "float16", False),
    ],
)
def test_an_eps_too_small_for_the_precision(eps, dtype, there):
    one = subject(model=OwnNorm(eps), precision=lambda device: Precision(dtype, device=device))
    assert ("eps" in by_check(examine_settings(one))) == there


def test_torchs_own_norms_compute_in_float32():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8, eps=1e-8), nn.Linear(8, 2))
    half = subject(model=model, precision=lambda device: Precision("float16", device=device))
    assert "eps" not in by_check(examine_settings(half))


def test_an_optimizer_eps_that_is_0_in_half_precision():
    found = by_check(
        examine_settings(subject(model=network().half(), precision=lambda device: Precision("float16", device=device)))
    )
    assert found["eps"].severity == "broken"
    assert found["eps"].remedy == "optimizer.eps=1e-4"
