"""An experiment under each preset, its rehearsals, a library's baseline and the loop people write, side by side.

    python benchmarks/experiments.py direction [--seeds 0 1 2] [--presets normal stable safe] [--set KEY=VALUE ...]

Each run is `python -m stabletrain +experiment=<name> +preset=<preset>` in a process of its own, whose time and peak
memory are the operating system's. Rehearsals, and the loop written by hand, take the preset `stable`. What was measured
goes to docs/experiments/<name>.json, the plot to docs/experiments/<name>.png, the table to the console. What was
measured before under the same words isn't measured again (--again: it is).

Another experiment adds a line to EXPERIMENTS, and its baselines if it has any.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "experiments"


@dataclass(frozen=True)
class Rehearsal:
    """A failure made on purpose, under the preset stable.

    Args:
        overrides: on the command line.
        naive: whether the loop written by hand meets it too.
    """

    overrides: tuple[str, ...]
    naive: bool = True


@dataclass(frozen=True)
class Experiment:
    """What is measured of an experiment.

    Args:
        metric: of the test part, the larger the better.
        baselines: by what they are called; from the data's parts and a seed to that metric.
        also: further metrics of the test part, for the table.
        chance: name of the test metric that a constant answer reaches, or None.
        rehearsals: by name.
    """

    metric: str
    baselines: dict[str, Callable[[Any, int], dict[str, float]]] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    chance: str | None = None
    rehearsals: dict[str, Rehearsal] = field(default_factory=dict)


def boosted_statistics(splits: Any, seed: int) -> dict[str, float]:
    """Gradient boosting on mean, deviation, last value and slope of each column in a window."""
    import torch
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

    def table(part: Any) -> tuple[Any, Any]:
        windows, targets = part.gather(torch.arange(len(part)))
        time_axis = torch.linspace(-1, 1, windows.shape[1]).view(1, -1, 1)
        columns = [windows.mean(1), windows.std(1), windows[:, -1], (windows * time_axis).mean(1)]
        return torch.cat(columns, 1).numpy(), targets.numpy()

    model = HistGradientBoostingClassifier(max_iter=100, class_weight="balanced", random_state=seed)
    model.fit(*table(splits.train))
    features, real = table(splits.test)
    answers = model.predict(features)
    return {
        "macro_f1": float(f1_score(real, answers, average="macro")),
        "balanced_accuracy": float(balanced_accuracy_score(real, answers)),
        "accuracy": float(accuracy_score(real, answers)),
    }


def placed(scores: Any, part: Any, targets: Any) -> dict[str, float]:
    """Return what `task=next_item` reports for scores [samples, items] that were counted in training."""
    import torch
    from torch import nn

    from stabletrain.data import ArrayDataset, OrderedLoader
    from stabletrain.loss import CrossEntropy
    from stabletrain.task import NextItem

    task = NextItem(CrossEntropy(), class_counts=torch.bincount(targets, minlength=scores.shape[1]).tolist())
    return task.evaluate(nn.Identity(), OrderedLoader(ArrayDataset(scores, part.targets), batch_size=256))


def most_chosen(splits: Any, seed: int) -> dict[str, float]:
    """How often each item was chosen in training, whatever the history."""
    import torch

    train, test = splits.train, splits.test
    counts = torch.bincount(train.targets, minlength=len(train.text)).double()
    return placed(counts.expand(len(test), -1), test, train.targets)


def after_the_last(splits: Any, seed: int) -> dict[str, float]:
    """How often each item came next after the history's last item in training; among equals, how often at all."""
    import numpy as np
    import torch
    from scipy.sparse import coo_matrix

    train, test = splits.train, splits.test
    last, items = train.items[train.places - 1].numpy(), len(train.text)
    pairs = coo_matrix((np.ones(len(last)), (last, train.targets.numpy())), shape=(items, items)).tocsr()
    followed = torch.from_numpy(pairs[test.items[test.places - 1].numpy()].toarray())
    counts = torch.bincount(train.targets, minlength=items).double()
    return placed(followed + counts / (len(last) + 1), test, train.targets)


# 1 % of the training windows of `direction`: about 21; of the histories of `semantic_recommendation`: about 25.
EXPERIMENTS = {
    "direction": Experiment(
        metric="macro_f1",
        baselines={"gradient boosting": boosted_statistics},
        chance="majority_accuracy",
        rehearsals={
            "1 % NaN windows": Rehearsal(("+fault=nan_input", "fault.at=0", "fault.times=3", "fault.samples=7")),
            "fp16 overflow": Rehearsal(
                ("+fault=fp16_overflow", "fault.at=50", "fault.times=3", "precision=fp16", "accumulate=2"), naive=False
            ),
            "NaN loss": Rehearsal(("+fault=nan_loss", "fault.at=0", "fault.times=5")),
        },
    ),
    "semantic_recommendation": Experiment(
        metric="hit_rate_at_10",
        also=("mrr", "cold_hit_rate_at_10"),
        baselines={"popularity": most_chosen, "last-item co-occurrence": after_the_last},
        rehearsals={
            "1 % NaN texts": Rehearsal(("+fault=nan_input", "fault.at=0", "fault.times=25")),
            "empty histories": Rehearsal(("+fault=empty_input", "fault.at=0", "fault.times=25")),
            "projection overflows": Rehearsal(
                (
                    *("+fault=large_output", "fault.at=50", "fault.times=3"),
                    *("fault.module=text_projection", "precision=fp16"),
                ),
                naive=False,
            ),
        },
    ),
}


