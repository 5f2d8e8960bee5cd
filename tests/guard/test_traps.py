"""Known traps of torch and of training loops, one test each: what torch does, and what the guard makes of it."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Muon, NAdam, Optimizer, RMSprop
from torch.optim.swa_utils import AveragedModel

from stabletrain.clipping import NoClipping
from stabletrain.errors import ConfigurationError, UnstableTraining
from stabletrain.guard import Policy, StepGuard, Verdict, on_device

NAN, INF = math.nan, math.inf


def network(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), *(middle or (nn.BatchNorm1d(8),)), nn.ReLU(), nn.Linear(8, 2))


def batch(position: int, factor: float = 1.0) -> Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(position)) * factor


def step(guard: StepGuard, model: nn.Module, inputs: Tensor) -> Verdict:
    loss = model(inputs).square().mean()
    (guard.scaler.scale(loss) if guard.scaler is not None else loss).backward()
    return guard.step(loss)


def spoil(model: nn.Module, value: float) -> None:
    """Set one gradient element, as a hook or a faulty kernel would."""
    parameter = next(model.parameters())
    assert parameter.grad is not None
    parameter.grad.view(-1)[0] = value


def everything(*holders: Any) -> list[Any]:
    return [copy.deepcopy(holder.state_dict()) for holder in holders]


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


# found_inf


@pytest.mark.parametrize(("found_inf", "skips"), [(1.0, True), (2.0, False), (0.5, False), (0.0, False)])
def test_torch_skips_only_at_a_found_inf_of_exactly_one(found_inf: float, skips: bool) -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer: Any = AdamW([weight], lr=0.1, fused=True)
    weight.grad = torch.ones(2)
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(found_inf)
    optimizer.step()
    assert torch.equal(weight, torch.ones(2)) == skips


@pytest.mark.parametrize("faults", [0, 1, 3])
def test_ours_is_exactly_one_however_many_faults_there_are(faults: int) -> None:
    model = network()
    optimizer: Any = AdamW(model.parameters(), lr=0.1, fused=True)
    given: list[float] = []
    optimizer.register_step_pre_hook(lambda skipping, *_: given.append(float(skipping.found_inf)))
    guard = StepGuard(model, optimizer, keep_on_device=True)
    loss = model(batch(0)).square().mean()
    loss.backward()
    if faults > 0:
        spoil(model, NAN)
    if faults > 1:
        loss = loss * NAN
        model[1].running_var.fill_(INF)
    assert guard.step(loss).applied == (faults == 0)
    assert given == [1.0 if faults > 0 else 0.0]


def test_a_fused_sgd_with_momentum_survives_a_rejected_first_step() -> None:
    """Torch allocates the momentum without filling it, also when the step is skipped."""
    rejected, plain = network(), network()
    optimizers = [SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True) for model in (rejected, plain)]
    guards = [
        StepGuard(model, optimizer, keep_on_device=True)
        for model, optimizer in zip((rejected, plain), optimizers, strict=True)
    ]
    junk = [torch.full((8, 4), 1e30) for _ in range(20)]  # freed memory that an allocation would find
    del junk
    assert not step(guards[0], rejected, batch(0, NAN)).applied
    for guard, model in zip(guards, (rejected, plain), strict=True):
        assert step(guard, model, batch(1)).applied and step(guard, model, batch(2)).applied
    assert equal(everything(rejected, optimizers[0]), everything(plain, optimizers[1]))


IGNORING = {
    "RMSprop": lambda p: RMSprop(p, lr=0.1),
    "NAdam": lambda p: NAdam(p, lr=0.1),
    "Muon": lambda p: Muon(p, lr=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
}


@pytest.mark.parametrize("name", IGNORING)
def test_optimizers_that_ignore_found_inf_are_never_asked_to_honour_it(name: str) -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer: Any = IGNORING[name]([weight])
    weight.grad = torch.ones(2, 2)
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0)
    optimizer.step()
    assert not torch.equal(weight, torch.ones(2, 2)), "torch honours found_inf now: it may stay on the device"
    assert not on_device.honours_found_inf(IGNORING[name]([nn.Parameter(torch.ones(2, 2))]))

    layer = nn.Linear(2, 2, bias=False)
    optimizer = IGNORING[name](list(layer.parameters()))
    guard = StepGuard(layer, optimizer)
    before = everything(layer, optimizer)
    assert not step(guard, layer, torch.full((3, 2), NAN)).applied
    assert equal(everything(layer, optimizer), before)
    assert step(guard, layer, torch.ones(3, 2)).applied


@pytest.mark.parametrize("kind", [Adam, AdamW, Adagrad, SGD])
def test_only_fused_kernels_honour_found_inf(kind: Any) -> None:
    weight = [nn.Parameter(torch.ones(2))]
    assert on_device.honours_found_inf(kind(weight, lr=0.1, fused=True))
    assert not on_device.honours_found_inf(kind(weight, lr=0.1)) and not on_device.honours_found_inf(
        kind(weight, lr=0.1, foreach=True)
    )
    mixed = kind([{"params": weight}, {"params": [nn.Parameter(torch.ones(1))]}], lr=0.1, fused=True)
    mixed.param_groups[1]["fused"] = False
    assert not on_device.honours_found_inf(mixed)


def test_an_optimizer_of_the_users_is_not_trusted_to_honour_it() -> None:
    class Own(AdamW):
        pass

    assert not on_device.honours_found_inf(Own([nn.Parameter(torch.ones(2))], fused=True))


def test_dampening_is_not_left_to_the_fused_kernel() -> None:
    weight = [nn.Parameter(torch.ones(2))]
    assert not on_device.honours_found_inf(SGD(weight, lr=0.1, momentum=0.9, dampening=0.5, fused=True))


def test_no_found_inf_is_left_behind() -> None:
    """A loop that isn't fused asserts that it isn't set."""
    model = network()
    optimizer: Any = AdamW(model.parameters(), lr=0.1, fused=True)
    guard = StepGuard(model, optimizer, keep_on_device=True)
    step(guard, model, batch(0))
    step(guard, model, batch(1, NAN))
    assert not hasattr(optimizer, "found_inf") and not hasattr(optimizer, "grad_scale")
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = False, True
    left: Any = copy.copy(optimizer)
    model(batch(2)).mean().backward()
    optimizer.step()
    left.grad_scale, left.found_inf = None, torch.tensor(0.0)
    with pytest.raises(AssertionError):
        left.step()


# Large finite gradients


def test_a_finite_gradient_of_3e19_is_clipped_and_not_zeroed() -> None:
    torchs, layer = nn.Linear(4, 2, bias=False), nn.Linear(4, 2, bias=False)
    raw = torch.linspace(1e19, 3e19, 8).view(2, 4)
    torchs.weight.grad = raw.clone()
    nn.utils.clip_grad_norm_(torchs.parameters(), 1.0)
    assert torch.equal(torchs.weight.grad, torch.zeros(2, 4)), "torch's clipping doesn't overflow any more"

    optimizer = SGD(layer.parameters(), lr=1.0)
    guard = StepGuard(layer, optimizer, max_norm=1.0)
    before = layer.weight.detach().double()
    loss = layer(batch(0)).mean()
    layer.weight.grad = raw.clone()
    verdict = guard.step(loss)
    norm = float(torch.linalg.vector_norm(raw.double()))
    assert verdict.applied and verdict.grad_norm == pytest.approx(norm, rel=1e-6)
    expected = (before - raw.double() / (norm + 1e-6)).float()
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("keep_on_device", [False, True])
@pytest.mark.parametrize("clip", [None, NoClipping()])
def test_without_clipping_it_is_rejected(clip: Any, keep_on_device: bool) -> None:
    """Its square would fill Adam's second moment with Inf, and freeze that coordinate for ever."""
    layer = nn.Linear(4, 2)
    optimizer = Adam(layer.parameters(), fused=True)
    guard = StepGuard(layer, optimizer, clip=clip, keep_on_device=keep_on_device)
    before = everything(layer)
    loss = layer(batch(0)).mean()
    loss.backward()
    spoil(layer, 3e19)
    assert guard.step(loss).reason == "gradient" and equal(everything(layer), before)


