"""What the ranks of a test do: a loop as a user writes it, under torch's wrappers, with a fault on one rank."""

from __future__ import annotations

import math
import signal
import tempfile
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from small import Multiply
from stabletrain.assembly import assemble
from stabletrain.checkpoint import CheckpointStore
from stabletrain.clipping import AGC, AdaGC, AutoClip, Norm, ZClip
from stabletrain.collectives import whole
from stabletrain.data import ArrayDataset, Splits, split_dataset
from stabletrain.ema import ExponentialMovingAverage
from stabletrain.errors import Interrupted, UnstableTraining
from stabletrain.guard import Policy, StepGuard
from stabletrain.loss import CrossEntropy, WeightedCrossEntropy
from stabletrain.optimizer import adamw
from stabletrain.parallel import DataParallel, FullySharded, SingleProcess
from stabletrain.precision import Precision
from stabletrain.task import Classification
from stabletrain.tracking import Tracker
from stabletrain.trainer import Run
from stabletrain.trainer import train as run_trainer

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
        loss = Multiply.apply(loss, case.value)
    (scaler.scale(loss) if scaler is not None else loss).backward()
    return loss


# ------------------------------------------------------------------------------------------------- the trainer's ranks

SAMPLES = 132
HIDDEN = 77.0  # a value that is finite and makes the forward NaN


@dataclass(frozen=True)
class Training:
    """A whole run of the trainer under several ranks, or in one process."""

    parallel: str = "ddp"  # none, ddp or fsdp2
    accumulate: int = 1
    epochs: int = 2
    batch_size: int = 16
    batch_norm: bool = False
    guard: Policy = field(default_factory=Policy)
    bad: tuple[int, ...] = ()  # samples whose inputs hold NaN
    hidden: tuple[int, ...] = ()  # samples at which the model's forward makes one
    fault: Any = None
    weighted: bool = False  # class weights, so that the ranks' weights differ
    ema: bool = False
    precision: str = "float32"
    clipping: str = "norm"
    ladder: Any = None  # instead of `precision`
    folder: str | None = None
    stop_at: int | None = None  # update at which one rank is asked to end
    every_updates: int | None = None


CLIPPINGS: dict[str, Any] = {
    "norm": lambda: Norm(1.0),
    "agc": lambda: AGC(share=0.05),
    "autoclip": lambda: AutoClip(percentile=50.0),
    "zclip": lambda: ZClip(warmup=3),
    "adagc": lambda: AdaGC(warmup=3),
}


class Sensitive(nn.Module):
    """The logarithm of something that only a few samples make negative."""

    def __init__(self, batch_norm: bool) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.norm = nn.BatchNorm1d(16) if batch_norm else nn.LayerNorm(16)
        self.drop = nn.Dropout(0.1)
        self.last = nn.Linear(16, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs + 0.0 * torch.log(HIDDEN - 1.0 - inputs[:, :1])
        logits: Tensor = self.last(self.drop(self.norm(self.first(inputs)).relu()))
        return logits


def data_of(training: Training) -> Splits:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, 6, generator=generator)
    labels = (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0.5).long()
    parts = split_dataset(ArrayDataset(inputs, labels), seed=0, validation=0.2, test=0.1)
    trained = parts.train
    inputs = trained.inputs.clone()
    inputs[list(training.bad), 2] = math.nan
    inputs[list(training.hidden), 0] = HIDDEN
    return replace(parts, train=ArrayDataset(inputs, trained.targets))


def run_of(training: Training) -> Run:
    torch.manual_seed(0)
    model = Sensitive(training.batch_norm)
    parts = {"none": SingleProcess, "ddp": DataParallel, "fsdp2": lambda: FullySharded(min_parameters=10)}
    loss = WeightedCrossEntropy([10, 20, 70]) if training.weighted else CrossEntropy()
    return assemble(
        model,
        data_of(training),
        epochs=training.epochs,
        batch_size=training.batch_size,
        accumulate=training.accumulate,
        task=Classification(loss),
        optimizer=partial(adamw, lr=0.01),
        parallel=parts[training.parallel](),
        clipping=CLIPPINGS[training.clipping](),
        guard=training.guard,
        fault=training.fault,
        ema=ExponentialMovingAverage if training.ema else None,
        precision=training.ladder or partial(Precision, training.precision),
        checkpoint=partial(CheckpointStore, every_updates=training.every_updates),
        tracking=partial(Tracker, log_every=1, tensorboard=False, progress="none"),
        folder=training.folder,
    )


class _StopAt:
    """Sends one rank a signal after so many updates."""

    def __init__(self, run: Run, updates: int) -> None:
        self.run, self.updates, self._after = run, updates, run.fault.after_update

    def __call__(self, steps: int, model: nn.Module, optimizer: Any) -> None:
        self._after(steps, model, optimizer)
        if self.run.progress.updates == self.updates and self.run.ranks.rank == self.run.ranks.size - 1:
            signal.raise_signal(signal.SIGTERM)


def run_training(training: Training) -> dict[str, Any]:
    """Train, and return what is left and what was said."""
    run = run_of(training)
    if training.stop_at is not None:
        run.fault.after_update = _StopAt(run, training.stop_at)  # type: ignore[method-assign]
    said = ""
    try:
        summary = asdict(run_trainer(run))
    except (Interrupted, UnstableTraining) as error:
        said, summary = f"{type(error).__name__}: {error}", {}
    return {
        "said": said,
        "summary": {name: summary.get(name) for name in ("status", "rejected", "salvaged", "rolled_back", "metrics")},
        "quarantined": sorted(run.quarantine.found),
        "model": whole(dict(run.model.state_dict())),
        "optimizer": whole(run.optimizer.state_dict()["state"]),
        "ema": whole(run.ema.state_dict()["average"]) if run.ema is not None else {},
        "clipping": run.guard.clipper.state_dict(),
        "progress": run.progress.state_dict(),
        "ledger": run.guard.ledger.state_dict(),
        "moves": run.ladder.plan.moves if run.ladder is not None else [],
    }


@dataclass(frozen=True)
class Experiment:
    """A run that a command line describes."""

    words: tuple[str, ...]


def run_experiment(experiment: Experiment) -> dict[str, Any]:
    """Train as the command would, and return what is left and what was said."""
    from composed import checked
    from stabletrain.build import build

    with tempfile.TemporaryDirectory() as folder:
        run = build(checked(*experiment.words), folder)
        summary = run_trainer(run)
    told = {name: getattr(summary, name) for name in ("status", "updates", "rejected", "salvaged", "metrics")}
    return {**told, "quarantined": sorted(run.quarantine.found), "model": dict(run.model.state_dict())}
