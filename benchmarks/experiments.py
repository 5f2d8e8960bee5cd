"""An experiment under each preset, its rehearsals, libraries' baselines and the loop people write, side by side.

    python benchmarks/experiments.py direction [--seeds 0 1 2] [--presets normal stable safe] [--set KEY=VALUE ...]
    python benchmarks/experiments.py --summary

Each run is `python -m stabletrain +experiment=<name> +preset=<preset>` in a process of its own, whose time and peak
memory are the operating system's. Rehearsals, and the loop written by hand, take the preset `stable`. What was measured
goes to docs/experiments/<name>.json, the plot to docs/experiments/<name>.png, the table into the page
docs/experiments/<name>.md. What was measured before under the same words isn't measured again (--again: it is).
`--summary` writes one table of all into docs/experiments/README.md. The seconds in it are those of `stable` on a
machine that does nothing else, measured with `--alone`.

Another experiment adds a line to EXPERIMENTS in experiment_rows.py.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from experiment_rows import EXPERIMENTS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "experiments"
Row = dict[str, Any]  # of one run
Found = dict[str, dict[str, Row]]  # label -> seed -> row


def command(name: str, preset: str, seed: int, overrides: tuple[str, ...], folder: str) -> Row:
    """Run the command in a process of its own, and return what its summary, history and process tell."""
    words = [f"+experiment={name}", f"+preset={preset}", f"seed={seed}", "name=measured", "tracking=quiet", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    memory: list[float] = []
    start = time.perf_counter()
    with open(Path(folder) / "output.txt", "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "stabletrain", *words], cwd=folder, env=environment, stdout=output, stderr=output
        )
        ended = threading.Event()
        watch = threading.Thread(target=watched, args=(process.pid, memory, ended))
        watch.start()
        _, status, usage = os.wait4(process.pid, 0)
        ended.set()
        watch.join()
        process.returncode = os.waitstatus_to_exitcode(status)
    run = Path(folder) / "runs" / "measured"
    if not (run / "summary.json").is_file():
        raise RuntimeError(f"{' '.join(words)} left no summary:\n{(Path(folder) / 'output.txt').read_text()[-2000:]}")
    told = json.loads((run / "summary.json").read_text())
    metric = f"val_{EXPERIMENTS[name].metrics[0]}"
    with open(run / "history.csv", newline="") as file:
        history = [float(row[metric]) for row in csv.DictReader(file) if row.get(metric)]
    steady = memory[len(memory) // 2 :] or [math.nan]
    return {
        "exit_code": process.returncode,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss / (1 << (20 if sys.platform == "darwin" else 10)),
        "memory_growth_mb": steady[-1] - steady[0],
        "history": [round(value, 4) for value in history],
        **{key: told[key] for key in ("status", "steps", "updates", "rejected", "salvaged", "quarantined", "finite")},
        "test": told["metrics"].get("test", {}),
        "precision_moves": len(told["precision_moves"]),
    }


def watched(process: int, memory: list[float], ended: threading.Event) -> None:
    """Note a process's resident memory, in MB, from time to time, where the system tells it."""
    page = os.sysconf("SC_PAGE_SIZE")
    while not ended.wait(0.5):
        try:
            resident = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return
        if resident > 0:
            memory.append(resident * page / (1 << 20))


def of_the_trained(name: str, preset: str, seed: int, overrides: tuple[str, ...], folder: str) -> Row:
    """Measure what a finished run's folder tells: further metrics of its model, and which samples were bad."""
    from stabletrain.checkpoint.files import checkpoint_folders, read_manifest, read_state
    from stabletrain.export import load_model

    found: Row = {}
    run = Path(folder) / "runs" / "measured"
    newest = max(map(read_manifest, checkpoint_folders(run / "checkpoints")), key=lambda one: one.updates)
    found["bad"] = read_state(newest)["fault"].get("indices", [])
    measure = EXPERIMENTS[name].measure
    if measure is not None:
        built = parts_of(name, preset, seed, overrides, folder)
        found["test"] = measure(load_model(run, model=built.model), splits_of(built))
    return found


def splits_of(run: Any) -> Any:
    """Return the data's parts."""
    return argparse.Namespace(
        train=run.loader.dataset,
        validation=run.validation.dataset if run.validation is not None else None,
        test=run.test.dataset,
    )


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
    experiment = EXPERIMENTS[name]
    if experiment.naive is not None:
        experiment.naive(run.model)
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
    if experiment.measure is not None:
        test |= experiment.measure(run.model, splits_of(run))
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in run.model.state_dict().values())
    return {
        **{"status": "completed", "steps": number, "updates": updates, "skipped": skipped, "test": test},
        "finite": {"parameters": finite},
    }


