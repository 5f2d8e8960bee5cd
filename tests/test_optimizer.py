"""Optimizers against their formulas in float64, and the arguments they refuse."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from stabletrain import ConfigurationError
from stabletrain.guard import StepGuard
from stabletrain.optimizer import (
    ModelParameters,
    adafactor,
    adam,
    adamw,
    adopt,
    copied,
    doubts,
    grouping,
    hyperparameters,
    lion,
    muon,
    regrouped,
    set_learning_rate,
    sgd,
    stable_adamw,
    with_changed,
)


def steps(make: Any, gradients: list[Tensor], **options: Any) -> Tensor:
    weight = Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64))
    optimizer = make([weight], no_decay=[], **options)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def gradients() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(5)]


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_and_adamw_follow_their_formula(decoupled: bool) -> None:
    lr, first, second, eps, decay = 0.1, 0.9, 0.999, 1e-8, 0.05
    weight = torch.linspace(-1, 1, 6, dtype=torch.float64)
    mean, square = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for step, gradient in enumerate(gradients(), start=1):
        if decoupled:
            weight = weight * (1 - lr * decay)
        else:
            gradient = gradient + decay * weight
        mean = first * mean + (1 - first) * gradient
        square = second * square + (1 - second) * gradient**2
        weight = weight - lr * (mean / (1 - first**step)) / ((square / (1 - second**step)).sqrt() + eps)
    found = steps(adamw if decoupled else adam, gradients(), lr=lr, weight_decay=decay)
    torch.testing.assert_close(found, weight, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_follows_its_formula(nesterov: bool) -> None:
    weight, velocity = torch.linspace(-1, 1, 6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for gradient in gradients():
        gradient = gradient + 0.05 * weight
        velocity = 0.9 * velocity + gradient
        weight = weight - 0.1 * (gradient + 0.9 * velocity if nesterov else velocity)
    found = steps(sgd, gradients(), lr=0.1, momentum=0.9, weight_decay=0.05, nesterov=nesterov)
    torch.testing.assert_close(found, weight, rtol=1e-10, atol=1e-12)


def test_stable_adamw_limits_the_update_when_its_average_lags_behind() -> None:
    quiet = [torch.full((6,), 1e-3, dtype=torch.float64)] * 20
    spike = [*quiet, torch.full((6,), 10.0, dtype=torch.float64)]

    def last_move(make: Any) -> float:
        before = steps(make, quiet, lr=0.1, weight_decay=0.0, betas=(0.9, 0.99))
        return float((steps(make, spike, lr=0.1, weight_decay=0.0, betas=(0.9, 0.99)) - before).abs().max())

    assert last_move(stable_adamw) < 0.5 * last_move(adamw)


def test_stable_adamw_follows_its_formula() -> None:
    lr, (first, second), eps, decay = 0.1, (0.9, 0.99), 1e-8, 0.05
    weight = torch.linspace(-1, 1, 6, dtype=torch.float64)
    mean, square = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    spiky = [gradient * (30.0 if number == 3 else 1.0) for number, gradient in enumerate(gradients())]
    for step, gradient in enumerate(spiky, start=1):
        b1, b2 = (b * (1 - b ** (step - 1)) / (1 - b**step) for b in (first, second))
        mean = b1 * mean + (1 - b1) * gradient
        square = b2 * square + (1 - b2) * gradient**2
        rate = lr / max(1.0, float((gradient**2 / square.clamp(min=eps**2)).mean().sqrt()))
        weight = weight * (1 - rate * decay) - rate * mean / (square.sqrt() + eps)
    found = steps(stable_adamw, spiky, lr=lr, weight_decay=decay)
    torch.testing.assert_close(found, weight, rtol=1e-10, atol=1e-12)


def test_lion_follows_its_formula() -> None:
    weight, mean = torch.linspace(-1, 1, 6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for gradient in gradients():
        weight = weight * (1 - 0.01 * 0.3) - 0.01 * torch.sign(0.9 * mean + 0.1 * gradient)
        mean = 0.99 * mean + 0.01 * gradient
    found = steps(lion, gradients(), lr=0.01, weight_decay=0.3)
    torch.testing.assert_close(found, weight, rtol=1e-10, atol=1e-12)


def test_adopt_follows_its_formula() -> None:
    lr, decay = 0.05, 0.1
    weight, mean = torch.linspace(-1, 1, 6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    given = [gradients()[0], *(gradient * 20.0 for gradient in gradients()[1:])]  # so that the limit matters
    square = given[0] ** 2
    weight = weight * (1 - lr * decay)
    for count, gradient in enumerate(given[1:], start=1):
        weight = weight * (1 - lr * decay)
        normed = (gradient / square.sqrt().clamp(min=1e-6)).clamp(-(count**0.25), count**0.25)
        mean = 0.9 * mean + 0.1 * normed
        weight = weight - lr * mean
        square = 0.9999 * square + 0.0001 * gradient**2
    found = steps(adopt, given, lr=lr, weight_decay=decay)
    torch.testing.assert_close(found, weight, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_adafactor_follows_its_formula(shape: tuple[int, ...]) -> None:
    lr, eps1, eps2, decay = 0.3, 1e-3, 1e-3, 0.05
    weight = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(shape)
    average: Any = 0.0
    rows: Any = 0.0
    columns: Any = 0.0
    for step, gradient in enumerate(gradients(), start=1):
        gradient, share = gradient.reshape(shape), step**-0.8
        rate = min(lr, step**-0.5) * max(eps2, float(weight.square().mean().sqrt()))
        weight = weight * (1 - lr * decay)
        if len(shape) == 2:
            rows = (1 - share) * rows + share * gradient.square().mean(1, keepdim=True)
            columns = (1 - share) * columns + share * gradient.square().mean(0, keepdim=True)
            estimate = rows @ columns / rows.mean()
        else:
            average = (1 - share) * average + share * gradient.square()
            estimate = average
        update = gradient / estimate.sqrt().clamp(min=eps1)
        weight = weight - rate * update / max(1.0, float(update.square().mean().sqrt()))
    parameter = Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(shape))
    optimizer = adafactor([parameter], lr=lr, eps=(eps1, eps2), weight_decay=decay, no_decay=[])
    for gradient in gradients():
        parameter.grad = gradient.reshape(shape).clone()
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), weight, rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------------------------------------------------- Muon


class Words(nn.Module):
    """Something of every kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 4)
        self.conv = nn.Conv1d(4, 4, 1)
        self.hidden = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.deep = nn.Linear(6, 4, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, words: Tensor) -> Tensor:
        mixed = self.conv(self.embedding(words).transpose(1, 2)).transpose(1, 2).mean(1)
        logits: Tensor = self.head(self.deep(self.norm(self.hidden(mixed)).relu()))
        return logits


