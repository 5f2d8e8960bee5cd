"""How well the doctor does on the catalogue of causes, beside torch's anomaly detection and hooks on modules.

    python benchmarks/catalogue.py [--seeds 0 1 2]

Each case is a small model that goes wrong in a known way (`tests/catalogue`). Anomaly detection is read as a person
would: the operation and the innermost line of the case's file in what it prints. Of the hooks, the first module whose
output isn't finite counts as right where the guilty line stands in its class. `time` is that of a traced step over a
plain one.
"""

from __future__ import annotations

import argparse
import inspect
import io
import itertools
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from catalogue.case import Built, Case, guilty_lines, right_operation
from catalogue.collection import CASES, HEALTHY
from catalogue.experiments import EXPERIMENTS, PRESETS, step_of
from catalogue.judge import judged
from stabletrain import diagnose
from stabletrain.doctor.trace import trace
from stabletrain.incident.statistics import named_tensors


def anomaly_detection(case: Case, built: Built) -> tuple[bool, bool]:
    """Whether it names the right operation, and the right line."""
    said, error = io.StringIO(), ""
    try:
        with redirect_stderr(said), warnings.catch_warnings(record=True) as caught, torch.autograd.detect_anomaly():
            warnings.simplefilter("always")
            built.loss(built.model, built.batch).backward()
    except RuntimeError as raised:
        error = str(raised)
    operation = re.search(r"Function '(\w+?)' returned", error)
    text = said.getvalue() + "".join(str(one.message) for one in caught)
    file, lines = guilty_lines(case)
    places = [int(line) for name, line in re.findall(r'File "(.+?)", line (\d+)', text) if name == file]
    return operation is not None and right_operation(case, operation[1]), bool(places) and places[-1] in lines


def module_hooks(case: Case, built: Built) -> bool:
    """Whether the guilty line is in the class of the first module whose output isn't finite."""
    bad: list[nn.Module] = []

    def look(module: nn.Module, _: object, output: object) -> None:
        if any(bool((~torch.isfinite(tensor)).any()) for _, tensor in named_tensors(output)):
            bad.append(module)

    handles = [module.register_forward_hook(look) for module in built.model.modules()]
    try:
        built.loss(built.model, built.batch)
    finally:
        for handle in handles:
            handle.remove()
    if not bad:
        return False
    try:
        text, first = inspect.getsourcelines(type(bad[0]))
    except (OSError, TypeError):
        return False
    file, lines = guilty_lines(case)
    return inspect.getsourcefile(type(bad[0])) == file and any(first <= line < first + len(text) for line in lines)


def slower(built: Built) -> float:
    """By what factor the trace slows a step, in processor time, which other programs hardly change."""

    def step() -> list[torch.Tensor]:
        loss = built.loss(built.model, built.batch)
        loss.backward()
        return [loss.detach()]

    def seconds(run: Callable[[], object]) -> float:
        begun = time.process_time()
        run()
        return time.process_time() - begun

    pairs = [(seconds(step), seconds(lambda: trace(step, [built.model], named_tensors(built.batch)))) for _ in range(7)]
    return statistics.median(traced for _, traced in pairs) / statistics.median(plain for plain, _ in pairs)


def alarms(healthy: list[Built]) -> str:
    """Return how many of these steps the doctor takes for bad ones."""
    wrong = sum(diagnose(built.model, built.loss, built.batch).cause is not None for built in healthy)
    return f"{wrong} false alarms in {len(healthy)}"


def mark(right: int, of: int) -> str:
    """Return how many of the seeds are right."""
    return "yes" if right == of else "no" if right == 0 else f"{right} of {of}"


def main() -> None:
    """Print the table, then the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    names = {name: name for name in ("operation", "line", "samples", "cause")}
    names |= {"sure and wrong": "sure_and_wrong", "a remedy holds": "cured"}
    others = ["anomaly: operation", "anomaly: line", "hooks: module"]
    totals, factors = dict.fromkeys([*names, *others], 0), []
    print(f"| case | {' | '.join([*names, *others])} | time |\n|{' --- |' * (len(names) + len(others) + 2)}")
    for case in CASES:
        counts = dict.fromkeys([*names, *others], 0)
        for seed in seeds:
            answers = judged(case, seed)
            for name, answer in names.items():
                counts[name] += getattr(answers, answer)
            operation, line = anomaly_detection(case, case.build(seed))
            found = dict(zip(others, (operation, line, module_hooks(case, case.build(seed))), strict=True))
            for name, value in found.items():
                counts[name] += value
        factors.append(slower(case.build(seeds[0])))
        marks = [mark(count, len(seeds)) for count in counts.values()]
        print(f"| {case.name} | {' | '.join(marks)} | {factors[-1]:.1f} |")
        totals = {name: totals[name] + count for name, count in counts.items()}
    tried = len(CASES) * len(seeds)
    shares = ", ".join(f"{name} {count} of {tried}" for name, count in totals.items())
    print(f"\n{len(CASES)} cases x {len(seeds)} seeds: {shares}")
    usual = statistics.median(factors)
    print(f"a traced step takes {usual:.1f} times as long ({min(factors):.1f} to {max(factors):.1f})")
    print(f"healthy controls: {alarms([case.build(seed) for case in HEALTHY for seed in seeds])}")
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        runs = list(itertools.product(EXPERIMENTS, PRESETS, seeds))
        steps = [step_of(*one, Path(folder, str(number))) for number, one in enumerate(runs)]
    print(f"our experiments with each preset: {alarms(steps)}")


if __name__ == "__main__":
    main()
