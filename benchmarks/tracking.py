"""What the tracker costs: a step that is not logged, and one that is, with table and TensorBoard on.

python benchmarks/tracking.py
"""

from __future__ import annotations

import statistics
import tempfile
import time

from stabletrain.state import Progress
from stabletrain.tracking import Tracker


def main() -> None:
    """Time 2,000 steps of each kind, seven times, and print the medians in microseconds."""
    with tempfile.TemporaryDirectory() as folder:
        tracker = Tracker(folder, progress="none", log_every=10)
        tracker.begin({}, {}, None, Progress())
        for logged in (False, True):
            numbers = [steps for steps in range(20_000) if tracker.wants(steps) == logged][:2000]
            rows = [
                {"epoch": 0, "step": n, "steps": n, "updates": n, "loss": 0.5, "grad_norm": 1.0, "lr": 1e-3,
                 "applied": True, "reason": None}
                for n in numbers
            ]  # fmt: skip
            turns = []
            for _ in range(7):
                start = time.perf_counter()
                for row in rows:
                    tracker.step(row)
                turns.append((time.perf_counter() - start) / len(rows) * 1e6)
            print(f"{'logged' if logged else 'not logged'}: {statistics.median(turns):.2f} microseconds a step")
        tracker.close()


if __name__ == "__main__":
    main()