def backward(model: nn.Module, number: int) -> Tensor:
    words = torch.randint(7, (5, 3), generator=torch.Generator().manual_seed(number))
    loss: Tensor = nn.functional.cross_entropy(model(words), words[:, 0] % 3)
    loss.backward()
    return loss


def test_muon_moves_hidden_matrices_and_adamw_the_rest() -> None:
    model, reference = Words(), Words()
    optimizer = muon(model, lr=0.01)
    hidden = ("hidden.weight", "deep.weight")
    no_decay = {name for name, p in reference.named_parameters() if p.ndim < 2} | {"embedding.weight"}
    rest = [
        {"params": [p], "weight_decay": 0.0 if name in no_decay else 0.1}
        for name, p in reference.named_parameters()
        if name not in hidden
    ]
    adamws = torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.95))
    matrices = [p for name, p in reference.named_parameters() if name in hidden]
    muons = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for number in range(3):
        before = model.deep.weight.detach().clone()
        for one in (model, reference):
            backward(one, number)
        for each in (optimizer, adamws, muons):
            each.step()
            each.zero_grad()
        for (name, got), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert torch.equal(got, expected), name
        # As large as AdamW's updates, whatever the gradient: the paper's point.
        update = (before * (1 - 0.01 * 0.1) - model.deep.weight.detach()) / (0.01 * 0.2 * math.sqrt(6))
        assert 0.5 < float(torch.linalg.svdvals(update)[0]) < 1.5


