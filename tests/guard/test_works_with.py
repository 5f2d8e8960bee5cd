"""What else people do with their networks: a rejected step never happened there either."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from stabletrain.guard import StepGuard

from .models import old_spectral_norm
from .worlds import differences, flatten, nonfinite

WIDTH, STEPS, BAD = 8, 5, 2


class Net(nn.Module):
    """Linear, a middle part, linear."""

    def __init__(self, middle: nn.Module, around: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.middle = middle
        self.last = nn.Linear(WIDTH, WIDTH)
        self.around = around

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        hidden = self.around(self.middle, hidden) if self.around is not None else self.middle(hidden)
        outputs: Tensor = self.last(hidden)
        return outputs


def usual() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Dropout(0.2))


def tied() -> nn.Module:
    net = Net(usual())
    net.last.weight = net.first.weight
    return net


def frozen(*, running: bool) -> nn.Module:
    """The first part learns no more; its running statistics still run, or not."""
    net = Net(usual())
    for parameter in (*net.first.parameters(), *net.middle.parameters()):
        parameter.requires_grad_(False)
    net.middle.train(running)
    return net


def wholly_checkpointed(net: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda inputs: checkpoint(net, inputs, use_reentrant=False)


def recomputed(reentrant: bool) -> Callable[..., Tensor]:
    return lambda part, hidden: checkpoint(part, hidden, use_reentrant=reentrant)


def parametrized(parametrization: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return Net(nn.Sequential(parametrization(nn.Linear(WIDTH, WIDTH)), usual()))


NETS: dict[str, Callable[[], nn.Module]] = {
    "a part checkpointed": lambda: Net(usual(), recomputed(False)),
    "a part checkpointed, reentrant": lambda: Net(usual(), recomputed(True)),
    "weight norm": lambda: parametrized(parametrizations.weight_norm),
    "spectral norm": lambda: parametrized(parametrizations.spectral_norm),
    "orthogonal": lambda: parametrized(parametrizations.orthogonal),
    "old spectral norm": lambda: parametrized(lambda _: old_spectral_norm()),
    "shared weights": tied,
    "frozen, statistics running": lambda: frozen(running=True),
    "frozen in evaluation": lambda: frozen(running=False),
}


def batch(position: int, bad: bool) -> Tensor:
    inputs = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(position))
    if bad:
        inputs[1, 2] = math.nan
    return inputs


def everything(*holders: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for index, holder in enumerate(holders):
        flatten(str(index), holder.state_dict(), found)
    found["randomness"] = torch.get_rng_state()
    return found


def optimizers_for(net: nn.Module, count: int) -> list[torch.optim.Optimizer]:
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    return [torch.optim.AdamW(parameters[index::count], lr=0.01) for index in range(count)]


def end_of_training(
    make: Callable[[], nn.Module],
    *,
    hole: bool,
    attach: bool = False,
    optimizers: int = 1,
    prepare: Callable[[nn.Module], tuple[nn.Module, Callable[[Tensor], Tensor]]] = lambda net: (net, net),
) -> dict[str, Any]:
    """Train with a bad step, or with a hole in its place; `prepare` says what is guarded and what is called."""
    torch.manual_seed(3)
    net = make()
    made = optimizers_for(net, optimizers)
    guarded, call = prepare(net)
    guard = StepGuard(guarded, made, max_norm=0.5)
    if attach:
        guard.attach()
    torch.manual_seed(11)
    for position in range(STEPS):
        if hole and position == BAD:
            continue
        loss = call(batch(position, bad=position == BAD)).square().mean()
        loss.backward()
        if attach:
            for optimizer in made:
                optimizer.step()
            for optimizer in made:
                optimizer.zero_grad()
        else:
            guard.step(loss)
    assert (guard.stats.applied, guard.stats.rejected) == (STEPS - 1, 0 if hole else 1)
    return everything(net, *made)


def check(make: Callable[[], nn.Module], **settings: Any) -> None:
    bad, holed = (end_of_training(make, hole=hole, **settings) for hole in (False, True))
    assert not nonfinite(bad)
    assert not differences(bad, holed)


@pytest.mark.parametrize("attach", [False, True])
@pytest.mark.parametrize("optimizers", [1, 2])
@pytest.mark.parametrize("name", NETS)
def test_a_rejected_step_leaves_no_trace(name: str, optimizers: int, attach: bool) -> None:
    check(NETS[name], optimizers=optimizers, attach=attach)


def test_a_network_that_is_checkpointed_as_a_whole() -> None:
    check(lambda: Net(usual()), prepare=lambda net: (net, wholly_checkpointed(net)))


def compiled(way: str, counter: Any, net: nn.Module) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    torch._dynamo.reset()
    if way == "in place":
        net.compile(backend=counter, fullgraph=True)
        return net, net
    call = torch.compile(net, backend=counter, fullgraph=True)
    return (call if way == "the compiled one guarded" else net), call


@pytest.mark.parametrize("attach", [False, True])
@pytest.mark.parametrize("way", ["the compiled one guarded", "the inner one guarded", "in place"])
def test_a_compiled_forward_stays_in_one_piece(way: str, attach: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(lambda: Net(usual()), attach=attach, prepare=lambda net: compiled(way, counter, net))
    assert counter.frame_count == 2  # one graph for each of the two trainings
    assert not counters["graph_break"]


class Adversaries:
    """Two networks that train in turn, each run in the other's steps."""

    def __init__(self, watched: str, attach: bool) -> None:
        torch.manual_seed(4)
        self.critic = Net(nn.Sequential(parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)), usual()))
        self.generator = Net(usual())
        parts = (self.critic, self.generator)
        self.optimizers = [torch.optim.Adam(part.parameters(), lr=0.01) for part in parts]
        self.attach = attach
        if watched == "one guard":
            self.guards = [StepGuard(parts, self.optimizers)] * 2
        else:
            models = [parts, parts] if watched == "both networks" else [[part] for part in parts]
            self.guards = [StepGuard(model, one) for model, one in zip(models, self.optimizers, strict=True)]
        for guard in dict.fromkeys(self.guards):
            if attach:
                guard.attach()

    def step(self, position: int, turn: int, bad: bool) -> None:
        noise = batch(100 + position, bad and turn == 1)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        if turn == 0:
            made = self.generator(noise).detach()
            loss = (self.critic(made) - self.critic(batch(position, bad))).mean()
        else:
            loss = -self.critic(self.generator(noise)).mean()
        loss.backward()
        if self.attach:
            self.optimizers[turn].step()
        else:
            self.guards[turn].step(loss)

    def train(self, bad: tuple[int, int], *, hole: bool) -> dict[str, Any]:
        torch.manual_seed(11)
        for position, turn in itertools.product(range(STEPS), (0, 1)):
            if not (hole and (position, turn) == bad):
                self.step(position, turn, (position, turn) == bad)
        return everything(self.critic, self.generator, *self.optimizers)