def measured(kind: str, name: str, preset: str, seed: int, overrides: tuple[str, ...]) -> Row:
    """Measure one thing in a folder that is removed afterwards."""
    folder = tempfile.mkdtemp(prefix="experiments-")
    try:
        row = command(name, preset, seed, overrides, folder) if kind == "command" else {}
        # In a process of its own, too: these train in it.
        words = [sys.executable, __file__, "--one", json.dumps([kind, name, preset, seed, list(overrides), folder])]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{kind} of {name} failed:\n{done.stderr[-2000:]}")
        told = json.loads(done.stdout.splitlines()[-1])
        return {**row, **told, "test": {**row.get("test", {}), **told.get("test", {})}}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def one(kind: str, name: str, preset: str, seed: int, overrides: list[str], folder: str) -> Row:
    """Do in this process what `measured` asked another one for."""
    logging.disable(logging.WARNING)
    given = (name, preset, seed, tuple(overrides), folder)
    if kind == "command":
        return of_the_trained(*given)
    if kind == "by hand":
        return by_hand(*given)
    splits = splits_of(parts_of(*given))
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
    """Return median and range; just the number where there is one."""
    values = [scale * value for value in values]
    bad = sum(math.isnan(value) for value in values)
    if bad:
        return "NaN" if bad == len(values) else f"NaN in {bad} of {len(values)}"
    # Adding 0 makes 0 of -0.
    ends = (round(value, digits) + 0.0 for value in (statistics.median(values), min(values), max(values)))
    middle, low, high = (f"{value:.{digits}f}" for value in ends)
    return middle if low == high else f"{middle} ({low} to {high})"


def over(rows: list[Row], key: str, digits: int = 0) -> str:
    """Return median and range of a number of each run, nothing where it isn't known."""
    return spread([row[key] for row in rows], digits=digits) if rows and all(key in row for row in rows) else ""


def scored(rows: list[Row], metric: str) -> str:
    """Return median and range of a test metric in per cent, nothing where it isn't known."""
    return spread([row["test"][metric] for row in rows], 100) if all(metric in row["test"] for row in rows) else ""


def named(row: Row) -> str:
    """Return how many of the bad samples were named, and how many others."""
    bad, told = set(row["bad"]), set(row["quarantined"])
    others = f" and {len(told - bad)} others" if told - bad else ""
    return f"{len(bad & told)} of {len(bad)}{others}" if bad or told else ""


def table(name: str, found: Found) -> str:
    """Return a table in Markdown."""
    experiment = EXPERIMENTS[name]
    columns = [f"{metric.replace('_', ' ')}, %" for metric in experiment.metrics]
    columns += ["rejected", "salvaged", "culprits named", "finite", "CPU s", "peak MB"]
    lines = ["| " + " | ".join(["run", *columns]) + " |", "| --- " * (len(columns) + 1) + "|"]
    for label, by_seed in found.items():
        rows = list(by_seed.values())
        cells = [scored(rows, metric) for metric in experiment.metrics]
        skipped = over(rows, "skipped")
        cells += [f"{skipped} skipped" if skipped else over(rows, "rejected"), over(rows, "salvaged")]
        rehearsal = experiment.rehearsals.get(label.partition(", ")[2])
        told = "quarantined" in rows[0] and (rehearsal is None or rehearsal.bad)
        cells.append("; ".join(dict.fromkeys(named(row) for row in rows)) if told else "")
        healthy = [all(row["finite"].values()) for row in rows if "finite" in row]
        cells.append(("yes" if all(healthy) else f"no in {healthy.count(False)} of {len(healthy)}") if healthy else "")
        cells += [over(rows, key) for key in ("cpu_seconds", "peak_mb")]
        lines.append("| " + " | ".join([label, *cells]) + " |")
    if experiment.chance is not None:
        first = next(iter(found.values())).values()
        share = spread([row["test"].get(experiment.chance, math.nan) for row in first], 100)
        lines.append(f"\nAlways the most frequent class: accuracy {share} %.")
    return "\n".join(lines)


