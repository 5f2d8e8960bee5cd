"""The command under torchrun: real processes, one folder, signals, and a rank that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from processes import ENVIRONMENT, started

LIMIT = 150.0  # seconds for a launch
DATA = ["experiment=tabular", "epochs=3", "batch_size=16", "log_every=1", "tracking.tensorboard=false"]
COMMAND = [*DATA, "preset=stable", "parallel=ddp", "checkpoint_every_updates=5"]


@contextmanager
def launched(folder: Path, words: Sequence[str], *options: str) -> Iterator[subprocess.Popen[str]]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    surroundings = {name: value for name, value in ENVIRONMENT.items() if name not in ("RANK", "WORLD_SIZE")}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with started([*torchrun, "-m", "stabletrain", *words], folder, surroundings, **output) as process:
        yield process


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=LIMIT)
    return process.returncode, said


def run(folder: Path, words: Sequence[str], *options: str) -> tuple[int, str]:
    with launched(folder, words, *options) as process:
        return finish(process)


def workers(process: subprocess.Popen[str]) -> list[int]:
    """Return the process numbers of the ranks, in their order."""
    children = [(child.environ().get("RANK"), child.pid) for child in psutil.Process(process.pid).children()]
    return [number for _, number in sorted((int(rank), number) for rank, number in children if rank is not None)]


def wait_for_checkpoint(folder: Path, updates: int) -> None:
    """Wait until a checkpoint of so many updates or more is there."""
    end = time.monotonic() + LIMIT
    while not any(int(path.name[5:14]) >= updates for path in folder.glob("checkpoints/step_*")):
        assert time.monotonic() < end, f"no checkpoint of {updates} updates in {folder}"
        time.sleep(0.02)


def tables(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("history.csv", "steps.csv")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    code, said = run(folder, COMMAND)
    assert code == 0, said
    return folder


def test_all_ranks_share_one_folder_and_one_of_them_speaks(undisturbed: Path) -> None:
    [run_folder] = (undisturbed / "runs").iterdir()
    assert run_folder.name.startswith("tabular-stable-")
    summary = json.loads((run_folder / "summary.json").read_text())
    assert (summary["status"], summary["rejected"]) == ("completed", 0)
    assert len((run_folder / "history.csv").read_text().splitlines()) == 4


def test_a_signal_at_one_rank_saves_once_and_ends_all(undisturbed: Path, tmp_path: Path) -> None:
    words = [*COMMAND, "name=stopped"]
    with launched(tmp_path, words) as process:
        wait_for_checkpoint(tmp_path / "runs/stopped", 5)
        os.kill(workers(process)[1], signal.SIGTERM)
        code, said = finish(process)
    assert code != 0
    assert said.count("SIGTERM (at process 1)") == 1, said
    assert said.count("exitcode  : 75") + said.count("exitcode: 75") >= 1, said
    summary = json.loads((tmp_path / "runs/stopped/summary.json").read_text())
    assert summary["status"] == "interrupted"

    code, said = run(tmp_path, words)
    assert code == 0, said
    [whole] = (undisturbed / "runs").iterdir()
    assert tables(tmp_path / "runs/stopped") == tables(whole)


def test_a_rank_that_is_killed_costs_no_more_than_the_way_from_the_last_checkpoint(
    undisturbed: Path, tmp_path: Path
) -> None:
    with launched(tmp_path, COMMAND, "--max-restarts", "2") as process:
        end = time.monotonic() + LIMIT
        while not list(tmp_path.glob("runs/*/checkpoints/step_*")):
            assert time.monotonic() < end
            time.sleep(0.02)
        os.kill(workers(process)[1], signal.SIGKILL)
        code, said = finish(process)
    assert code == 0, said
    [run_folder] = (tmp_path / "runs").iterdir()  # the same one after the restart
    [whole] = (undisturbed / "runs").iterdir()
    assert tables(run_folder) == tables(whole)
    assert json.loads((run_folder / "summary.json").read_text())["status"] == "completed"


def test_what_cannot_be_is_told_once(tmp_path: Path) -> None:
    code, said = run(tmp_path, [*DATA, "parallel=none"])
    assert code != 0
    assert said.count("parallel=none under a launcher with 2 processes") == 1, said
    assert not (tmp_path / "runs").exists()
