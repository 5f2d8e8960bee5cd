"""From the start of a process to its first update: at sample 5,000,000 of an epoch of 10 million against at sample 0.

    python benchmarks/far_start.py [--pairs 5] [--workers 0]

A run of one epoch over 10 million samples of 4 numbers, made up when they are read. Two checkpoints of it, after update
1 and in the middle, are resumed in turn, each by a new process that ends after its first update. The bar: the far
start takes at most 3 s longer.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stabletrain.assembly import assemble
from stabletrain.checkpoint import CheckpointStore
from stabletrain.data import Splits
from stabletrain.tracking import Tracker
from stabletrain.trainer import resume, train

SAMPLES, BATCH = 10_000_000, 100


class Made(torch.utils.data.Dataset[Any]):
    """Samples that are a function of their index."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([1.0, 0.5, index % 7, index % 3]), index % 2


def run(folder: Path, workers: int = 0) -> Any:
    """Put the run together; it leaves its files in the folder and writes no table."""
    torch.manual_seed(0)
    return assemble(
        nn.Linear(4, 2), Splits(train=Made()), epochs=1, batch_size=BATCH, folder=folder, workers=workers,
        device="cpu", tracking=partial(Tracker, progress="none", tables=False, tensorboard=False),
        checkpoint=partial(CheckpointStore, asynchronous=False),
    )  # fmt: skip


def prepare(folder: Path, samples: int) -> None:
    """Leave a checkpoint of a run that has seen so many samples."""
    made = run(folder)
    made.progress.step = made.progress.steps = made.progress.updates = samples // BATCH
    resume.save(made)
    made.folder.close()


def start(folder: Path, workers: int) -> None:
    """Resume, print the position, and leave after the first update."""
    made = run(folder, workers)

    class Done(BaseException):
        """Ends the run."""

    def leave(record: Any) -> None:
        print(record["step"])
        raise Done

    made.tracker.step = leave
    try:
        train(made)
    except Done:
        return


def seconds(folder: Path, workers: int, position: int) -> float:
    """Start a process that makes one update, and return how long it took."""
    words = [sys.executable, __file__, "--start", str(folder), "--workers", str(workers)]
    begun = time.perf_counter()
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    assert int(done.stdout.split()[0]) == position, done.stdout
    return time.perf_counter() - begun


def main() -> None:
    """Measure in turn and print medians and their difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start is not None:
        start(arguments.start, arguments.workers)
        return
    with tempfile.TemporaryDirectory() as name:
        near, far = Path(name, "near"), Path(name, "far")
        prepare(near, BATCH)
        prepare(far, SAMPLES // 2)
        taken: dict[Path, list[float]] = {near: [], far: []}
        for _ in range(arguments.pairs):
            taken[near].append(seconds(near, arguments.workers, 1))
            taken[far].append(seconds(far, arguments.workers, SAMPLES // 2 // BATCH))
    medians = [statistics.median(values) for values in taken.values()]
    print(f"to the first update from sample {BATCH}: {medians[0]:.2f} s, from sample {SAMPLES // 2}: ", end="")
    print(f"{medians[1]:.2f} s, {medians[1] - medians[0]:+.2f} s")


if __name__ == "__main__":
    main()