def test_muon_is_one_optimizer_that_saves_copies_and_goes_on() -> None:
    whole, first, second = Words(), Words(), Words()
    optimizers = [muon(model, lr=0.01) for model in (whole, first)]
    for number in range(6):
        for model, optimizer in zip((whole, first), optimizers, strict=True):
            if number == 3 and model is first:
                stored = io.BytesIO()
                torch.save([first.state_dict(), optimizer.state_dict()], stored)
                stored.seek(0)
                saved = torch.load(stored, weights_only=True)
                resumed = muon(second, lr=0.5)
                second.load_state_dict(saved[0])
                resumed.load_state_dict(saved[1])
                first, optimizers[1] = copy.deepcopy((second, resumed))  # as the doctor's trials do
                model, optimizer = first, optimizers[1]
            set_learning_rate(optimizer, 1.0 / (1 + number))
            backward(model, number)
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(whole.parameters(), first.parameters(), strict=True):
        assert torch.equal(one, other)


def test_muon_refuses_what_it_is_not_for() -> None:
    with pytest.raises(ConfigurationError, match=r"muon is for hidden matrices, and this model has none"):
        muon(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)), lr=0.1)
    with pytest.raises(ConfigurationError, match="adjust_lr is 'other'; allowed: match_rms_adamw, original"):
        muon(Words(), lr=0.1, adjust_lr="other")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="ns_steps is 0"):
        muon(Words(), lr=0.1, ns_steps=0)


# --------------------------------------------------------------------------------------- under the guard, all of them