@pytest.mark.parametrize("keep_on_device", [False, True])
def test_a_large_finite_gradient_is_no_overflow_of_the_scale(keep_on_device: bool) -> None:
    layer = nn.Linear(4, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    guard = StepGuard(layer, Adam(layer.parameters(), fused=True), scaler=scaler, keep_on_device=keep_on_device)
    loss = layer(batch(0)).mean()
    scaler.scale(loss).backward()
    spoil(layer, 3e20)
    assert guard.step(loss).reason == "gradient"
    assert (scaler.get_scale(), scaler.state_dict()["_growth_tracker"]) == (4.0, 0)


# Buffers


def test_a_huge_finite_input_is_caught_by_the_running_variance() -> None:
    model = network()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    bare = copy.deepcopy(model)
    loss = bare(batch(0, 1e25)).square().mean()
    loss.backward()
    assert bool(torch.isfinite(loss)) and all(bool(torch.isfinite(p.grad).all()) for p in bare.parameters())
    assert bool(torch.isinf(bare[1].running_var).any())

    guard = StepGuard(model, optimizer)
    before = everything(model, optimizer)
    verdict = step(guard, model, batch(0, 1e25))
    assert verdict.reason == "buffer" and "1.running_var" in verdict.detail and "inf" in verdict.detail
    assert equal(everything(model, optimizer), before)


@pytest.mark.parametrize("keep_on_device", [False, True])
def test_inputs_in_the_wrong_unit_are_caught_while_everything_is_finite(keep_on_device: bool) -> None:
    model = network()
    guard = StepGuard(model, AdamW(model.parameters(), lr=1e-3, fused=True), keep_on_device=keep_on_device)
    for position in range(3):
        assert step(guard, model, batch(position)).applied
    guard.settle()
    model.eval()
    with torch.no_grad():
        before = model(batch(9))
    model.train()
    verdict = step(guard, model, batch(3, 1e4))
    assert verdict.reason == "buffer" and math.isfinite(verdict.loss) and math.isfinite(verdict.grad_norm)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(batch(9)), before)


