"""Runs that are killed and started again with the same command: real processes, real signals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from processes import run, started

COMMAND = [
    *(sys.executable, "-m", "stabletrain", "+experiment=tabular", "preset=stable", "name=run", "epochs=12"),
    *("checkpoint_every_updates=5", "ema=ema", "augmentation=noise", "accumulate=2", "log_every=1"),
    *("tracking.tensorboard=false", "tracking.progress=none"),
]


@contextmanager
def training(folder: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    folder.mkdir(exist_ok=True)
    with started([*COMMAND, *more], folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        yield process


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def trained(folder: Path, *more: str) -> tuple[int, str]:
    with training(folder, *more) as process:
        return finish(process)


def wait_for_steps(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until `steps.csv` has that many rows."""
    table = folder / "runs" / "run" / "steps.csv"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if table.exists() and table.read_bytes().count(b"\n") > count:
            return
        time.sleep(0.002)
    raise AssertionError(f"the run ended or stood still before step {count}: {process.poll()}")


def result(folder: Path) -> tuple[dict[str, object], bytes, bytes]:
    """Return the last checkpoint's state and the two tables."""
    run = folder / "runs" / "run"
    last = max((run / "checkpoints").glob("step_*"))
    state = torch.load(last / "state.pt", weights_only=True)
    return state, (run / "steps.csv").read_bytes(), (run / "history.csv").read_bytes()


def assert_same(one: object, other: object, place: str = "state") -> None:
    """Compare two states bit for bit."""
    assert type(one) is type(other), place
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor)
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert isinstance(other, dict)
        assert one.keys() == other.keys(), place
        for name in one:
            assert_same(one[name], other[name], f"{place}.{name}")
    elif isinstance(one, (list, tuple)):
        assert isinstance(other, (list, tuple))
        assert len(one) == len(other), place
        for index, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            assert_same(mine, theirs, f"{place}.{index}")
    else:
        assert one == other, place


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert trained(folder) == (0, "")
    return folder


def test_killed_twice_in_mid_epoch_it_ends_at_the_same_bits(undisturbed: Path, tmp_path: Path) -> None:
    for rows in (8, 57):
        with training(tmp_path) as process:
            wait_for_steps(tmp_path, rows, process)
            process.send_signal(signal.SIGKILL)
            assert finish(process)[0] == -signal.SIGKILL
    assert trained(tmp_path)[0] == 0
    for one, other in zip(result(undisturbed), result(tmp_path), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_continues(
    undisturbed: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with training(tmp_path) as process:
        wait_for_steps(tmp_path, 23, process)
        process.send_signal(number)
        code, errors = finish(process)
    assert code == 75, errors
    assert f"{number.name} at epoch" in errors
    assert "Traceback" not in errors
    summary = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert trained(tmp_path)[0] == 0
    for one, other in zip(result(undisturbed), result(tmp_path), strict=True):
        assert_same(one, other)


def test_a_second_trainer_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with training(tmp_path, "epochs=400") as first:
        wait_for_steps(tmp_path, 3, first)
        code, errors = trained(tmp_path, "epochs=400")
        assert first.poll() is None
    assert code == 2
    assert "is in use by another trainer" in errors
    assert str(first.pid) in errors
    assert len(errors.strip().splitlines()) == 1


def test_the_main_job_learns_the_digits(tmp_path: Path) -> None:
    """The bar of the preset `safe`: at least 96 % of the test digits, all of 120 epochs, no step rejected."""
    command = [sys.executable, "-m", "stabletrain", "+preset=safe", "name=digits", "tracking.progress=none"]
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "0 of 4680 steps were rejected"
    summary = json.loads((tmp_path / "runs" / "digits" / "summary.json").read_text())
    assert summary["metrics"]["test"]["accuracy"] >= 0.96
    assert summary["finite"] == {"parameters": True, "buffers": True, "optimizer": True}
