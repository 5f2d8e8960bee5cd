"""What the guard looks at: losses, gradients, learning rates, optimizer state, buffers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stabletrain.errors import ConfigurationError
from stabletrain.guard import measure

INF, NAN = math.inf, math.nan


def test_mean_loss_is_the_mean_and_keeps_float64() -> None:
    losses = [torch.tensor(1.0, dtype=torch.float16), torch.tensor([2.0]), torch.tensor([[6.0]], requires_grad=True)]
    mean = measure.mean_loss(losses)
    assert mean.dtype == torch.float32 and mean.item() == 3.0 and not mean.requires_grad and mean.shape == ()
    assert measure.mean_loss(torch.tensor(1e300, dtype=torch.float64)).item() == 1e300


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_mean_loss_shows_the_one_bad_microbatch(bad: float) -> None:
    mean = measure.mean_loss([torch.tensor(1.0), torch.tensor(bad), torch.tensor(1.0)])
    assert not math.isfinite(mean.item())


@pytest.mark.parametrize("losses", [[], torch.ones(2), [torch.ones(()), torch.ones(3)]])
def test_a_loss_of_another_shape_is_refused(losses: list[torch.Tensor] | torch.Tensor) -> None:
    with pytest.raises(ConfigurationError, match="one or more of one element"):
        measure.mean_loss(losses)


def test_shared_parameters_count_once_and_missing_gradients_not_at_all() -> None:
    shared, alone = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    shared.grad = torch.ones(2)
    optimizers = [torch.optim.SGD([shared, alone], lr=0.1), torch.optim.SGD([shared], lr=0.1)]
    assert [id(gradient) for gradient in measure.gradients(optimizers)] == [id(shared.grad)]


@pytest.mark.parametrize(
    ("rate", "bad"),
    [(0.1, False), (0.0, False), (NAN, True), (INF, True), (-0.1, True), (torch.tensor(0.1), False),
     (torch.tensor(NAN), True)],
)  # fmt: skip
def test_learning_rates(rate: float | torch.Tensor, bad: bool) -> None:
    good = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    judged = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))]}, {"params": [nn.Parameter(torch.ones(1))]}])
    judged.param_groups[1]["lr"] = rate
    assert (measure.bad_learning_rate([good, judged]) is not None) == bad


def test_a_rate_on_a_device_is_not_waited_for() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    optimizer.param_groups[0]["lr"] = torch.tensor(NAN, device="meta")  # reading it would fail
    assert measure.bad_learning_rate([optimizer]) is None


def test_state_is_finite_sees_parameters_and_state() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight])
    weight.grad = torch.ones(2)
    optimizer.step()
    assert bool(measure.state_is_finite([optimizer]))
    optimizer.state[weight]["exp_avg_sq"][1] = INF
    assert not bool(measure.state_is_finite([optimizer]))
    optimizer.state[weight]["exp_avg_sq"][1] = 0.0
    with torch.no_grad():
        weight[0] = NAN
    assert not bool(measure.state_is_finite([optimizer]))


@pytest.mark.parametrize(
    ("before", "now", "bad"),
    [(1.0, NAN, True), (1.0, INF, True), (INF, INF, False), (NAN, NAN, False), (INF, 1.0, False), (INF, NAN, True),
     (1.0, 999.0, False), (1.0, 1001.0, True), (0.0, 1.0, True), (0.0, 0.009, False)],
)  # fmt: skip
def test_buffer_judge(before: float, now: float, bad: bool) -> None:
    judge = measure.BufferJudge(1000.0)
    judge.seen_data = True
    assert judge.bad(["running_var"], torch.tensor([now]), torch.tensor([before])).tolist() == [bad]


def test_only_running_variances_that_saw_data_may_not_grow() -> None:
    judge = measure.BufferJudge(1000.0)
    now, before = torch.tensor([1e9, 1e9]), torch.tensor([1.0, 1.0])
    names = ["running_var", "cache"]
    assert judge.bad(names, now, before).tolist() == [False, False]
    judge.seen_data = True
    assert judge.bad(names, now, before).tolist() == [True, False]


def test_have_seen_data_reads_the_counters() -> None:
    layers = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert not measure.have_seen_data([layers])
    layers(torch.randn(4, 2))
    assert measure.have_seen_data([nn.Linear(1, 1), layers])
