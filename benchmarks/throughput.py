"""How fast the trainer and the guard are, against loops without them: ratios of medians, interleaved in one process.

    python benchmarks/throughput.py [--pairs 15] [--seconds 1.0] [--workloads transformer lstm digits mlp]

Every loop trains the same model on the same data for the same number of steps, in turn, each time in another order.
A ratio above 1 means that stabletrain is faster.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent))

from workloads import MeanLoss, Workload, workloads

from stabletrain.assembly import assemble
from stabletrain.guard import Policy, StepGuard
from stabletrain.optimizer import adamw
from stabletrain.tracking import Tracker
from stabletrain.trainer import Run
from stabletrain.trainer.loop import train_epoch

Loop = Callable[[int], None]  # runs so many steps


def cosine(update: int) -> float:
    """Return a factor as a schedule would."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, update / 100_000)))


def batches(load: Workload) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw batches for ever, one index operation a tensor."""
    while True:
        for rows in torch.randperm(len(load.inputs)).split(load.batch_size):
            if len(rows) == load.batch_size:
                yield load.inputs[rows], load.targets[rows]


def bare(load: Workload) -> Loop:
    """Fused AdamW, clipping and a schedule on tensors in memory; nothing is checked or logged."""
    model = load.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    data, done = batches(load), 0

    def run(steps: int) -> None:
        nonlocal done
        for _ in range(steps):
            inputs, targets = next(data)
            loss = load.loss(model(inputs), targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = 1e-4 * cosine(done)
            optimizer.step()
            optimizer.zero_grad()
            done += 1

    return run


def usual(load: Workload) -> Loop:
    """What people write: DataLoader, AdamW with its defaults, `clip_grad_norm_`, LambdaLR."""
    model = load.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
    loader = DataLoader(TensorDataset(load.inputs, load.targets), load.batch_size, shuffle=True, drop_last=True)

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from loader

    data = endless()

    def run(steps: int) -> None:
        for _ in range(steps):
            inputs, targets = next(data)
            optimizer.zero_grad()
            loss = load.loss(model(inputs), targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()

    return run


def plain(load: Workload, *, guard: str) -> Loop:
    """A plain loop with no guard, with the guard people write by hand, or with `StepGuard`; all clip."""
    model = load.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    policy = Policy(spikes=guard == "with spikes")
    ours = guard in ("StepGuard", "with spikes")
    step_guard = StepGuard(model, optimizer, max_norm=1.0, policy=policy) if ours else None
    data = batches(load)

    def run(steps: int) -> None:
        for _ in range(steps):
            inputs, targets = next(data)
            loss = load.loss(model(inputs), targets)
            if guard == "by hand" and torch.isnan(loss):
                continue
            loss.backward()
            if step_guard is not None:
                step_guard.step(loss)
                continue
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if guard == "none" or torch.isfinite(norm):
                optimizer.step()
            optimizer.zero_grad()

    return run


def trainer(load: Workload, folder: Path, guard: str = "skip") -> Run:
    """The trainer with guard, tables and TensorBoard, as it runs by default, under any policy."""
    full = guard != "skip"
    run = assemble(
        load.model(),
        load.splits(),
        epochs=1_000_000,
        batch_size=load.batch_size,
        task=MeanLoss(load.loss),
        guard=Policy(on_rejection=guard, spikes=full),  # type: ignore[arg-type]
        optimizer=partial(adamw, lr=1e-4),
        tracking=partial(Tracker, progress="none"),
        folder=folder,
    )
    run.tracker.begin({}, {}, 1_000_000, run.progress)
    if run.rollback is not None:
        run.rollback.begin(run)
    return run


def ours(run: Run) -> Loop:
    """Whole epochs of the trainer."""

    def loop(steps: int) -> None:
        for _ in range(steps // run.loader.steps_per_epoch):
            train_epoch(run)
            run.progress.epoch, run.progress.step = run.progress.epoch + 1, 0

    return loop


def compare(loops: dict[str, Loop], steps: int, pairs: int) -> dict[str, list[float]]:
    """Run every loop for `steps` steps, `pairs` times in turn, and return the seconds of each turn."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop(steps)
    order = list(loops)
    for _ in range(pairs):
        random.shuffle(order)
        for name in order:
            start = time.perf_counter()
            loops[name](steps)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(slower: list[float], faster: list[float]) -> tuple[float, float, float]:
    """Return the ratio of medians and its 95 % interval by bootstrap over the turns."""
    draws = []
    for _ in range(2000):
        rows = random.choices(range(len(slower)), k=len(slower))
        draws.append(statistics.median(slower[i] for i in rows) / statistics.median(faster[i] for i in rows))
    draws.sort()
    return statistics.median(slower) / statistics.median(faster), draws[50], draws[1949]


def python_calls(loop: Loop, steps: int) -> float:
    """Count calls of Python functions per step."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    loop(steps)
    sys.setprofile(None)
    return count / steps


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a turn")
    parser.add_argument("--workloads", nargs="+", default=["transformer", "lstm", "digits", "mlp"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    print(f"torch {torch.__version__}, 1 thread, {arguments.pairs} turns each; median seconds per step, ratios [95 %]")
    for name in arguments.workloads:
        load = workloads()[name]
        with tempfile.TemporaryDirectory() as folder:
            epoch = len(load.inputs) // load.batch_size
            whole = {"bare": bare(load), "usual": usual(load)}
            whole |= {guard: ours(trainer(load, Path(folder) / guard, guard)) for guard in ("skip", "rollback")}
            guards = {guard: plain(load, guard=guard) for guard in ("none", "by hand", "StepGuard", "with spikes")}
            step_seconds = timed(whole["bare"], epoch) / epoch
            print(f"\n{name}: {step_seconds * 1e3:.2f} ms a step")
            turns = epoch * max(1, round(arguments.seconds / step_seconds / epoch))
            report(
                compare(whole, turns, arguments.pairs),
                turns,
                {
                    "with skip against the bare loop": ("bare", "skip"),
                    "with skip against the usual loop": ("usual", "skip"),
                    "with rollback against the bare loop": ("bare", "rollback"),
                    "with rollback against skip": ("skip", "rollback"),
                },
                "speed of the trainer {}",
            )
            # Short turns, and more of them: the difference is small against the machine's drift.
            turns = max(1, round(arguments.seconds / 5 / step_seconds))
            report(
                compare(guards, turns, 5 * arguments.pairs),
                turns,
                {
                    "against no guard": ("StepGuard", "none"),
                    "against one by hand": ("StepGuard", "by hand"),
                    "and spikes against no guard": ("with spikes", "none"),
                },
                "time with StepGuard {}",
            )
            for loop_name, loop in {**whole, **guards}.items():
                print(f"  {loop_name:10s} {python_calls(loop, epoch):6.0f} calls of Python functions a step")


def timed(loop: Loop, steps: int) -> float:
    """Return the seconds of some steps, after as many to warm up."""
    loop(steps)
    start = time.perf_counter()
    loop(steps)
    return time.perf_counter() - start


def report(seconds: dict[str, list[float]], steps: int, pairs: dict[str, tuple[str, str]], sentence: str) -> None:
    """Print medians and the ratios asked for."""
    medians = ", ".join(f"{name} {statistics.median(turns) / steps * 1e3:.3f} ms" for name, turns in seconds.items())
    print(f"  {len(next(iter(seconds.values())))} turns of {steps} steps: {medians}")
    for label, (above, below) in pairs.items():
        value, low, high = ratio(seconds[above], seconds[below])
        print(f"    {sentence.format(label)}: {value:.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
