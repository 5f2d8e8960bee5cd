"""Largest resident memory of a process that trains, with each policy of the trainer against a bare loop.

    python benchmarks/memory.py [--steps 120] [--workloads transformer lstm digits]

Beside it, exactly: the bytes of the copies that guard and rollback hold, as multiples of the model's buffers and
of the whole state (model and optimizer).
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
    from throughput import bare, ours, trainer
    from workloads import workloads

    from stabletrain.tree import tensors

    torch.set_num_threads(1)
    load = workloads()[name]
    with tempfile.TemporaryDirectory() as folder:
        run = None if loop == "bare" else trainer(load, Path(folder, "run"), loop)
        epoch = len(load.inputs) // load.batch_size
        (bare(load) if run is None else ours(run))(-(-steps // epoch) * epoch)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        if run is None:
            return

        def size(*trees: object) -> int:
            return sum(one.numel() * one.element_size() for tree in trees for one in tensors(tree))

        buffers = size(list(run.model.buffers()))
        state = size(run.model.state_dict(), run.optimizer.state_dict())
        snapshot = size(run.guard._snapshot._copies)
        back = run.rollback
        kept = [] if back is None else [back._kept, back._trial, back._memory]
        print(
            f"the guard's copy {snapshot} bytes, {snapshot / buffers if buffers else 0:.2f} times the buffers; "
            f"rollback's copies {size(*kept)} bytes, {size(*kept) / state:.2f} times the state"
        )


def main() -> None:
    """Run one process for each loop and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--workloads", nargs="+", default=["transformer", "lstm", "digits"])
    parser.add_argument("--child", nargs=2, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        train(*arguments.child, arguments.steps)
        return
    for name in arguments.workloads:
        peaks = {}
        for loop in ("bare", "skip", "salvage", "rollback"):
            command = [sys.executable, __file__, "--steps", str(arguments.steps), "--child", name, loop]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
            peaks[loop] = float(output[0])
            print(f"{name} {loop}: {peaks[loop]:.0f} MiB, {peaks[loop] / peaks['bare']:.3f} of bare; {output[1:]}")


if __name__ == "__main__":
    main()
