"""What the ranks of a test do: a loop as a user writes it, under torch's wrappers, with a fault on one rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from stabletrain.collectives import whole
from stabletrain.guard import Policy, StepGuard

STEPS = 14
BAD_STEP = 12


@dataclass(frozen=True)
class Case:
    """One fault under one wrapper."""

    place: str  # input, forward, loss, gradient, overflow, buffer, spike, or none
    value: float = math.nan
    rank: int = 1  # which one has the fault
    wrapper: str = "ddp"  # or fsdp2
    accumulate: int = 1
    precision: str = "fp32"
    on_device: bool = False
    hole: bool = False  # whether the bad step is left out, as if it had never been


class Net(nn.Module):
    """A small network with running statistics, dropout, and a place for a fault in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.2)
        self.last = nn.Linear(8, 3)
        self.factor: float | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(self.first(inputs)).relu()
        if self.factor is not None:
            hidden = hidden * self.factor
        logits: Tensor = self.last(self.drop(hidden))
        return logits


class _Backward(torch.autograd.Function):
    """The identity, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def wrapped(net: Net, wrapper: str) -> nn.Module:
    if wrapper == "ddp":
        return DistributedDataParallel(net)
    for part in (net.first, net.last):
        fully_shard(part)
    return fully_shard(net)


def train(case: Case) -> dict[str, Any]:
    """Train a few steps under a guard and return everything that is left, and what was decided."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    net = Net()
    model = wrapped(net, case.wrapper)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=case.on_device or None)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1.0 / (1 + update))
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0) if case.precision == "fp16" else None
    guard = StepGuard(
        model,
        optimizer,
        max_norm=1.0,
        scaler=scaler,
        scheduler=scheduler,
        policy=Policy(spikes=True),
        keep_on_device=case.on_device,
    )
    verdicts = []
    own_losses: list[float] = []
    for step in range(STEPS):
        bad = step == BAD_STEP
        if bad and case.hole:
            continue
        faulty = bad and rank == case.rank
        torch.manual_seed(1000 * step + rank)
        losses = []
        for number in range(case.accumulate):
            last = number == case.accumulate - 1
            if case.wrapper == "ddp":
                assert isinstance(model, DistributedDataParallel)
                model.require_backward_grad_sync = last
            losses.append(_microbatch(case, net, model, scaler, faulty and last))
        if faulty and case.place == "buffer":
            net.norm.running_var[0] = case.value
        own_losses.append(float(torch.stack([loss.detach() for loss in losses]).mean()))
        verdicts.append(guard.step(losses))
    guard.settle()
    return {
        "reasons": [verdict.reason for verdict in verdicts],
        "details": [verdict.detail for verdict in verdicts],
        "losses": [verdict.loss for verdict in verdicts],
        "own losses": own_losses,
        "model": {name: tensor.clone() for name, tensor in whole(dict(net.state_dict())).items()},
        "optimizer": whole(optimizer.state_dict()["state"]),
        "rate": scheduler.get_last_lr(),
        "scaler": scaler.state_dict() if scaler is not None else {},
        "applied": guard.stats.applied,
    }


def _microbatch(case: Case, net: Net, model: nn.Module, scaler: Any, faulty: bool) -> Tensor:
    inputs = torch.randn(5, 6)
    targets = torch.randint(3, (5,))
    if faulty and case.place == "input":
        inputs[2, 3] = case.value
    net.factor = case.value if faulty and case.place == "forward" else None
    with torch.autocast("cpu", torch.bfloat16, enabled=case.precision != "fp32"):
        loss = nn.functional.cross_entropy(model(inputs).float(), targets)
    if faulty and case.place == "loss":
        loss = loss * case.value
    if faulty and case.place in ("gradient", "spike", "overflow"):
        loss = _Backward.apply(loss, case.value)
    (scaler.scale(loss) if scaler is not None else loss).backward()
    return loss
