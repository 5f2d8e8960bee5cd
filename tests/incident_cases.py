"""Small runs that go wrong in a chosen way; as a program, replays incidents from their folders alone.

The program builds each run from the incident's own settings, with data in which nothing is wrong.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stabletrain.assembly import assemble
from stabletrain.augmentation import Noise
from stabletrain.data import ArrayDataset, Splits
from stabletrain.guard import Policy
from stabletrain.incident import IncidentStore, load_incident
from stabletrain.loss import CrossEntropy
from stabletrain.optimizer import adamw, set_learning_rate
from stabletrain.precision import Precision
from stabletrain.task import Classification, Output
from stabletrain.tracking import Tracker
from stabletrain.trainer import Run
from stabletrain.trainer.replay import incident_of, replay, sha256
from stabletrain.trainer.run import Step
from stabletrain.trainer.step import forward_backward

MARK = 77.0  # first feature of a sample whose loss goes wrong
BATCH, BAD_STEP = 16, 20


@dataclass(frozen=True)
class Case:
    fault: str  # nan_input, inf_input, loss, gradient, buffer, spike, overflow
    precision: str = "float32"
    accumulate: int = 1
    bags: bool = False  # inputs are lists of tensors of different lengths


class Bags(nn.Module):
    """The mean of each bag, then a network over the bags."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        self.seen += len(inputs)  # changes the output, so that a replay needs it
        means = torch.stack([bag.mean(0) for bag in inputs]) + 1e-4 * self.seen
        logits: Tensor = self.network(means)
        return logits


class Faulty(Classification):
    """Classification whose loss goes wrong where a marked sample is in the microbatch."""

    def __init__(self, fault: str) -> None:
        super().__init__(CrossEntropy())
        self.fault = fault

    def step(self, model: nn.Module, data: Any) -> Output:
        inputs, targets = data
        per_sample, _ = self.loss(model(inputs), targets)
        firsts = inputs[:, 0] if isinstance(inputs, Tensor) else torch.stack([bag[0, 0] for bag in inputs])
        marked = (firsts - MARK).abs() < 1  # noise is added to the inputs
        loss_sum = per_sample.sum()
        if bool(marked.any()):
            wrong = per_sample[marked].sum()
            extra = {
                "loss": (wrong - wrong).log(),
                "gradient": (0 * wrong).abs().sqrt(),
                "spike": 1e6 * wrong,
                "overflow": 1e4 * wrong,
            }
            loss_sum = loss_sum + extra[self.fault]
        return Output(loss_sum, float(len(targets)))


def make(case: Case, folder: Path | None = None) -> Run:
    """A healthy run with batch normalisation, dropout and noise."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(480) % 3
    inputs: Any = torch.randn(480, 5, generator=generator) + targets[:, None]
    if case.bags:
        inputs = [row + torch.randn(2 + index % 3, 5, generator=generator) for index, row in enumerate(inputs)]
    torch.manual_seed(0)
    network: nn.Module = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    return assemble(
        Bags(network) if case.bags else network,
        Splits(train=ArrayDataset(inputs, targets), validation=ArrayDataset(inputs[:32], targets[:32])),
        epochs=2,
        batch_size=BATCH,
        accumulate=case.accumulate,
        seed=5,
        task=Faulty(case.fault),
        optimizer=partial(adamw, lr=1e-2),
        precision=partial(Precision, case.precision, initial_scale=65536.0 if case.fault == "overflow" else 64.0),
        augmentation=Noise(0.01),
        guard=Policy(spikes=True),
        tracking=partial(Tracker, progress="none"),
        folder=folder,
        settings={"case": asdict(case)},
    )


def poison(run: Run, case: Case) -> int:
    """Spoil the fourth sample of step `BAD_STEP`, in the data."""
    index = int(run.loader.order(0)[BAD_STEP * BATCH + 3])
    sample = run.loader.dataset.inputs[index]
    if case.fault in ("nan_input", "inf_input"):
        sample[..., 1] = math.nan if case.fault == "nan_input" else math.inf
    elif case.fault == "buffer":
        sample *= 1e6
    else:
        sample[..., 0] = MARK
    return index


def steps(run: Run, count: int) -> dict[str, Any] | None:
    """Train step by step; return what was measured at the first rejected one, undone and not yet counted."""
    run.model.train()
    first = run.progress.step
    for index, microbatches in enumerate(run.loader.epoch(0, first), start=first):
        if index == count:
            return None
        step = Step(epoch=0, index=index, number=run.progress.steps, microbatches=microbatches)
        run.guard.begin()
        losses = forward_backward(run, step)
        gradients = {name: sha256(p.grad) for name, p in run.model.named_parameters() if p.grad is not None}
        step.rate = set_learning_rate(run.optimizer, run.schedule(run.progress.updates))
        precision = run.precision.state_dict()
        step.verdict = run.guard.step(losses)
        if not step.verdict.applied:
            return {"step": step, "gradients": gradients, "losses": losses, "precision": precision}
        run.progress.step, run.progress.steps = index + 1, run.progress.steps + 1
        run.progress.updates += 1
    return None


def bits(value: float) -> str:
    return struct.pack(">d", value).hex()


def record(case: Case, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Train a run of this kind into its fault, and record that; return the incident and what was measured."""
    run = make(case)
    poison(run, case)
    found = steps(run, BAD_STEP + 1)
    assert found is not None, f"{case}: no step was rejected"
    step = found["step"]
    path = IncidentStore(folder).record(incident_of(run, step, precision=found["precision"]))
    assert path is not None
    facts = step.verdict.facts
    return path, {
        "reason": facts.reason,
        "detail": facts.detail,
        "loss": bits(facts.loss),
        "grad_norm": bits(facts.grad_norm),
        "losses": [bits(float(loss)) for loss in found["losses"]],
        "gradients": found["gradients"],
        "step": step.index,
    }


def replayed(folder: str) -> dict[str, Any]:
    incident = load_incident(folder)
    outcome = replay(make(Case(**incident.settings["case"])), incident)
    return {
        "reason": outcome.reason,
        "detail": outcome.detail,
        "loss": bits(outcome.loss),
        "grad_norm": bits(outcome.grad_norm),
        "losses": [bits(loss) for loss in outcome.losses],
        "gradients": outcome.gradients,
        "step": incident.position["step"],
        "reproduces": outcome.reproduces(incident),
        "differences": list(outcome.differences),
    }


if __name__ == "__main__":
    print(json.dumps([replayed(folder) for folder in sys.argv[1:]]))
