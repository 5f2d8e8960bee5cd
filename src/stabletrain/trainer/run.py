"""What a run is made of, and what is said of it in the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from stabletrain.checkpoint import CheckpointStore
from stabletrain.clipping import Clipping, NoClipping
from stabletrain.collectives import Ranks
from stabletrain.data import Loader, Microbatch, OrderedLoader
from stabletrain.ema import ExponentialMovingAverage
from stabletrain.fault import Fault, NoFault
from stabletrain.folder import RunFolder
from stabletrain.guard import StepGuard, Verdict
from stabletrain.incident import IncidentStore
from stabletrain.optimizer import ModelParameters
from stabletrain.parallel import SingleProcess
from stabletrain.precision import Ladder, Precision
from stabletrain.quarantine import Quarantine
from stabletrain.ramp import Ramp
from stabletrain.signals import Signals
from stabletrain.state import EpochTotals, Progress
from stabletrain.task import Task, memory_of
from stabletrain.tracking import Tracker

if TYPE_CHECKING:
    from stabletrain.trainer.rollback import Rollback

Status = Literal["running", "completed", "stopped_unstable", "interrupted", "failed"]


@dataclass(kw_only=True)
class Run:
    """Everything a run is made of, finished and ready."""

    model: nn.Module
    network: nn.Module  # what training calls: the model, or torch's wrapper that exchanges gradients
    task: Task
    optimizer: Optimizer
    loader: Loader
    validation: OrderedLoader | None
    test: OrderedLoader | None
    schedule: Callable[[int], float]
    precision: Precision
    augmentation: Callable[[Any], Any]
    guard: StepGuard
    ema: ExponentialMovingAverage | None
    checkpoint: CheckpointStore | None
    tracker: Tracker
    epochs: int
    total_steps: int  # planned
    seed: int
    device: torch.device
    parallel: SingleProcess = field(default_factory=SingleProcess)
    ramp: Ramp = field(default_factory=Ramp)
    clipping: Clipping = field(default_factory=NoClipping)  # which the guard applies
    validate_from: int = 0  # updates before which nothing is validated
    fault: Fault = field(default_factory=NoFault)
    quarantine: Quarantine = field(default_factory=Quarantine)
    incidents: IncidentStore | None = None
    rollback: Rollback | None = None  # where the policy has one
    last_good: list[torch.Tensor] = field(default_factory=list)  # samples of the last applied step
    signals: Signals = field(default_factory=Signals)  # that ask the run to save and end
    folder: RunFolder | None = None  # locked until the run has ended
    resume: str = "auto"  # auto, never, must, or a checkpoint's path
    identity: dict[str, Any] = field(default_factory=dict)  # what must not change between a run and its resumption
    hyperparameters: list[dict[str, Any]] = field(default_factory=list)  # the optimizer's, as it was built
    settings: dict[str, Any] = field(default_factory=dict)  # the resolved config
    notes: list[str] = field(default_factory=list)  # what was done to the data, for the user to read
    overrides: list[str] = field(default_factory=list)  # what was given on the command line, for the record
    progress: Progress = field(default_factory=Progress)
    totals: EpochTotals = field(default_factory=EpochTotals)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)  # "final", "best" and "test"

    def step(self, epoch: int, index: int, number: int, microbatches: list[Microbatch]) -> Step:
        """Return a step that begins.

        Args:
            epoch: from 0.
            index: within the epoch.
            number: over the whole run, from 0.
            microbatches: of this rank.
        """
        ranks = self.ranks
        return Step(
            epoch=epoch, index=index, number=number, microbatches=microbatches, rank=ranks.rank, ranks=ranks.size
        )

    @property
    def ladder(self) -> Ladder | None:
        """The precision, where it is one that changes in the course of the run."""
        return self.precision if isinstance(self.precision, Ladder) else None

    @property
    def objective(self) -> nn.Module | None:
        """The task's loss, where it has parameters or buffers: they are trained, judged and saved like the model's."""
        return memory_of(self.task)

    @property
    def trained(self) -> ModelParameters:
        """The parameters of the model and of the loss, with their names."""
        return ModelParameters(self.model, self.objective)

    def same_buffers(self) -> None:
        """Let every rank's buffers, of the model and of the loss, be the first rank's."""
        for module in (self.model, self.objective):
            if module is not None:
                self.ranks.same_buffers(module)

    @property
    def ranks(self) -> Ranks:
        """The processes of this run."""
        return self.parallel.ranks


@dataclass(kw_only=True)
class Summary:
    """How a run ended; the content of `summary.json`."""

    status: Status
    updates: int
    steps: int
    rejected: int
    reasons: dict[str, int]
    metrics: dict[str, dict[str, float]]
    finite: dict[str, bool]
    seconds: float
    samples_per_second: float
    preset: str | None
    experiment: str | None
    seed: int
    message: str = ""  # for a run that stopped: why
    salvaged: int = 0
    rolled_back: int = 0
    incidents: int = 0
    quarantined: list[int] = field(default_factory=list)
    precision_moves: list[dict[str, Any]] = field(default_factory=list)  # of a ladder, in order
    checkpoints: dict[str, Any] = field(default_factory=dict)  # saved, failed, refused, and the last problem


@dataclass(kw_only=True)
class Step:
    """A step on its way: what it sees, and what was decided about it."""

    epoch: int
    index: int  # within the epoch
    number: int = 0  # over the whole run, from 0
    rate: float = 0.0  # learning rate
    microbatches: list[Microbatch]
    rank: int = 0  # whose microbatches these are; those of a step are dealt out in turn
    ranks: int = 1
    verdict: Verdict | None = None
    rejected_for: Verdict | None = None  # of a salvaged step: the verdict before its bad samples were left out
    bad_samples: list[int] = field(default_factory=list)  # left out of it

    def indices(self) -> list[int]:
        """Return the samples that it sees."""
        return [index for microbatch in self.microbatches for index in microbatch.indices.tolist()]
