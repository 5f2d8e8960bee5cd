"""How well and how fast each preset trains an experiment: whole processes, one after the other.

python benchmarks/presets.py [--experiment digits] [--seeds 0 1 2 3 4] [key=value ...]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    """Run every preset with every seed and print a row for each preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="digits")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--presets", nargs="+", default=["normal", "stable", "safe"])
    arguments, overrides = parser.parse_known_args()
    print("preset: test accuracy median (min to max); seconds of the whole process median (max); rejected steps")
    for preset in arguments.presets:
        accuracies, seconds, rejected = [], [], 0
        for seed in arguments.seeds:
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "stabletrain", f"preset={preset}", f"seed={seed}", "name=run"]
                command += [f"experiment={arguments.experiment}", "tracking.progress=none", *overrides]
                start = time.perf_counter()
                subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
                seconds.append(time.perf_counter() - start)
                summary = json.loads(Path(folder, "runs", "run", "summary.json").read_text())
            accuracies.append(summary["metrics"]["test"]["accuracy"])
            rejected += summary["rejected"]
        print(
            f"{preset}: {statistics.median(accuracies):.4f} ({min(accuracies):.4f} to {max(accuracies):.4f}); "
            f"{statistics.median(seconds):.1f} s ({max(seconds):.1f} s); {rejected}",
            flush=True,
        )


if __name__ == "__main__":
    main()
