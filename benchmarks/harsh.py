"""What the presets buy in a harsh setting and cost in an easy one, beside the loop that people write.

    python benchmarks/harsh.py [--experiments tabular digits sequences] [--seeds 0 1 2] [--to presets.json] [epochs=20]
    python benchmarks/harsh.py --plot presets.json docs/presets.png

Harsh: the experiment's learning rate times 30, fp16, no warm-up, the inputs of 1 % of the training samples NaN. Easy:
the experiment as it is. By hand: autocast, GradScaler, a norm of 1.0, `if torch.isnan(loss): continue`, at the rate of
`normal`. Test accuracy of the last weights; seconds of training as a multiple of `normal` with the same seed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import nn

from stabletrain import UnstableTraining
from stabletrain.build import build
from stabletrain.config import conf_folder, settings
from stabletrain.fault import NanInput
from stabletrain.folder import json_text, write_whole
from stabletrain.trainer import Run, evaluate, train

PRESETS = ("normal", "stable", "safe")
BY_HAND = "by hand"
FACTOR, SHARE = 30.0, 0.01


def configured(experiment: str, preset: str, seed: int, harsh: bool, more: list[str]) -> dict[str, Any]:
    """Return the resolved settings of a run."""
    words = [f"experiment={experiment}", f"preset={preset}", f"seed={seed}", "tracking=none", "checkpoint=none"]
    words += ["device=cpu", "log_every=1000000", *more]
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        rate = float(compose("config", overrides=words).base_lr)
        if harsh:
            words += [f"base_lr={FACTOR * rate}", "precision=fp16", "warmup_epochs=0"]
        return settings(compose("config", overrides=words))


def poison(run: Run, seed: int) -> None:
    """Make the inputs of a share of the training samples NaN, in memory; windows share theirs, so a fault does it."""
    dataset: Any = run.loader.dataset
    count = round(SHARE * len(dataset))
    if not hasattr(dataset, "inputs"):
        run.fault = NanInput(at=0, times=1, samples=min(count, run.loader.batch_size))
        return
    for index in torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count].tolist():
        dataset.inputs[index].fill_(math.nan)


def by_hand(run: Run) -> None:
    """Train the run's model with the loop people write."""
    model, rate, dtype = run.model, run.optimizer.param_groups[0]["lr"], run.precision.dtype
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.total_steps)
    model.train()
    for epoch in range(run.epochs):
        for step, microbatches in enumerate(run.loader.epoch(epoch)):
            microbatches = run.fault.before_step(epoch * run.loader.steps_per_epoch + step, microbatches)
            optimizer.zero_grad()
            with run.precision.autocast():
                outputs = [run.task.step(model, run.augmentation(microbatch.data)) for microbatch in microbatches]
            loss = sum(output.loss_sum / output.weight for output in outputs) / len(outputs)
            if torch.isnan(loss):
                continue
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()


def trained(experiment: str, preset: str, seed: int, harsh: bool, more: list[str]) -> dict[str, Any]:
    """Train once; return how it ended, the test accuracy, the seconds and what the guard did."""
    with tempfile.TemporaryDirectory() as at, contextlib.redirect_stdout(io.StringIO()):
        run = build(
            configured(experiment, "normal" if preset == BY_HAND else preset, seed, harsh, more), Path(at, "run")
        )
        if harsh:
            poison(run, seed)
        begun, ended = time.perf_counter(), "completed"
        try:
            by_hand(run) if preset == BY_HAND else train(run)
        except UnstableTraining:
            ended = "stopped"
        seconds = time.perf_counter() - begun
        metrics = evaluate(run, run.test) if run.test is not None else {}
        if not math.isfinite(metrics["loss"]):
            ended = "NaN"
        facts = {"experiment": experiment, "preset": preset, "seed": seed, "setting": "harsh" if harsh else "easy"}
        rolled_back = run.rollback.count if run.rollback is not None else 0
        counts = {"rejected": run.guard.ledger.rejected, "salvaged": run.guard.ledger.salvaged}
        return (
            facts
            | counts
            | {"rolled_back": rolled_back, "ended": ended, "accuracy": metrics["accuracy"], "seconds": seconds}
        )


def table(rows: list[dict[str, Any]]) -> str:
    """Return the medians as a Markdown table, a row for each setting, experiment and preset."""
    lines = [
        "| setting | experiment | preset | survived | accuracy (min to max) | time | rejected, salvaged, rollbacks |"
    ]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for setting, experiment in dict.fromkeys((row["setting"], row["experiment"]) for row in rows):
        of = [row for row in rows if (row["setting"], row["experiment"]) == (setting, experiment)]
        usual = {row["seed"]: row["seconds"] for row in of if row["preset"] == "normal"}
        for preset in dict.fromkeys(row["preset"] for row in of):
            found = [row for row in of if row["preset"] == preset]
            right = [row["accuracy"] for row in found]
            factor = statistics.median(row["seconds"] / usual[row["seed"]] for row in found)
            survived = sum(row["ended"] == "completed" for row in found)
            counts = ", ".join(
                f"{statistics.median(row[what] for row in found):g}" for what in ("rejected", "salvaged", "rolled_back")
            )
            lines.append(
                f"| {setting} | {experiment} | {preset} | {survived} of {len(found)} | {statistics.median(right):.2%} "
                f"({min(right):.2%} to {max(right):.2%}) | {factor:.2f} | {counts} |"
            )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], to: str) -> None:
    """Draw the test accuracy of each seed; hollow where the run didn't survive."""
    from matplotlib import pyplot

    experiments, presets = (list(dict.fromkeys(row[name] for row in rows)) for name in ("experiment", "preset"))
    figure, axes = pyplot.subplots(2, len(experiments), figsize=(3.2 * len(experiments), 5), sharey=True, squeeze=False)
    for line, setting in enumerate(("harsh", "easy")):
        for column, experiment in enumerate(experiments):
            axis = axes[line][column]
            for row in rows:
                if (row["setting"], row["experiment"]) == (setting, experiment):
                    survived = row["ended"] == "completed"
                    place = presets.index(row["preset"])
                    axis.plot(place, row["accuracy"], "o", color=f"C{place}", fillstyle="full" if survived else "none")
            axis.set_xticks(range(len(presets)), presets)
            axis.set_title(f"{experiment}, {setting}", fontsize=10)
            axis.grid(axis="y", alpha=0.3)
        axes[line][0].set_ylabel("test accuracy")
    figure.tight_layout()
    figure.savefig(to, dpi=110)


def main() -> None:
    """Run every combination that the file doesn't hold yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", nargs="+", default=["tabular", "digits", "sequences"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--to", type=Path, default=Path("presets.json"))
    parser.add_argument("--plot", nargs=2, metavar=("JSON", "PNG"))
    arguments, more = parser.parse_known_args()
    if arguments.plot:
        plot(json.loads(Path(arguments.plot[0]).read_text()), arguments.plot[1])
        return
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    rows: list[dict[str, Any]] = json.loads(arguments.to.read_text()) if arguments.to.is_file() else []
    done = {(row["experiment"], row["preset"], row["seed"], row["setting"]) for row in rows}
    for experiment in arguments.experiments:
        for harsh in (True, False):
            for seed in arguments.seeds:
                for preset in (BY_HAND, *PRESETS):
                    if (experiment, preset, seed, "harsh" if harsh else "easy") not in done:
                        rows.append(trained(experiment, preset, seed, harsh, more))
                        write_whole(arguments.to, json_text(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
