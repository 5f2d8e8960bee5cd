"""Every fault under every policy in every experiment: survived, finite, what it cost, and whether the culprit is named.

    python benchmarks/fault_table.py [--experiments tabular] [--faults kill] [--policies skip raise] [--keep FOLDER]

Each run is a process of its own, which behaves as the command line does; they are forked, so that starting costs
little. The cost is that in validation accuracy, with the last weights, against the same run without a fault, in points.
A killed run is started again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stabletrain.__main__ import main as stabletrain
from stabletrain.build import build  # imported before the forks
from stabletrain.trainer import train

assert build and train
EPOCHS = {"digits": 4, "tabular": 10, "sequences": 6}  # 156, 120 and 114 steps
AT, SAMPLES = 59, 2  # a checkpoint is due after this step
POLICIES = ("none", "raise", "skip", "salvage", "rollback")
# What the run's last lines or its log must say for the culprit to be named; None: the samples themselves.
NAMED: dict[str, str | None] = {
    "nan_input": None,
    "inf_input": None,
    "nan_label": None,
    "nan_loss": r"loss is nan",
    "nan_gradient": r"gradient of \S+",
    "spike": r"above [\d.e+]+, the limit from recent",
    "nan_buffer": r"buffer \S+",
    "fp16_overflow": r"overflow",
    "nan_weight": r"parameter \S+",
    "nan_validation": r"validation is not finite",
    "kill": r"",
    "disk_full": r"not written|can't be written",
}


@dataclass(kw_only=True)
class Outcome:
    """How one run ended."""

    code: int
    finite: bool
    accuracy: float | None  # on the validation data with the last weights; None: it was never measured
    said: str
    quarantined: list[int]


def run(folder: Path, *given: str) -> Outcome:
    """Run the command line in a forked process, in `folder`."""
    output = folder / "output.txt"
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        code = 1
        try:
            code = stabletrain(["name=run", "tracking.tensorboard=false", *given])
        finally:
            sys.stdout.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    path = folder / "runs" / "run" / "summary.json"
    summary: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return Outcome(
        code=os.waitstatus_to_exitcode(status),
        finite=bool(summary.get("finite")) and all(summary["finite"].values()),
        accuracy=summary.get("metrics", {}).get("final", {}).get("accuracy"),
        said=output.read_text(errors="replace"),
        quarantined=summary.get("quarantined", []),
    )


def cell(fault: str, policy: str, experiment: str, healthy: Outcome, folder: Path) -> str:
    """Rehearse one fault, and describe how it went in a few words."""
    given = overrides(fault, policy, experiment)
    found = run(folder, *given, f"fault={fault}", f"fault.at={AT}", *samples(fault))
    if fault == "kill":
        found = run(folder, *given, f"fault={fault}", f"fault.at={AT}")
    if found.code == 2:
        return "-"
    words = ["ok" if found.code == 0 else f"exit {found.code}"]
    if not found.finite:
        words.append("not finite")
    if found.code == 0 and found.accuracy is not None and healthy.accuracy is not None:
        words.append(f"{100 * (found.accuracy - healthy.accuracy):+.1f}")
    if fault != "kill":  # it was dead at once, and can't say anything
        words.append(culprit(fault, found))
    return ", ".join(words)


def culprit(fault: str, found: Outcome) -> str:
    """Say whether the run named what was wrong: the samples, the step that held them, the place, or nothing."""
    pattern = NAMED[fault]
    if pattern is not None:
        return "named" if re.search(pattern, found.said) else "unnamed"
    if len(found.quarantined) == SAMPLES or "NaN or Inf in the data of" in found.said:
        return "named"
    return "its batch" if re.search(r"amples:? \[?\d", found.said) else "unnamed"


def samples(fault: str) -> list[str]:
    """How many samples are bad, where the fault is about samples."""
    return [f"fault.samples={SAMPLES}"] if NAMED[fault] is None else []


def overrides(fault: str, policy: str, experiment: str) -> list[str]:
    """Return what the run and the healthy one have in common."""
    precision = "fp16" if fault == "fp16_overflow" else "fp32"
    return [f"experiment={experiment}", f"guard={policy}", f"epochs={EPOCHS[experiment]}", f"precision={precision}",
            "base_lr=1e-3" if experiment == "digits" else "seed=0", "checkpoint_every_updates=20"]  # fmt: skip


def main() -> None:
    """Run all of them and print a table for each experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", nargs="+", default=list(EPOCHS))
    parser.add_argument("--faults", nargs="+", default=list(NAMED))
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--keep", type=Path, help="folder in which the runs are kept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        place = arguments.keep.absolute() if arguments.keep is not None else Path(temporary)
        for experiment in arguments.experiments:
            print(f"\n| {experiment} | {' | '.join(arguments.policies)} |")
            print("| --- " * (1 + len(arguments.policies)) + "|", flush=True)
            healthy: dict[tuple[str, str], Outcome] = {}
            for fault in arguments.faults:
                row = []
                for policy in arguments.policies:
                    kind = ("fp16" if fault == "fp16_overflow" else "fp32", policy)
                    if kind not in healthy:
                        folder = place / experiment / f"healthy-{kind[0]}-{policy}"
                        folder.mkdir(parents=True)
                        healthy[kind] = run(folder, *overrides(fault, policy, experiment))
                        assert healthy[kind].code == 0, healthy[kind].said
                    folder = place / experiment / f"{fault}-{policy}"
                    folder.mkdir(parents=True)
                    row.append(cell(fault, policy, experiment, healthy[kind], folder))
                print(f"| `{fault}` | {' | '.join(row)} |", flush=True)
            print("healthy accuracy: " + ", ".join(f"{k} {v.accuracy}" for k, v in healthy.items()), file=sys.stderr)


if __name__ == "__main__":
    main()