EVERY: dict[str, Any] = {
    "adafactor": adafactor, "adam": adam, "adamw": adamw, "adopt": adopt, "lion": lion, "muon": muon, "sgd": sgd,
    "stable_adamw": stable_adamw,
}  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_a_rejected_step_leaves_no_trace_and_a_huge_one_does_no_harm(name: str) -> None:
    runs = []
    for _ in range(2):
        model = Words()
        optimizer = EVERY[name](ModelParameters(model), lr=1e-3)
        runs.append((model, optimizer, StepGuard(model, optimizer, max_norm=1.0)))
    for number in range(6):
        for place, (model, _, guard) in enumerate(runs):
            loss = backward(model, number)
            assert guard.step(loss).applied
            if place == 0 and number in (0, 3):  # also before the optimizer has any memory to speak of
                loss = backward(model, number + 50)
                next(iter(model.hidden.parameters())).grad[0, 0] = (math.nan, math.inf)[number == 3]  # type: ignore
                assert not guard.step(loss).applied
    (fed, fed_optimizer, guard), (clean, clean_optimizer, _) = runs
    twin, twin_optimizer = copied(clean, clean_optimizer)  # the doctor tries things on copies
    backward(twin, 9)
    twin_optimizer.step()
    for one, other in zip(fed.parameters(), clean.parameters(), strict=True):
        assert torch.equal(one, other)
    assert str(fed_optimizer.state_dict()) == str(clean_optimizer.state_dict())
    # Finite and huge: clipped, applied, and training goes on.
    loss = backward(fed, 7)
    for parameter in fed.parameters():
        parameter.grad *= 1e30  # type: ignore[operator]
    assert guard.step(loss).applied
    for number in range(10, 14):
        assert guard.step(backward(fed, number)).applied
    assert all(bool(torch.isfinite(parameter).all()) for parameter in fed.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", EVERY)
def test_parameters_of_half_precision_stay_finite(name: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
    eps = {"eps": 1e-4} if name in ("adam", "adamw", "adopt", "muon", "stable_adamw") else {}  # 1e-8 is 0 in float16
    optimizer = EVERY[name](model, lr=1e-3, **eps)
    assert not doubts(optimizer)
    for number in range(8):
        for parameter in model.parameters():
            generator = torch.Generator().manual_seed(number)
            gradient = torch.randn(parameter.shape, generator=generator) * (1e-3 if number else 0.0)
            gradient.flatten()[0] = 0.0
            parameter.grad = gradient.to(dtype)
        optimizer.step()
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


# ----------------------------------------------------------------------------------------------------------- groups


def shown(optimizer: Any, model: nn.Module) -> list[tuple[str, float, float]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [
        (names[parameter], group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]


@pytest.mark.parametrize("given", [ModelParameters, lambda model: model])
def test_norms_biases_and_embeddings_have_no_weight_decay(given: Any) -> None:
    model = Words()
    optimizer = adamw(given(model), lr=0.1, weight_decay=0.5)
    decayed = {name for name, _, decay in shown(optimizer, model) if decay == 0.5}
    assert decayed == {"conv.weight", "hidden.weight", "deep.weight", "head.weight"}
    assert {decay for _, _, decay in shown(optimizer, model)} == {0.5, 0.0}
    everything = adamw(given(model), lr=0.1, weight_decay=0.5, no_decay=[])
    assert [name for name, _, _ in shown(everything, model)] == [name for name, _ in model.named_parameters()]
    named = adamw(given(model), lr=0.1, weight_decay=0.5, no_decay=["hidden.*", "*.bias"])
    assert {name for name, _, decay in shown(named, model) if decay == 0.0} == {
        "hidden.weight", "hidden.bias", "conv.bias", "norm.bias", "head.bias",
    }  # fmt: skip
    # Without any decay there is nothing to tell apart.
    assert len(sgd(given(model), lr=0.1).param_groups) == 1


def test_bare_parameters_are_told_apart_by_their_dimensions() -> None:
    optimizer = adamw([Parameter(torch.zeros(2)), Parameter(torch.zeros(2, 2))], lr=0.1, weight_decay=0.5)
    assert sorted((p.ndim, g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]) == [
        (1, 0.0),
        (2, 0.5),
    ]
    with pytest.raises(ConfigurationError, match=r"optimizer.groups\[0\].match needs the parameters' names: give"):
        adamw([Parameter(torch.zeros(2))], lr=0.1, groups=[{"match": "*", "lr": 0.2}])


def test_groups_have_settings_of_their_own_by_name_pattern() -> None:
    model = Words()
    groups = [
        {"match": "head.bias", "weight_decay": 0.25},
        {"match": ["head.*", "deep.*"], "lr_factor": 10, "betas": [0.5, 0.9]},
    ]
    optimizer = adamw(model, lr=0.1, weight_decay=0.5, groups=groups)
    found = {name: (lr, decay) for name, lr, decay in shown(optimizer, model)}
    assert found["head.bias"] == (0.1, 0.25)
    assert found["head.weight"] == found["deep.weight"] == (1.0, 0.5)
    assert found["hidden.weight"] == (0.1, 0.5) and found["hidden.bias"] == (0.1, 0.0)
    assert {g["betas"] for g in optimizer.param_groups if g["lr"] == 1.0} == {(0.5, 0.9)}
    assert optimizer.param_groups[0]["lr"] == 0.1
    set_learning_rate(optimizer, 0.5)
    assert {name: lr for name, lr, _ in shown(optimizer, model)}["head.weight"] == 0.5
    both = muon(model, lr=0.1, groups=[{"match": "deep.*", "lr_factor": 2}, {"match": "head.*", "lr_factor": 3}])
    rates = {name: lr for name, lr, _ in shown(both, model)}
    assert (rates["hidden.weight"], rates["deep.weight"], rates["head.bias"]) == pytest.approx((0.1, 0.2, 0.3))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"no_decay": "norms"}, "optimizer.no_decay is 'norms'; it must be auto or a list"),
        ({"no_decay": ["norms.*"]}, r"optimizer.no_decay: 'norms.\*' matches no parameter.*norm.weight"),
        ({"groups": [{"match": "tail.*", "lr": 1.0}]}, r"groups\[0\].match: 'tail.\*' matches no parameter"),
        ({"groups": [{"lr": 1.0}]}, r"groups\[0\] is .*; it must be like"),
        ({"groups": [{"match": "head.*"}]}, r"groups\[0\] changes nothing"),
        ({"groups": [{"match": "head.*", "rate": 1.0}]}, r"groups\[0\].rate: this optimizer has no such setting"),
        ({"groups": [{"match": "head.*", "lr_factor": -1}]}, r"groups\[0\].lr_factor is -1"),
        ({"groups": [{"match": "head.*", "weight_decay": math.nan}]}, r"groups\[0\].weight_decay is nan"),
        ({"groups": [{"match": "head.*", "betas": [0.9, 2]}]}, r"groups\[0\].betas is \[0.9, 2\]"),
    ],
)
def test_groups_that_make_no_sense_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        adamw(Words(), lr=0.1, **options)


