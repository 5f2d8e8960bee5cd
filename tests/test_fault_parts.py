"""Faults in a part of a sample or of the forward pass: what changes, what stays, and runs that survive them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from composed import checked
from stabletrain.build import build
from stabletrain.data import Microbatch
from stabletrain.errors import ConfigurationError
from stabletrain.fault import EmptyInput, LargeOutput, NanPart, Surroundings
from stabletrain.trainer import train


def batch(inputs: Any, count: int = 3) -> Microbatch:
    return Microbatch((inputs, torch.arange(count)), torch.arange(count) + 10)


def ragged() -> list[torch.Tensor]:
    return [torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3)]


def around(model: nn.Module) -> Surroundings:
    return Surroundings(model=model, total_steps=200, batch_size=8)


def test_the_first_part_of_a_sample_is_nan() -> None:
    inputs = ragged()
    fault = NanPart(at=4, samples=2)
    assert fault.before_step(3, [batch(inputs)])[0].data[0] is inputs
    (shown,) = fault.before_step(4, [batch(inputs)])
    assert [item.isnan().all(1).tolist() for item in shown.data[0]] == [[True, False], [True, *[False] * 3], [False]]
    assert all(bool(item.isfinite().all()) for item in inputs)
    (later,) = fault.before_step(9, [batch(torch.ones(3, 2, 2))])
    assert later.data[0].isnan().flatten(1).sum(1).tolist() == [2, 2, 0]
    (numbers,) = fault.before_step(9, [batch(torch.ones(3))])
    assert numbers.data[0].isnan().tolist() == [True, True, False]


def test_a_sample_is_empty_and_keeps_its_width() -> None:
    inputs = ragged()
    fault = EmptyInput(at=0)
    (shown,) = fault.before_step(0, [batch({"bags": inputs, "age": torch.ones(3)})])
    assert [tuple(item.shape) for item in shown.data[0]["bags"]] == [(0, 3), (4, 3), (1, 3)]
    assert shown.data[0]["age"].tolist() == [1, 1, 1]
    assert len(inputs[0]) == 2
    assert fault.state_dict()["indices"] == [10]
    with pytest.raises(ConfigurationError, match=r"can't empty the inputs: they hold no list of floating tensors"):
        EmptyInput(at=0).before_step(0, [batch(torch.ones(3, 2))])


def test_an_output_is_larger_in_its_step_and_no_other() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU())
    inputs = torch.rand(5, 2)
    model.requires_grad_(False)
    fault = LargeOutput(at=2, times=2, factor=100.0)
    usual = model[:3](inputs)
    fault.check(around(model))
    factors = []
    for number in range(6):
        fault.before_step(number, [])
        largest = model[:3](inputs) / usual
        fault.after_update(number, model, None)
        torch.testing.assert_close(model[:3](inputs), usual)
        factors.append(round(float(largest.mean())))
    assert factors == [1, 1, 100, 100, 1, 1]
    fault.load_state_dict({**fault.state_dict(), "last": 1})
    fault.before_step(2, [])
    torch.testing.assert_close(model.eval()[:3](inputs), usual)
    torch.testing.assert_close(model.train()[:3](inputs), 100 * usual)
    fault.before_step(2, [])  # the step once more, as salvage takes it
    torch.testing.assert_close(model[:3](inputs), usual)
    fault.load_state_dict({**fault.state_dict(), "last": 1})
    fault.before_step(2, [])
    fault.close()
    torch.testing.assert_close(model[:3](inputs), usual)


def test_a_module_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"fault.module is '7'; the model's modules with parameters are 0, 2"):
        LargeOutput(at=0, module="7").check(around(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))))
    with pytest.raises(ConfigurationError, match=r"fault.module is None; .* are none"):
        LargeOutput(at=0).check(around(nn.ReLU()))


SMALL = ["experiment=bags", "data.bags=140", "epochs=3", "threads=1", "device=cpu", "tracking=none", "checkpoint=none"]


@pytest.mark.parametrize(
    ("given", "bad", "undone"),
    [
        (["fault=nan_part"], 1, True),
        (["fault=empty_input"], 0, False),
        (["fault=large_output", "fault.module=score", "precision=fp16", "fault.times=5"], 0, False),
        (["fault=large_output", "fault.module=score", "precision=fp16", "fault.times=5", "model.clamp=null"], 0, True),
    ],
)
def test_runs_on_bags_survive_what_their_authors_met(given: list[str], bad: int, undone: bool, tmp_path: Path) -> None:
    words = [*SMALL, "preset=stable", "fault.at=3", "guard.max_quarantined=1.0", *given]
    run = build(checked(*words), tmp_path / "run", words)
    summary = train(run)
    assert (summary.status, all(summary.finite.values())) == ("completed", True)
    assert len(summary.quarantined) == bad
    assert set(summary.quarantined) <= set(getattr(run.fault, "indices", []))
    assert (summary.rejected + summary.salvaged > 0) == undone, summary
    assert len(run.model.score._forward_hooks) == 0
