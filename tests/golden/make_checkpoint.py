"""Makes `tests/golden/checkpoint`: a checkpoint of today's format, which later versions must still load.

    python tests/golden/make_checkpoint.py

Run it when the format gets another version, and only then; the one before goes with its version.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

PLACE = Path(__file__).parent / "checkpoint"
# Numbers that every machine holds exactly, so that the data's fingerprint is the same everywhere.
ROWS = [f"{i % 7},{(i * i) % 5},{'ab'[i % 7 > 3]}" for i in range(80)]
OVERRIDES = [
    *(
        "data=csv",
        "data.path=points.csv",
        "data.target=kind",
        "data.standardize=false",
        "model=mlp",
        "model.hidden=[4]",
    ),
    *("optimizer.lr=0.01", "precision=fp32", "ema=ema", "guard=rollback", "batch_size=16", "epochs=2", "device=cpu"),
    *("tracking=none", "name=golden", "threads=1"),
]


def write_table(folder: Path) -> None:
    (folder / "points.csv").write_text("\n".join(["height,weight,kind", *ROWS]) + "\n")


def make() -> None:
    """Train in a folder of its own, and keep the first epoch's checkpoint with a copy to roll back to."""
    from composed import checked
    from stabletrain.build import build
    from stabletrain.trainer import train
    from stabletrain.trainer.resume import save

    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # so that no path of this machine gets into the file
        write_table(Path(folder))
        run = build(checked(*OVERRIDES), "run")
        run.epochs = 1
        train(run)
        shutil.rmtree("run/checkpoints")
        save(run, {"loss": 0.5, "accuracy": 0.75})
        assert run.checkpoint is not None
        path = run.checkpoint.wait()
        assert path is not None
        shutil.rmtree(PLACE, ignore_errors=True)
        shutil.copytree(path, PLACE)
        os.chdir(before)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    make()