def command(name: str, preset: str, seed: int, overrides: tuple[str, ...], folder: str) -> dict[str, Any]:
    """Run the command in a process of its own, and return its summary with time and peak memory."""
    words = [f"+experiment={name}", f"+preset={preset}", f"seed={seed}", "name=measured", "tracking=quiet", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    start = time.perf_counter()
    with open(Path(folder) / "output.txt", "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "stabletrain", *words], cwd=folder, env=environment, stdout=output, stderr=output
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    summary = Path(folder) / "runs" / "measured" / "summary.json"
    if not summary.is_file():
        raise RuntimeError(f"{' '.join(words)} left no summary:\n{(Path(folder) / 'output.txt').read_text()[-2000:]}")
    told = json.loads(summary.read_text())
    return {
        "exit_code": process.returncode,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss / (1 << (20 if sys.platform == "darwin" else 10)),
        **{key: told[key] for key in ("status", "steps", "updates", "rejected", "salvaged", "quarantined", "reasons")},
        "test": told["metrics"].get("test", {}),
        "precision_moves": len(told["precision_moves"]),
    }


def parts_of(name: str, preset: str, seed: int, overrides: tuple[str, ...], folder: str) -> Any:
    """Build the same run here."""
    from hydra import compose, initialize_config_dir

    from stabletrain.build import build
    from stabletrain.config import conf_folder, settings

    words = [f"experiment={name}", f"preset={preset}", f"seed={seed}", *(word.removeprefix("+") for word in overrides)]
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        return build(settings(compose("config", overrides=words)), Path(folder) / "by_hand", words)


def by_hand(name: str, preset: str, seed: int, overrides: tuple[str, ...], folder: str) -> dict[str, Any]:
    """Train the same model on the same batches in the loop people write: `if torch.isnan(loss): continue`."""
    import torch
    from torch import nn

    from stabletrain.randomness import key, keyed

    run = parts_of(name, preset, seed, overrides, folder)
    run.model.train()
    number = skipped = updates = 0
    with keyed(key(seed, "by hand"), run.device):
        for epoch in range(run.epochs):
            for microbatches in run.loader.epoch(epoch):
                microbatches = run.fault.before_step(number, microbatches)
                number += 1
                for group in run.optimizer.param_groups:
                    group["lr"] = group.get("initial_lr", group["lr"])
                    group.setdefault("initial_lr", group["lr"])
                    group["lr"] *= run.schedule(updates)
                run.optimizer.zero_grad()
                bad = False
                for microbatch in microbatches:
                    data = run.augmentation(microbatch.data)
                    with run.precision.autocast():
                        output = run.task.step(run.model, data)
                    loss = run.fault.loss(number - 1, output.loss_sum) / output.weight / len(microbatches)
                    bad = bad or bool(torch.isnan(loss))
                    if not bad:
                        loss.backward()
                if bad:
                    skipped += 1
                    continue
                nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
                run.optimizer.step()
                updates += 1
    test = run.task.evaluate(run.model, run.test)
    return {"status": "completed", "steps": number, "updates": updates, "skipped": skipped, "test": test}


def measured(kind: str, name: str, preset: str, seed: int, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Measure one thing in a folder that is removed afterwards."""
    folder = tempfile.mkdtemp(prefix="experiments-")
    try:
        if kind == "command":
            return command(name, preset, seed, overrides, folder)
        # In a process of its own, too: these train in it.
        words = [sys.executable, __file__, "--one", json.dumps([kind, name, preset, seed, list(overrides), folder])]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{kind} of {name} failed:\n{done.stderr[-2000:]}")
        return dict(json.loads(done.stdout.splitlines()[-1]))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def one(kind: str, name: str, preset: str, seed: int, overrides: list[str], folder: str) -> dict[str, Any]:
    """Do in this process what `measured` asked another one for."""
    logging.disable(logging.WARNING)
    if kind == "by hand":
        return by_hand(name, preset, seed, tuple(overrides), folder)
    run = parts_of(name, preset, seed, tuple(overrides), folder)
    validation = run.validation.dataset if run.validation is not None else None
    splits = argparse.Namespace(train=run.loader.dataset, validation=validation, test=run.test.dataset)
    start = time.perf_counter()
    test = EXPERIMENTS[name].baselines[kind](splits, seed)
    return {"status": "completed", "seconds": time.perf_counter() - start, "test": test}


def plan(name: str, presets: list[str], extra: tuple[str, ...]) -> dict[str, tuple[str, str, tuple[str, ...]]]:
    """Return what is to be measured: label -> (kind, preset, overrides)."""
    experiment = EXPERIMENTS[name]
    wanted: dict[str, tuple[str, str, tuple[str, ...]]] = {preset: ("command", preset, extra) for preset in presets}
    wanted |= {baseline: (baseline, "stable", extra) for baseline in experiment.baselines}
    wanted["by hand"] = ("by hand", "stable", extra)
    for label, rehearsal in experiment.rehearsals.items():
        wanted[f"stable, {label}"] = ("command", "stable", (*extra, *rehearsal.overrides))
        if rehearsal.naive:
            wanted[f"by hand, {label}"] = ("by hand", "stable", (*extra, *rehearsal.overrides))
    return wanted


def spread(values: list[float], scale: float = 1.0, digits: int = 1) -> str:
    """Return median and range."""
    values = [scale * value for value in values]
    if any(math.isnan(value) for value in values):
        return "NaN"
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(name: str, found: dict[str, dict[str, Any]]) -> str:
    """Return a table in Markdown."""
    experiment = EXPERIMENTS[name]
    metrics = (experiment.metric, *experiment.also)
    lines = [
        f"| run |{''.join(f' {metric}, % |' for metric in metrics)}"
        " rejected | salvaged | culprits named | wall s | CPU s | peak MB |",
        f"| --- |{' --- |' * len(metrics)} --- | --- | --- | --- | --- | --- |",
    ]
    for label, by_seed in found.items():
        rows = list(by_seed.values())
        told = all("rejected" in row for row in rows)
        cells = [
            label,
            *(spread([row["test"].get(metric, math.nan) for row in rows], 100) for metric in metrics),
            spread([row["rejected"] for row in rows], digits=0)
            if told
            else spread([row["skipped"] for row in rows], digits=0) + " skipped"
            if "skipped" in rows[0]
            else "",
            spread([row["salvaged"] for row in rows], digits=0) if told else "",
            spread([len(row["quarantined"]) for row in rows], digits=0) if told else "",
            spread([row["seconds"] for row in rows], digits=0) if "seconds" in rows[0] else "",
            spread([row["cpu_seconds"] for row in rows], digits=0) if "cpu_seconds" in rows[0] else "",
            spread([row["peak_mb"] for row in rows], digits=0) if "peak_mb" in rows[0] else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if experiment.chance is not None:
        first = next(iter(found.values())).values()
        share = spread([row["test"].get(experiment.chance, math.nan) for row in first], 100)
        lines.append(f"\nAlways the most frequent class: accuracy {share} %.")
    return "\n".join(lines)


def plot(name: str, found: dict[str, dict[str, Any]], file: Path) -> None:
    """Draw every run's metric as a dot and the medians as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metric = EXPERIMENTS[name].metric
    figure, axes = pyplot.subplots(figsize=(7.5, 0.8 + 0.36 * len(found)), layout="constrained")
    for place, by_seed in enumerate(found.values()):
        values = [row["test"].get(metric, math.nan) for row in by_seed.values()]
        known = [100 * value for value in values if not math.isnan(value)]
        if known:
            axes.barh(place, statistics.median(known), color="#9ecae1", height=0.7)
            axes.plot(known, [place] * len(known), "o", color="#08519c", markersize=4)
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set_xlabel(f"{metric} on the test part, % (bar: median, dot: a seed)")
    axes.set_xlim(0, 100)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Measure what isn't known yet, write it down, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", choices=sorted(EXPERIMENTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--presets", nargs="+", default=["normal", "stable", "safe"])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; times are meaningful with 1 only")
    parser.add_argument("--set", nargs="*", default=[], help="overrides for every run, such as epochs=3")
    parser.add_argument("--only", nargs="*", help="labels to measure; by default all")
    parser.add_argument("--again", action="store_true", help="measure what was measured before, too")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(one(*json.loads(arguments.one))))
        return
    if arguments.experiment is None:
        parser.error(f"which experiment? {', '.join(sorted(EXPERIMENTS))}")
    name = arguments.experiment
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / f"{name}.json"
    known = json.loads(file.read_text()) if file.is_file() and not arguments.again else {}
    wanted = plan(name, arguments.presets, tuple(arguments.set))
    found: dict[str, dict[str, Any]] = {
        label: known.get(label, {}) for label in wanted if arguments.only is None or label in arguments.only
    }

    def measure(job: tuple[int, str]) -> None:
        seed, label = job
        kind, preset, overrides = wanted[label]
        found[label][str(seed)] = measured(kind, name, preset, seed, overrides)
        row = found[label][str(seed)]
        print(f"{label}, seed {seed}: {row['status']}, {row['test']}", flush=True)
        file.write_text(
            json.dumps({**known, **{label: rows for label, rows in found.items() if rows}}, indent=1) + "\n"
        )

    jobs = [(seed, label) for seed in arguments.seeds for label in found if str(seed) not in found[label]]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(measure, jobs))
    shown = {label: {**known, **found}.get(label, {}) for label in wanted}
    shown = {label: rows for label, rows in shown.items() if rows}
    print(table(name, shown))
    plot(name, shown, arguments.out / f"{name}.png")


if __name__ == "__main__":
    main()