def test_a_saved_state_is_taken_over_into_other_groups() -> None:
    old, new = Words(), Words()
    before = adamw(old, lr=0.1, weight_decay=0.5, no_decay=[])
    now = adamw(new, lr=0.1, weight_decay=0.5, groups=[{"match": "head.*", "lr_factor": 2}])
    backward(old, 0)
    before.step()
    for names in (grouping(before, old), None):  # None: saved by a version that knew one group only
        state, settings = regrouped(before.state_dict(), hyperparameters(before), names, now, new)
        state, changed = with_changed(state, settings, hyperparameters(now))
        now.load_state_dict(state)
        assert changed == {"weight_decay": (0.5, 0.0), "lr": (0.1, 0.2)}
        for one, other in zip(old.parameters(), new.parameters(), strict=True):
            assert torch.equal(before.state[one]["exp_avg"], now.state[other]["exp_avg"])
        assert grouping(now, new) == grouping(adamw(new, lr=1.0, groups=[{"match": "head.*", "lr": 2.0}]), new)
    same = before.state_dict()
    assert regrouped(same, hyperparameters(before), grouping(before, old), before, old)[0] is same


def test_what_is_doubtful_is_said() -> None:
    half = Parameter(torch.zeros(2, 2, dtype=torch.float16))
    assert [doubt.kind for doubt in doubts(adamw([half], lr=2.0, weight_decay=0.5))] == ["eps", "weight_decay"]
    assert doubts(adamw([half], lr=0.1, eps=1e-4)) == []
    assert doubts(adamw([Parameter(torch.zeros(2, 2))], lr=0.1, eps=1e-8)) == []
    assert [d.kind for d in doubts(sgd([half], lr=0.0))] == ["rate"]
    optimizer = adamw([half], lr=2.0, eps=1e-4, weight_decay=0.5)
    set_learning_rate(optimizer, 0.01)  # the schedule's first factor hides nothing
    assert [doubt.kind for doubt in doubts(optimizer)] == ["weight_decay"]


def test_the_schedule_multiplies_the_base_rate() -> None:
    optimizer = adamw([Parameter(torch.zeros(2))], lr=0.5)
    assert set_learning_rate(optimizer, 0.1) == pytest.approx(0.05)
    assert set_learning_rate(optimizer, 0.5) == 0.25  # of the base rate, not of the last one


def test_parameters_that_are_frozen_are_left_out() -> None:
    frozen = Parameter(torch.zeros(2), requires_grad=False)
    assert len(adamw([frozen, Parameter(torch.zeros(3))], lr=0.1).param_groups[0]["params"]) == 1
    with pytest.raises(ConfigurationError, match="nothing to train"):
        adamw([frozen], lr=0.1)


@pytest.mark.parametrize("make", [adafactor, adam, adamw, adopt, lion, sgd, stable_adamw, muon])
@pytest.mark.parametrize("rate", [-1e-3, math.nan, math.inf])
def test_a_bad_learning_rate_is_refused(make: Any, rate: float) -> None:
    with pytest.raises(ConfigurationError, match=rf"optimizer.lr is {rate} .*must be a finite number of at least 0"):
        make([Parameter(torch.zeros(2))], lr=rate)


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (adamw, {"betas": (0.9, 1.0)}, r"optimizer.betas is \[0.9, 1.0\]"),
        (adamw, {"eps": -1.0}, "optimizer.eps is -1.0"),
        (adam, {"weight_decay": math.nan}, "optimizer.weight_decay is nan"),
        (sgd, {"momentum": -0.1}, "optimizer.momentum is -0.1"),
        (sgd, {"momentum": 0.0, "nesterov": True}, "optimizer.nesterov is true"),
    ],
)
def test_other_bad_numbers_are_refused(make: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        make([Parameter(torch.zeros(2))], lr=0.1, **options)