@pytest.mark.parametrize("keep_on_device", [False, True])
def test_unnormalised_data_is_no_alarm_on_a_fresh_model(keep_on_device: bool) -> None:
    model = network()
    guard = StepGuard(model, AdamW(model.parameters(), fused=True), keep_on_device=keep_on_device)
    for position in range(3):
        assert step(guard, model, batch(position, 1e4)).applied


def trained_state() -> dict[str, Any]:
    model = network()
    model(batch(0))
    return model.state_dict()


@pytest.mark.parametrize("keep_on_device", [False, True])
@pytest.mark.parametrize("loaded", ["before the guard", "after the guard", "a part of it"])
def test_it_is_an_alarm_on_a_loaded_model(loaded: str, keep_on_device: bool) -> None:
    model = network()
    if loaded == "before the guard":
        model.load_state_dict(trained_state())
    guard = StepGuard(model, AdamW(model.parameters(), fused=True), keep_on_device=keep_on_device)
    if loaded == "after the guard":
        model.load_state_dict(trained_state())
    if loaded == "a part of it":
        norm = {name[2:]: item for name, item in trained_state().items() if name.startswith("1.")}
        model[1].load_state_dict(norm)
    assert step(guard, model, batch(0, 1e4)).reason == "buffer"


def test_a_copy_from_before_load_state_dict_is_not_put_back() -> None:
    for part in ("whole", "module"):
        model = network()
        guard = StepGuard(model, SGD(model.parameters(), lr=0.1))
        model(batch(0))  # begins a step that is never decided
        loaded = {name: item + 1 for name, item in network().state_dict().items()}
        if part == "whole":
            model.load_state_dict(loaded)
        else:
            model[1].load_state_dict({name[2:]: item for name, item in loaded.items() if name.startswith("1.")})
        before = everything(model)
        assert not step(guard, model, batch(1, NAN)).applied
        assert equal(everything(model), before), part


