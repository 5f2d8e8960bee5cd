"""How long training stands still for a checkpoint of 100 million parameters with AdamW (1.2 GB), and loading takes.

    python benchmarks/checkpoint_stall.py [--repeats 5] [--parameters 100] [--folder /somewhere/on/the/disk]

Compared in turn, in one process, after one save of each that isn't counted (memory is asked for then):

- a durable `torch.save`: written, flushed to the disk, and its folder too;
- `CheckpointStore.save`, which sets the state aside and writes beside the training;
- `torch.distributed.checkpoint.async_save` with a thread, as it comes and with a stager that keeps its memory.

A stall is the time until the call returns and the state may be changed. Training steps go on until the checkpoint is on
disk; `durable` is that time, `steps meanwhile` what a step takes then, in units of an undisturbed one. Loading is
`CheckpointStore.load`, which verifies, against `torch.load` of the same file, both from the page cache. The ratios are
those of medians.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from stabletrain.checkpoint import CheckpointStore
from stabletrain.folder import fsync_folder

WIDTH = 2048
Saved = tuple[float, Callable[[], object]]  # seconds of the stall, and what waits until it is on disk


class Training:
    """A model whose optimizer state is as large as it gets; a step uses few samples, so saving weighs as it does."""

    def __init__(self, millions: int) -> None:
        layers = max(1, round(millions * 1e6 / WIDTH**2))
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.batch = torch.randn(8, WIDTH)
        self.step()

    def step(self) -> float:
        """Train on one batch and return the seconds that it took."""
        start = time.perf_counter()
        self.model(self.batch).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


def durable_torch_save(folder: Path, number: int, state: dict[str, Any]) -> Saved:
    """Write and flush with torch alone."""
    start = time.perf_counter()
    with (folder / f"torch{number}.pt").open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    fsync_folder(folder)
    return time.perf_counter() - start, lambda: None


def store_save(store: CheckpointStore) -> Callable[[Path, int, dict[str, Any]], Saved]:
    """Save with our store."""

    def save(folder: Path, number: int, state: dict[str, Any]) -> Saved:
        start = time.perf_counter()
        store.save(state, updates=number)
        return time.perf_counter() - start, store.wait

    return save


def dcp_save(stager: DefaultStager | None) -> Callable[[Path, int, dict[str, Any]], Saved]:
    """Save with torch's distributed checkpoints, in a thread."""

    def save(folder: Path, number: int, state: dict[str, Any]) -> Saved:
        start = time.perf_counter()
        response: Any = dcp.async_save(
            state, storage_writer=dcp.FileSystemWriter(folder / f"dcp{id(stager)}-{number}"), async_stager=stager
        )
        staged = getattr(response, "staging_completion", None)
        if staged is not None:
            staged.result()
        seconds = time.perf_counter() - start
        return seconds, getattr(response, "upload_completion", response).result

    return save


def torch_load(path: Path) -> Any:
    """Load with torch alone."""
    return torch.load(path, weights_only=True)


def finished(wait: Callable[[], object], training: Training) -> tuple[float, list[float]]:
    """Train until the checkpoint is on disk; return the seconds that it took and those of the steps."""
    done = threading.Thread(target=wait)
    start, steps = time.perf_counter(), []
    done.start()
    while done.is_alive():
        steps.append(training.step())
    return time.perf_counter() - start, steps


def main() -> None:
    """Measure in turn and print medians and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parameters", type=int, default=100, help="millions")
    parser.add_argument("--folder", default=None, help="on the disk to measure; it is left as it was")
    arguments = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    training = Training(arguments.parameters)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        measure(training, Path(name), arguments.repeats)
    dist.destroy_process_group()


def measure(training: Training, folder: Path, repeats: int) -> None:
    """Save and load in turn, and print what came out."""
    store = CheckpointStore(folder, keep_last=1)
    kept = DefaultStager(
        StagingOptions(use_pinned_memory=False, use_shared_memory=False, use_async_staging=False,
                       use_non_blocking_copy=False)
    )  # fmt: skip
    ways = {
        "torch.save, durable": durable_torch_save,
        "CheckpointStore": store_save(store),
        "async_save": dcp_save(None),
        "async_save, kept memory": dcp_save(kept),
    }
    stalls: dict[str, list[float]] = {way: [] for way in ways}
    durable: dict[str, list[float]] = {way: [] for way in ways}
    meanwhile: dict[str, list[float]] = {way: [] for way in ways}
    loads: dict[str, list[float]] = {"torch.load": [], "CheckpointStore.load": []}
    quiet = statistics.median(training.step() for _ in range(5))
    for number in range(repeats + 1):
        for way, save in ways.items():
            training.step()
            stall, wait = save(folder, number, training.state())
            seconds, steps = finished(wait, training)
            if number > 0:
                stalls[way].append(stall)
                durable[way].append(stall + seconds)
                meanwhile[way] += steps
            for path in [*folder.glob("torch*"), *folder.glob("dcp*")]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        path = store.wait()
        assert path is not None
        for way, load, argument in (
            ("torch.load", torch_load, path / "state.pt"),
            ("CheckpointStore.load", store.load, path),
        ):
            start = time.perf_counter()
            loaded = load(argument)
            if number > 0:
                loads[way].append(time.perf_counter() - start)
            del loaded
    sync = statistics.median(stalls["torch.save, durable"])
    print(f"{sum(file.stat().st_size for file in path.iterdir()) / 1e9:.2f} GB, a step alone {quiet:.3f} s")
    for way in ways:
        slow = f", steps meanwhile x {statistics.median(meanwhile[way]) / quiet:.2f}" if meanwhile[way] else ""
        print(
            f"{way:24} stall {statistics.median(stalls[way]):.3f} s (x {statistics.median(stalls[way]) / sync:.2f}), "
            f"durable after {statistics.median(durable[way]):.2f} s{slow}; all {shown(stalls[way])}"
        )
    base = statistics.median(loads["torch.load"])
    for way, values in loads.items():
        median = statistics.median(values)
        print(f"{way:24} {median:.3f} s (x {median / base:.2f}); all {shown(values)}")


def shown(values: list[float]) -> str:
    """Return the values in rising order."""
    return ", ".join(f"{value:.3f}" for value in sorted(values))


if __name__ == "__main__":
    main()
