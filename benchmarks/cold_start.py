"""From the start of the process to the first update: stabletrain against the smallest script that does one.

    python benchmarks/cold_start.py [--pairs 10]

Both processes end at once after their first optimizer step; they run in turn, and the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time

SMALLEST = """
import os
import hydra
import torch
from sklearn.datasets import load_digits
images, labels = load_digits(return_X_y=True)
model = torch.nn.Linear(64, 10)
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
loss = torch.nn.functional.cross_entropy(model(torch.tensor(images[:32]).float()), torch.tensor(labels[:32]))
loss.backward()
optimizer.step()
os._exit(0)
"""
OURS = """
import os, runpy, sys
import torch
step = torch.optim.AdamW.step
def step_and_leave(*arguments, **options):
    step(*arguments, **options)
    os._exit(0)
torch.optim.AdamW.step = step_and_leave
sys.argv = ["stabletrain", "+preset=safe"]
runpy.run_module("stabletrain", run_name="__main__", alter_sys=False)
"""


def seconds(program: str, folder: str) -> float:
    """Run a program in an empty folder and return how long it took."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Measure in turn and print medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10)
    arguments = parser.parse_args()
    smallest, ours = [], []
    with tempfile.TemporaryDirectory() as folder:
        seconds(SMALLEST, folder), seconds(OURS, folder)
        for _ in range(arguments.pairs):
            smallest.append(seconds(SMALLEST, folder))
            ours.append(seconds(OURS, folder))
    print(f"smallest script {statistics.median(smallest):.2f} s, stabletrain {statistics.median(ours):.2f} s, ", end="")
    print(f"ratio {statistics.median(ours) / statistics.median(smallest):.2f}")


if __name__ == "__main__":
    main()