def test_after_loading_buffers_are_compared_with_the_loaded_ones() -> None:
    model = network()
    guard = StepGuard(model, SGD(model.parameters(), lr=1e-9))
    assert step(guard, model, batch(0, 1e3)).applied
    model.load_state_dict(trained_state())
    assert step(guard, model, batch(1, 1e3)).reason == "buffer"


class OwnNorm(nn.Module):
    """Keeps a running variance without counting."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.register_buffer("running_var", torch.ones(4))

    def forward(self, inputs: Tensor) -> Tensor:
        self.running_var.lerp_(inputs.var(0), 0.1)
        return self.layer(inputs / self.running_var.sqrt())


def test_a_resumed_guard_knows_that_the_model_has_seen_data() -> None:
    models = [OwnNorm(), OwnNorm()]
    guards = [StepGuard(model, SGD(model.parameters(), lr=0.1)) for model in models]
    assert step(guards[0], models[0], batch(0)).applied
    assert step(guards[0], models[0], batch(1, 1e4)).reason == "buffer"
    guards[1].load_state_dict(guards[0].state_dict())
    assert step(guards[1], models[1], batch(1, 1e4)).reason == "buffer"


def test_loading_the_guard_drops_the_step_that_had_begun() -> None:
    model = network()
    guard = StepGuard(model, SGD(model.parameters(), lr=0.1))
    loss = model(batch(0)).mean()
    loss.backward()
    guard.load_state_dict(guard.state_dict())
    with pytest.raises(ConfigurationError, match="no forward pass"):
        guard.step(loss)


def test_a_resumed_guard_looks_at_the_state_when_the_undisturbed_one_does() -> None:
    reasons = []
    for resumed in (False, True):
        model, idle = network(), nn.Parameter(torch.ones(2))
        optimizer = SGD([*model.parameters(), idle], lr=0.1)
        guard = StepGuard(model, optimizer, policy=Policy(check_state_every=3))
        assert step(guard, model, batch(0)).applied
        if resumed:
            state = guard.state_dict()
            guard.remove()
            guard = StepGuard(model, optimizer, policy=Policy(check_state_every=3))
            guard.load_state_dict(state)
        idle.data.fill_(NAN)
        reasons.append([step(guard, model, batch(number)).reason for number in range(1, 5)])
    assert reasons[0] == reasons[1] == [None, None, "optimizer", "optimizer"]


def test_a_dead_channel_that_comes_to_life_is_no_alarm() -> None:
    model = network(nn.BatchNorm1d(8, momentum=0.9))
    guard = StepGuard(model, SGD(model.parameters(), lr=1e-3))
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = 0.0, 0.0
    for position in range(10):
        assert step(guard, model, batch(position)).applied
        with torch.no_grad():
            model[0].weight[3], model[0].bias[3] = 0.0, 0.0
    assert model[1].running_var[3] < 1e-6
    with torch.no_grad():
        model[0].weight[3] = 1.0
    assert step(guard, model, batch(200)).applied


class Masked(nn.Module):
    """Has a mask of -inf, a cache that is NaN where nothing was seen yet, and one of finite but huge numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("mask", torch.full((4, 4), -INF).triu(1))
        self.register_buffer("cache", torch.full((4,), NAN))
        self.register_buffer("lowest", torch.zeros(4))

    def forward(self, inputs: Tensor) -> Tensor:
        self.cache[0] = 1.0
        self.lowest.fill_(torch.finfo(torch.float32).min)
        return self.layer(inputs) @ (self.mask + 1.0).softmax(-1)


