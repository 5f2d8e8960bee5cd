"""Largest resident memory of a process that trains, with the trainer against a bare loop.

python benchmarks/memory.py [--steps 40]
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def train(name: str, loop: str, steps: int) -> None:
    """Train in this process and print its peak in MiB."""
    sys.path.insert(0, str(HERE))
    import torch
    from throughput import bare, ours
    from workloads import workloads

    torch.set_num_threads(1)
    load = workloads()[name]
    with tempfile.TemporaryDirectory() as folder:
        run = bare(load) if loop == "bare" else ours(load, Path(folder, "run"))
        epoch = len(load.inputs) // load.batch_size
        run(-(-steps // epoch) * epoch)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    """Run one process for each loop and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--child", nargs=2, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        train(*arguments.child, arguments.steps)
        return
    for name in ("transformer", "lstm", "digits"):
        peaks = {}
        for loop in ("bare", "trainer"):
            command = [sys.executable, __file__, "--steps", str(arguments.steps), "--child", name, loop]
            peaks[loop] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{name}: bare {peaks['bare']:.0f} MiB, trainer {peaks['trainer']:.0f} MiB, ", end="")
        print(f"ratio {peaks['trainer'] / peaks['bare']:.3f}")


if __name__ == "__main__":
    main()
