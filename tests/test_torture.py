"""The torture of checkpoints, in small; `python benchmarks/torture.py` does it in full."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from processes import run

PROGRAM = Path(__file__).resolve().parents[1] / "benchmarks" / "torture.py"


def test_nothing_is_lost() -> None:
    command = [sys.executable, str(PROGRAM), "--runs", "4", "--saves", "2", "--regions", "24", "--truncations", "6"]
    done = run(command)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {what: int(count) for what, count in re.findall(r"\| ([\w ]+ \| [\w ]+) \| (\d+) \|", done.stdout)}
    assert found["killed | kills"] >= found["killed | runs"] == 4
    assert found["killed | runs killed in a save"] >= 2
    assert found["killed | torn"] == found["killed | runs that differ"] == 0
    assert found["full disk | saves refused"] >= 2
    assert found["full disk | looks at earlier ones"] > 0
    assert found["full disk | earlier ones lost"] == found["full disk | runs that differ"] == 0
    assert found["damaged | flips found"] == found["damaged | regions flipped"] >= 24
    assert found["damaged | truncations found"] == found["damaged | truncations"] == 6