@pytest.mark.parametrize("keep_on_device", [False, True])
def test_masks_of_minus_infinity_are_no_alarm(keep_on_device: bool) -> None:
    model = Masked()
    guard = StepGuard(model, AdamW(model.parameters(), fused=True), keep_on_device=keep_on_device)
    for position in range(3):
        verdict = step(guard, model, batch(position))
        assert verdict.applied, verdict


# Snapshots of other objects


def test_an_optimizer_in_extra_is_restored_from_a_copy_that_stays_good() -> None:
    """`Optimizer.load_state_dict` keeps the tensors it is given, so the next step would change the snapshot."""
    teacher, model = nn.Linear(4, 2), nn.Linear(4, 2)
    inner = SGD(teacher.parameters(), lr=0.1, momentum=0.9)
    teacher(batch(0)).mean().backward()
    inner.step()
    guard = StepGuard(model, SGD(model.parameters(), lr=0.1), extra=(inner, teacher))
    before = everything(inner, teacher)
    for _ in range(2):
        guard.begin()
        for _ in range(2):
            inner.step()
            guard._snapshot.restore()
            assert equal(everything(inner, teacher), before)


def test_extra_that_cannot_be_put_back_is_refused() -> None:
    model = nn.Linear(4, 2)
    with pytest.raises(ConfigurationError, match="extra holds a list"):
        StepGuard(model, SGD(model.parameters(), lr=0.1), extra=([1],))


# The loss scaler


def scaled(init_scale: float = 2.0**16, **settings: Any) -> tuple[nn.Module, torch.amp.GradScaler, StepGuard]:
    model = network()
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    policy = settings.pop("policy", Policy(max_rejected=1000))
    optimizer = AdamW(model.parameters(), lr=1e-3, fused=True)
    return model, scaler, StepGuard(model, optimizer, scaler=scaler, policy=policy, **settings)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("keep_on_device", [False, True])
def test_the_scale_never_falls_below_one(value: float, keep_on_device: bool) -> None:
    """Torch's own falls to 0 after 166 bad steps, and the next good one writes NaN."""
    model, scaler, guard = scaled(keep_on_device=keep_on_device)
    reasons = []
    for position in range(40):
        loss = model(batch(position)).square().mean()
        scaler.scale(loss).backward()
        spoil(model, value)
        reasons.append(guard.step(loss).reason)
    assert reasons == ["overflow"] * 16 + ["gradient"] * 24
    assert scaler.get_scale() == 1.0
    assert step(guard, model, batch(0)).applied
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize("keep_on_device", [False, True])
def test_a_bad_unscaled_loss_leaves_the_scaler_alone(keep_on_device: bool) -> None:
    model, scaler, guard = scaled(keep_on_device=keep_on_device)
    assert step(guard, model, batch(0)).applied
    before = scaler.state_dict()
    for position in range(5):
        assert step(guard, model, batch(position, NAN)).reason == "loss"
        assert scaler.state_dict() == before
    assert step(guard, model, batch(1)).applied
    assert scaler.state_dict()["_growth_tracker"] == before["_growth_tracker"] + 1


@pytest.mark.parametrize("keep_on_device", [False, True])
def test_a_scale_below_one_is_the_users_choice(keep_on_device: bool) -> None:
    model, scaler, guard = scaled(0.5, keep_on_device=keep_on_device)
    assert step(guard, model, batch(0)).applied and step(guard, model, batch(1, NAN)).reason == "loss"
    assert scaler.get_scale() == 0.5


def test_overflows_are_not_counted_against_the_budget() -> None:
    model, scaler, guard = scaled(2.0**10, policy=Policy(max_rejected=0))
    for position in range(10):
        loss = model(batch(position)).square().mean()
        scaler.scale(loss).backward()
        spoil(model, INF)
        assert guard.step(loss).reason == "overflow"
    assert scaler.get_scale() == 1.0
    loss = model(batch(0)).square().mean()
    scaler.scale(loss).backward()
    spoil(model, INF)
    with pytest.raises(UnstableTraining, match="gradient"):
        guard.step(loss)


