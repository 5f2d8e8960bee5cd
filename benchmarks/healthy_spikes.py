"""How many steps of healthy runs each rule would call spikes: all experiments, presets and several batch sizes.

python benchmarks/healthy_spikes.py [--seeds 0 1 2] [--steps 1500 600 300] [--traces <folder>]

Every run is trained without any rule; losses and gradient norms are then shown to each rule in turn. With `--traces`
they are kept, and taken from there the next time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import math
import statistics
import tempfile
from collections import Counter, deque
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from stabletrain.build import build
from stabletrain.config import conf_folder, settings
from stabletrain.guard.spikes import Divergence, SpikeWindow
from stabletrain.guard.verdict import Verdict
from stabletrain.trainer import train

EXPERIMENTS = ("tabular", "sequences", "digits")
PRESETS = ("normal", "stable", "safe")
BATCH_SIZES = (2, 8, 64)
Trace = list[tuple[float, float]]  # loss and gradient norm of each step


def trace(experiment: str, preset: str, batch_size: int, seed: int, steps: int) -> Trace:
    """Train for the epochs that give at least `steps` steps, and return what each was like."""
    given = [f"experiment={experiment}", f"preset={preset}", f"batch_size={batch_size}", f"seed={seed}", "name=run"]
    given += ["guard=none", "checkpoint=none", "tracking=none"]
    found: list[Verdict] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())),
    ):
        epoch = build(settings(compose("config", overrides=given)), Path(folder, "0")).loader.steps_per_epoch
        given.append(f"epochs={-(-steps // epoch)}")
        run = build(settings(compose("config", overrides=given)), Path(folder, "1"))
        run.validation = run.test = None
        judge = run.guard.step
        run.guard.step = lambda loss: (found.append(judge(loss)), found[-1])[1]  # type: ignore[method-assign]
        train(run)
    assert all(math.isfinite(verdict.loss) and math.isfinite(verdict.grad_norm) for verdict in found)
    return [(verdict.loss, verdict.grad_norm) for verdict in found]


def ours(steps: Trace) -> Counter[str]:
    """Count what the guard would reject; a rejected step doesn't enter the window."""
    window, count = SpikeWindow(), Counter[str]()
    for loss, norm in steps:
        loss_limit, norm_limit = window.limits()
        count["gradient norm"] += norm > norm_limit
        count["loss"] += loss > loss_limit
        count["either"] += norm > norm_limit or loss > loss_limit
        if norm <= norm_limit and loss <= loss_limit:
            window.accept(loss=loss, grad_norm=norm)
    return count


def linear(steps: Trace, deviations: float = 6.0, size: int = 128, least: int = 64) -> Counter[str]:
    """Count what lies more than 6 standard deviations above the mean of the last 128 steps, from 64 on."""
    losses: deque[float] = deque(maxlen=size)
    norms: deque[float] = deque(maxlen=size)
    count = Counter[str]()
    for loss, norm in steps:
        high = []
        for name, value, past in (("loss", loss, losses), ("gradient norm", norm, norms)):
            if len(past) >= least:
                mean = math.fsum(past) / len(past)
                deviation = math.sqrt(math.fsum((item - mean) ** 2 for item in past) / (len(past) - 1))
                high.append(value > mean + deviations * deviation)
                count[name] += high[-1]
            past.append(value)
        count["either"] += any(high)
    return count


def diverged(steps: Trace) -> Counter[str]:
    """Count steps at which the slow detector would say that the training has diverged."""
    detector = Divergence()
    count = sum(detector.observe(loss) is not None for loss, _ in steps)
    return Counter(loss=count, either=count)


RULES = {"log scale, median and MAD": ours, "mean + 6 standard deviations": linear, "divergence": diverged}


def row(name: str, rule: str, traces: list[Trace]) -> str:
    """Return a row of the table."""
    count, steps = Counter[str](), sum(map(len, traces))
    for steps_of_one in traces:
        count.update(RULES[rule](steps_of_one))
    share = f"1 in {steps / count['either']:,.0f}" if count["either"] > 0 else "none"
    by = [str(count[name]) for name in ("gradient norm", "loss", "either")]
    return f"| {rule} | {name} | {steps:,} | {' | '.join(by)} | {share} |"


def above_median(traces: list[Trace]) -> tuple[float, float]:
    """Return the largest gradient norm and the median limit, both as multiples of the recent median."""
    largest, factors = 0.0, []
    for steps in traces:
        window, recent = SpikeWindow(), deque[float](maxlen=128)
        for loss, norm in steps:
            if len(recent) >= 10:
                median = statistics.median(recent)
                largest = max(largest, norm / median)
                factors.append(window.limits()[1] / median)
            window.accept(loss=loss, grad_norm=norm)
            recent.append(norm)
    return largest, statistics.median(factors)


def main() -> None:
    """Train every combination and print a table of what each rule says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", nargs=3, type=int, default=[1500, 600, 300], help="least, for batch 2, 8 and 64")
    parser.add_argument("--traces", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    traces: dict[int, list[Trace]] = {size: [] for size in BATCH_SIZES}
    for size, steps in zip(BATCH_SIZES, arguments.steps, strict=True):
        for experiment, preset, seed in itertools.product(EXPERIMENTS, PRESETS, arguments.seeds):
            kept = arguments.traces and arguments.traces / f"{experiment}-{preset}-{size}-{seed}-{steps}.pt"
            if kept is not None and kept.exists():
                found = [tuple(pair) for pair in torch.load(kept, weights_only=True).tolist()]
            else:
                found = trace(experiment, preset, size, seed, steps)
                if kept is not None:
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    torch.save(torch.tensor(found, dtype=torch.float64), kept)
            traces[size].append(found)
    print("| rule | batch size | steps | gradient norm | loss | either | share |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for rule in RULES:
        for size in BATCH_SIZES:
            print(row(str(size), rule, traces[size]))
        print(row("all", rule, [item for group in traces.values() for item in group]))
    for size in BATCH_SIZES:
        largest, limit = above_median(traces[size])
        print(f"batch {size}: gradient norms reach {largest:.0f} x the recent median; the limit lies at {limit:.0f} x")


if __name__ == "__main__":
    main()