def course(found: Found) -> str:
    """Return, for each preset, how the metric went on and whether memory did."""
    lines = []
    for label, by_seed in found.items():
        rows = [row for row in by_seed.values() if row.get("history")]
        if rows and "," not in label:
            first = spread([row["history"][0] for row in rows], 100)
            last = spread([statistics.median(row["history"][-max(1, len(row["history"]) // 4) :]) for row in rows], 100)
            grown = spread([row["memory_growth_mb"] for row in rows], digits=0)
            lines.append(
                f"- `{label}`: validation {first} % after the first epoch, {last} % in the last quarter; in the second "
                f"half of the time memory grew by {grown} MB."
            )
    return "\n".join(lines)


def against_healthy(name: str, found: Found) -> str:
    """Return how far each rehearsal is from the healthy run of the same seed."""
    metric = EXPERIMENTS[name].metrics[0]
    lines = []
    for label in (f"stable, {rehearsal}" for rehearsal in EXPERIMENTS[name].rehearsals):
        both = [(row, found["stable"][seed]) for seed, row in found.get(label, {}).items() if seed in found["stable"]]
        if both:
            less = spread([row["test"][metric] - healthy["test"][metric] for row, healthy in both], 100)
            lines.append(
                f"- {label}: {less} points of {metric.replace('_', ' ')} from the healthy run of the same seed."
            )
    return "\n".join(lines)


def summary(folder: Path) -> str:
    """Return one table of all experiments, a line for each."""
    columns = ["normal", "stable", "safe", "baselines", "by hand", "rehearsals under `stable`: by hand", "seconds, MB"]
    lines = ["| experiment, metric | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for name, experiment in EXPERIMENTS.items():
        file = folder / f"{name}.json"
        if not file.is_file():
            continue
        found: Found = json.loads(file.read_text())
        metric = experiment.metrics[0]

        by_label = {label: list(by_seed.values()) for label, by_seed in found.items()}
        told = {label: scored(rows, metric) for label, rows in by_label.items()}
        cells = [told.get(label, "") for label in ("normal", "stable", "safe")]
        cells.append("; ".join(f"{label} {told[label]}" for label in experiment.baselines if label in told))
        cells.append(told.get("by hand", ""))
        rehearsed = []
        for label in experiment.rehearsals:
            both = [told.get(f"{way}, {label}", "") for way in ("stable", "by hand")]
            rehearsed.append(f"{label} {': '.join(filter(None, both))}")
        cells.append("; ".join(rehearsed))
        cells.append(", ".join(over(by_label.get("alone", []), key) for key in ("seconds", "peak_mb")))
        lines.append("| " + " | ".join([f"[`{name}`]({name}.md), {metric.replace('_', ' ')}, %", *cells]) + " |")
    return "\n".join(lines)


def put(page: Path, text: str) -> None:
    """Write what was measured into a page, between the two marks for it."""
    before, begin, rest = page.read_text().partition("<!-- measured -->\n")
    _, end, after = rest.partition("<!-- end of measured -->\n")
    if not begin or not end:
        raise RuntimeError(f"{page} has no place for what was measured: <!-- measured -->, <!-- end of measured -->")
    page.write_text(f"{before}{begin}\n{text}\n\n{end}{after}")


def plot(name: str, found: Found, file: Path) -> None:
    """Draw every run's metric as a dot and the medians as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metric = EXPERIMENTS[name].metrics[0]
    figure, axes = pyplot.subplots(figsize=(7.5, 0.8 + 0.36 * len(found)), layout="constrained")
    for place, by_seed in enumerate(found.values()):
        values = [row["test"].get(metric, math.nan) for row in by_seed.values()]
        known = [100 * value for value in values if not math.isnan(value)]
        if known:
            axes.barh(place, statistics.median(known), color="#9ecae1", height=0.7)
            axes.plot(known, [place] * len(known), "o", color="#08519c", markersize=4)
        if len(known) < len(values):
            axes.text(1, place, f"NaN in {len(values) - len(known)} of {len(values)}", color="#a50f15", va="center")
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set_xlabel(f"{metric.replace('_', ' ')} on the test part, % (bar: median, dot: a seed)")
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
    parser.add_argument("--alone", action="store_true", help="measure the time of `stable`, and nothing else")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--summary", action="store_true", help="write one table of what was measured of all")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(one(*json.loads(arguments.one))))
        return
    if arguments.summary:
        put(RESULTS / "README.md", summary(arguments.out))
        return
    if arguments.experiment is None:
        parser.error(f"which experiment? {', '.join(sorted(EXPERIMENTS))}")
    name = arguments.experiment
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / f"{name}.json"
    known: Found = json.loads(file.read_text()) if file.is_file() else {}
    wanted = plan(name, arguments.presets, tuple(arguments.set))
    chosen = [label for label in wanted if arguments.only is None or label in arguments.only]
    if arguments.alone:
        wanted["alone"], chosen = wanted["stable"], ["alone"]

    def measure(job: tuple[int, str]) -> None:
        seed, label = job
        kind, preset, overrides = wanted[label]
        row = measured(kind, name, preset, seed, overrides)
        known.setdefault(label, {})[str(seed)] = row
        print(f"{label}, seed {seed}: {row['status']}, {row['test']}", flush=True)
        file.write_text(json.dumps(known, indent=1) + "\n")

    again = arguments.again
    jobs = [(s, label) for s in arguments.seeds for label in chosen if again or str(s) not in known.get(label, {})]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(measure, jobs))
    shown = {label: dict(sorted(known[label].items())) for label in wanted if label in known and label != "alone"}
    text = f"{table(name, shown)}\n\n{course(shown)}\n{against_healthy(name, shown)}"
    print(text)
    if arguments.out == RESULTS:
        put(RESULTS / f"{name}.md", text)
    plot(name, shown, arguments.out / f"{name}.png")


if __name__ == "__main__":
    main()