def test_a_step_without_any_gradient_does_not_confuse_the_scaler() -> None:
    model, scaler, guard = scaled()
    assert step(guard, model, batch(0)).applied
    before = scaler.state_dict()
    assert guard.step(model(batch(1)).mean()).applied
    assert scaler.state_dict() == before
    assert step(guard, model, batch(2)).applied


def test_a_disabled_scaler_is_no_scaler() -> None:
    model = network()
    guard = StepGuard(model, SGD(model.parameters(), lr=0.1), scaler=torch.amp.GradScaler("cpu", enabled=False))
    assert guard.scaler is None and step(guard, model, batch(0)).applied


# The optimizer


@pytest.mark.parametrize("keep_on_device", [False, True])
@pytest.mark.parametrize("way", ["at construction", "by the scheduler"])
def test_a_bad_learning_rate_is_found_before_it_is_used(way: str, keep_on_device: bool) -> None:
    """SGD takes NaN silently."""
    model = network()
    optimizer = SGD(model.parameters(), lr=NAN if way == "at construction" else 0.1, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: NAN if update == 1 else 1.0)
    guard = StepGuard(model, optimizer, scheduler=scheduler, keep_on_device=keep_on_device)
    if way == "by the scheduler":
        assert step(guard, model, batch(0)).applied
        guard.settle()
    before = everything(model)
    verdict = step(guard, model, batch(1))
    assert verdict.reason == "optimizer" and equal(everything(model), before)
    if not keep_on_device:
        assert "learning rate is nan" in verdict.detail


@pytest.mark.parametrize("keep_on_device", [False, True])
def test_bad_optimizer_state_is_found_before_it_reaches_the_parameters(keep_on_device: bool) -> None:
    model = network()
    optimizer = AdamW(model.parameters(), fused=True)
    policy = Policy(check_state_every=2)
    guard = StepGuard(model, optimizer, policy=policy, keep_on_device=keep_on_device)
    for position in range(2):
        assert step(guard, model, batch(position)).applied
    optimizer.state[model[0].weight]["exp_avg"][0, 0] = NAN
    before = everything(model)
    for position in range(2):
        verdict = step(guard, model, batch(position))
        assert verdict.reason == "optimizer" and equal(everything(model), before)


def test_bad_parameters_are_named() -> None:
    model = network()
    guard = StepGuard(model, SGD(model.parameters(), lr=0.1))
    with torch.no_grad():
        model[3].bias[1] = NAN
    assert "before this step parameter 3.bias: 1 of 2 elements NaN" in step(guard, model, batch(0)).detail
    guard = StepGuard(model, SGD(model.parameters(), lr=0.1))
    loss = model(batch(0))[:, 0].mean()
    loss.backward()
    verdict = guard.step(loss)
    assert verdict.reason == "optimizer" and verdict.detail == "parameter 3.bias: 1 of 2 elements NaN"


# Copies of the model


def test_copies_of_a_guarded_model_do_not_call_the_guard() -> None:
    model = network()
    guard = StepGuard(model, SGD(model.parameters(), lr=0.1))
    copies = [copy.deepcopy(model), AveragedModel(model), pickle.loads(pickle.dumps(model))]
    for other in copies:
        other(batch(0))
        assert not guard._snapshot.taken
    model(batch(0))
    assert guard._snapshot.taken
    copies[0].load_state_dict(model.state_dict())
    assert guard._snapshot.taken


