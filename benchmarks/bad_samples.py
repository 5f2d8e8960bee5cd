"""What 1 % of bad samples costs: the skip that people write, `skip` and `salvage`, against the clean run.

    python benchmarks/bad_samples.py [--seeds 0 1 2 3 4] [--epochs 30]

Digits, batch 256, 1 % of the training samples NaN. The share is that of healthy samples that took part in an update.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import time
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from stabletrain import Policy
from stabletrain.assembly import assemble
from stabletrain.data import Loader, OrderedLoader, Splits, digits
from stabletrain.loss import CrossEntropy
from stabletrain.model import ConvNet
from stabletrain.optimizer import adamw
from stabletrain.task import Classification
from stabletrain.tracking import Tracker
from stabletrain.trainer.loop import train_epoch

BATCH = 256


def network() -> nn.Module:
    """The same weights each time."""
    torch.manual_seed(0)
    return ConvNet(in_channels=1, num_classes=10, image_size=(8, 8))


def poisoned(seed: int, share: float) -> tuple[Splits, int]:
    """Digits with a share of NaN samples, and how many those are."""
    data = digits(seed=seed)
    count = round(share * len(data.train))
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    data.train.inputs[order[:count]] = math.nan
    return data, count


def by_hand(data: Splits, seed: int, epochs: int) -> tuple[nn.Module, int, list[float]]:
    """The loop people write: `if torch.isnan(loss): continue`."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    loader, used, seconds = Loader(data.train, batch_size=BATCH, seed=seed), 0, []
    for epoch in range(epochs):
        start = time.perf_counter()
        for [microbatch] in loader.epoch(epoch):
            inputs, targets = microbatch.data
            loss = F.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            if torch.isnan(loss):
                continue
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            used += len(targets)
        seconds.append(time.perf_counter() - start)
    return model, used, seconds


def trained(data: Splits, seed: int, epochs: int, guard: str) -> tuple[nn.Module, int, list[float]]:
    """The trainer with a guard; rejections and bad samples without limit, so that every policy gets to the end."""
    run = assemble(
        network(),
        Splits(train=data.train, facts=data.facts),
        epochs=epochs,
        batch_size=BATCH,
        seed=seed,
        optimizer=partial(adamw, lr=1e-3),
        schedule=lambda **_: lambda update: 1.0,
        guard=Policy(on_rejection=guard, max_rejected=10**9, max_quarantined=1.0),
        tracking=partial(Tracker, progress="none"),
    )
    run.tracker.begin({}, {}, None, run.progress)
    seconds = []
    for epoch in range(epochs):
        run.quarantine.begin_epoch()
        start = time.perf_counter()
        train_epoch(run)
        seconds.append(time.perf_counter() - start)
        run.progress.epoch, run.progress.step = epoch + 1, 0
    return run.model, run.progress.samples, seconds


def accuracy(model: nn.Module, data: Splits) -> float:
    """Test accuracy."""
    return Classification(CrossEntropy()).evaluate(model, OrderedLoader(data.test, batch_size=512))["accuracy"]


def main() -> None:
    """Run every variant with every seed and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    variants: dict[str, tuple[float, Any]] = {
        "clean": (0.0, partial(trained, guard="skip")),
        "skip by hand": (0.01, by_hand),
        "skip": (0.01, partial(trained, guard="skip")),
        "salvage": (0.01, partial(trained, guard="salvage")),
    }
    rows: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in variants}
    for seed in arguments.seeds:
        for name, (share, variant) in variants.items():
            data, bad = poisoned(seed, share)
            model, used, seconds = variant(data, seed, arguments.epochs)
            healthy = (len(data.train) - bad) // BATCH * BATCH * arguments.epochs
            rows[name].append((used / healthy, accuracy(model, data), seconds[0], statistics.median(seconds[1:])))
    print(
        "variant: share of healthy samples used, test accuracy, seconds of the first epoch and of a later one; medians"
    )
    for name, found in rows.items():
        share, right, first, later = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"{name:14s} {share:7.1%} {right:7.2%} {first:7.3f} s {later:7.3f} s")


if __name__ == "__main__":
    main()