@pytest.mark.parametrize("attach", [False, True])
@pytest.mark.parametrize("turn", [0, 1])
def test_adversaries_with_a_guard_each_that_watches_both(turn: int, attach: bool) -> None:
    bad, holed = (Adversaries("both networks", attach) for _ in range(2))
    end = bad.train((BAD, turn), hole=False)
    assert [guard.stats.rejected for guard in bad.guards] == [1 - turn, turn]
    assert [guard.stats.applied for guard in bad.guards] == [STEPS - 1 + turn, STEPS - turn]
    assert not nonfinite(end)
    assert not differences(end, holed.train((BAD, turn), hole=True))


@pytest.mark.parametrize("turn", [0, 1])
def test_adversaries_with_one_guard_that_is_attached_to_both(turn: int) -> None:
    bad, holed = (Adversaries("one guard", True) for _ in range(2))
    end = bad.train((BAD, turn), hole=False)
    assert (bad.guards[0].stats.rejected, bad.guards[0].stats.applied) == (1, 2 * STEPS - 1)
    assert not nonfinite(end)
    assert not differences(end, holed.train((BAD, turn), hole=True))


def test_adversaries_with_a_guard_that_watches_its_own_network_alone_may_lose_a_step_more() -> None:
    """What the generator's bad step left behind in the critic is found, and undone, in the critic's next step."""
    one = Adversaries("its own", False)
    assert not nonfinite(one.train((BAD, 1), hole=False))
    assert [guard.stats.reasons for guard in one.guards] == [{"buffer": 1}, {"loss": 1}]


@pytest.mark.parametrize("attach", [False, True])
def test_adversaries_that_step_together_have_one_guard(attach: bool) -> None:
    ends = []
    for hole in (False, True):
        one = Adversaries("one guard", attach)
        torch.manual_seed(11)
        for position in range(STEPS):
            if hole and position == BAD:
                continue
            made = one.generator(batch(100 + position, position == BAD))
            loss = (one.critic(made) - one.critic(batch(position, bad=False))).mean()
            loss.backward()
            if attach:
                for optimizer in one.optimizers:
                    optimizer.step()
                for optimizer in one.optimizers:
                    optimizer.zero_grad()
            else:
                one.guards[0].step(loss)
        ends.append(everything(one.critic, one.generator, *one.optimizers))
        assert one.guards[0].stats.applied == STEPS - 1
    assert not nonfinite(ends[0])
    assert not differences(*ends)