def test_a_guard_that_was_removed_or_dropped_leaves_the_model_alone() -> None:
    model = network()
    guard = StepGuard(model, SGD(model.parameters(), lr=0.1))
    guard.remove()
    model(batch(0))
    assert not guard._snapshot.taken
    assert all(not part._forward_pre_hooks and not part._load_state_dict_post_hooks for part in model.modules())
    model = network()
    StepGuard(model, SGD(model.parameters(), lr=0.1))
    model(batch(0))


# The loop


@pytest.mark.parametrize("bad", [0, 1])
def test_two_optimizers_decide_together(bad: int) -> None:
    """As for the two halves of an adversarial pair: one that is skipped alone runs away from the other."""
    models = [network(), network()]
    optimizers: list[Optimizer] = [Adam(models[0].parameters(), fused=True), RMSprop(models[1].parameters())]
    guard = StepGuard(models, optimizers)
    losses = [model(batch(0)).square().mean() for model in models]
    (losses[0] + losses[1]).backward()
    before = everything(*[network(), network()], *optimizers)
    spoil(models[bad], NAN)
    verdict = guard.step(losses)
    assert verdict.reason == "gradient" and f"{bad}.0.weight" in verdict.detail
    assert equal(everything(*models, *optimizers), before)


def test_validation_between_steps_does_not_disturb() -> None:
    disturbed, plain = network(nn.BatchNorm1d(8), nn.Dropout(0.3)), network(nn.BatchNorm1d(8), nn.Dropout(0.3))
    ends = []
    for model, validates in ((disturbed, True), (plain, False)):
        torch.manual_seed(4)
        guard = StepGuard(model, SGD(model.parameters(), lr=0.1, momentum=0.9))
        for position in range(4):
            if validates:
                model.eval()
                for mode in (torch.no_grad, torch.inference_mode):
                    with mode():
                        model(batch(50 + position, NAN))
                assert not guard._snapshot.taken
                model(batch(60))  # evaluation that forgot no_grad
                model.train()
            assert step(guard, model, batch(position, NAN if position == 2 else 1.0)).applied == (position != 2)
        ends.append([*everything(model), torch.get_rng_state()])
    assert equal(*ends)


def test_a_training_forward_in_inference_mode_may_begin_a_step() -> None:
    model = network()
    guard = StepGuard(model, SGD(model.parameters(), lr=0.1))
    for position in range(3):
        if position == 0:
            with torch.inference_mode():
                model(batch(position))
        assert step(guard, model, batch(position)).applied


def test_details_name_what_was_found() -> None:
    model = network()
    guard = StepGuard(model, SGD(model.parameters(), lr=0.1))
    assert step(guard, model, batch(0)).detail == ""
    losses = [model(batch(0)).mean(), model(batch(1)).mean() * NAN, model(batch(2)).mean()]
    assert "microbatch 1 of 3" in guard.step(losses).detail
    loss = model(batch(0)).mean()
    loss.backward()
    spoil(model, INF)
    assert guard.step(loss).detail == "gradient of 0.weight: 1 of 32 elements Inf"
    assert "buffer 1.running_var" in step(guard, model, batch(0, 1e4)).detail


def test_raise_stops_at_the_first_bad_step_with_everything_undone() -> None:
    model = network()
    optimizer = Adam(model.parameters())
    guard = StepGuard(model, optimizer, policy=Policy(on_rejection="raise"))
    assert step(guard, model, batch(0)).applied
    before = [*everything(model, optimizer), torch.get_rng_state()]
    with pytest.raises(UnstableTraining, match="rejected for its loss: the loss is nan"):
        step(guard, model, batch(1, NAN))
    assert equal([*everything(model, optimizer), torch.get_rng_state()], before)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("keep_on_device", [False, True])
