"""Steps of our own experiments, under each preset: healthy, so that the doctor has to say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from composed import checked
from stabletrain.build import build
from stabletrain.config import option_names
from stabletrain.trainer import train

from .case import Built

EXPERIMENTS, PRESETS = option_names("experiment"), ("normal", "stable", "safe")
SMALL = {
    "sequences": ["data.samples=300"],
    "bags": ["data.bags=200"],
    "clustering": ["model.heads=2", "data.neighbours=10"],
    "text": ["data.samples=200"],
    "direction": ["data.rows=3000", "batch_size=32", "data.in_features=10", "data.sequence=20"],
    "recommendation": ["data.users=100", "data.items=80", "batch_size=128"],
    "semantic_recommendation": ["data.users=40", "data.items=60", "batch_size=8", "accumulate=1"],
}


def step_of(experiment: str, preset: str, seed: int, folder: Path) -> Built:
    """A step after one epoch of training, in the run's own precision, with its augmentation and its loss scale."""
    words = [f"experiment={experiment}", f"preset={preset}", f"seed={seed}", "epochs=1", "warmup_epochs=0.1"]
    words += ["device=cpu", "tracking=none", "checkpoint=none", *SMALL.get(experiment, [])]
    run = build(checked(*words), folder, words)
    train(run)

    def loss(model: nn.Module, data: Any) -> Tensor:
        with run.precision.autocast():
            output = run.task.step(model, run.augmentation(data))
        return run.precision.scale(output.loss_sum / output.weight)

    [microbatch] = next(iter(run.loader.epoch(1, 0, frozenset())))
    return Built(run.model.train(), loss, microbatch.data, [])