def test_an_exceeded_budget_stops_with_everything_undone(keep_on_device: bool) -> None:
    """Kept on the device the verdict is read a step later; that step is undone too."""
    model = network()
    optimizer = Adam(model.parameters(), fused=True)
    guard = StepGuard(model, optimizer, policy=Policy(max_rejected=1), keep_on_device=keep_on_device)
    assert step(guard, model, batch(0)).applied
    guard.settle()
    before = everything(model, optimizer)

    def go_on() -> None:
        for position in range(4):
            step(guard, model, batch(position, NAN if position < 2 else 1.0))

    with pytest.raises(UnstableTraining, match="2 of the last 3 steps were rejected, more than the 1 allowed"):
        go_on()
    assert equal(everything(model, optimizer), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_policy_none_applies_everything_and_measures() -> None:
    guarded, bare = network(), network()
    optimizers = [SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (guarded, bare)]
    guard = StepGuard(guarded, optimizers[0], policy=Policy(on_rejection="none"))
    for position in range(4):
        inputs = batch(position, NAN if position == 2 else 1.0)
        assert step(guard, guarded, inputs).applied
        bare(inputs).square().mean().backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
    for one, other in zip(guarded.state_dict().values(), bare.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0, equal_nan=True)
    assert guard.stats.rejected == 0 and bool(torch.isnan(guarded[0].weight).any())


def test_policy_none_leaves_overflows_to_the_scaler_as_a_loop_without_a_guard_does() -> None:
    model, scaler, guard = scaled(4.0, policy=Policy(on_rejection="none"))
    before = everything(model)
    loss = model(batch(0)).square().mean()
    scaler.scale(loss).backward()
    spoil(model, INF)
    assert guard.step(loss).reason == "overflow" and scaler.get_scale() == 2.0
    assert equal(everything(model), before)


def test_the_ledger_travels_with_the_guard() -> None:
    model = network()
    guard = StepGuard(model, SGD(model.parameters(), lr=0.1), policy=Policy(max_rejected=2))
    for position in range(4):
        step(guard, model, batch(position, NAN if position % 2 else 1.0))
    state = pickle.loads(pickle.dumps(guard.state_dict()))
    later = StepGuard(model, SGD(model.parameters(), lr=0.1), policy=Policy(max_rejected=2))
    later.load_state_dict(state)
    assert later.state_dict() == guard.state_dict() and later.stats.rejected == 2 and later.stats.applied == 2
    with pytest.raises(UnstableTraining):
        step(later, model, batch(0, NAN))


def test_loading_the_guard_checks_the_state_again() -> None:
    model = network()
    guard = StepGuard(model, SGD(model.parameters(), lr=0.1))
    assert step(guard, model, batch(0)).applied
    with torch.no_grad():
        model[3].bias[1] = NAN
    guard.load_state_dict(guard.state_dict())
    loss = model(batch(0))[:, 0].mean()
    loss.backward()
    assert guard.step(loss).reason == "optimizer"


class Encoder(nn.Module):
    def __init__(self, buffers: bool) -> None:
        super().__init__()
        self.layers = network() if buffers else network(nn.Dropout(0.5))

    def encode(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


@pytest.mark.parametrize("buffers", [True, False])
def test_a_forward_through_a_method_is_told_the_remedy(buffers: bool) -> None:
    model = Encoder(buffers)
    guard = StepGuard(model, SGD(model.parameters(), lr=0.1))
    loss = model.encode(batch(0)).mean()
    loss.backward()
    with pytest.raises(ConfigurationError, match=r"Call the model itself.*or call guard.begin\(\)"):
        guard.step(loss)
    before = [*everything(model), torch.get_rng_state()]
    guard.begin()
    loss = model.encode(batch(0, NAN)).mean()
    loss.backward()
    assert not guard.step(loss).applied
    assert equal([*everything(model), torch.get_rng_state()], before)


@pytest.mark.parametrize("settings", [{"max_norm": 0.0}, {"max_norm": NAN}, {"max_norm": 1.0, "clip": NoClipping()}])
def test_contradicting_arguments_are_refused(settings: dict[str, Any]) -> None:
    model = network()
    with pytest.raises(ConfigurationError, match="max_norm is"):
        StepGuard(model, SGD(model.parameters(), lr=0.1), **settings)
