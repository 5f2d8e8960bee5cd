"""Runs that are asked to end, wherever they are: they save, leave with 75, and continue as if nothing had been."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from processes import started
from stabletrain import Policy
from stabletrain.assembly import assemble
from stabletrain.checkpoint import CheckpointStore
from stabletrain.data import ArrayDataset, Splits
from stabletrain.errors import Interrupted
from stabletrain.loss import CrossEntropy
from stabletrain.task import Classification
from stabletrain.tracking import Tracker
from stabletrain.trainer import Run, train
from trees import differences


def ask(number: signal.Signals = signal.SIGTERM) -> None:
    signal.raise_signal(number)  # to this thread, so that it is noted before the next line


def ask_in_step(run: Run, number: int) -> None:
    """Let the run be asked to end during a step, counted from 1."""
    before = run.fault.before_step

    def before_step(steps: int, microbatches: Any) -> Any:
        if steps == number - 1:
            ask()
        return before(steps, microbatches)

    run.fault.before_step = before_step  # type: ignore[method-assign,assign]


def points(count: int, seed: int = 0) -> ArrayDataset:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % 3
    return ArrayDataset(torch.randn(count, 5, generator=generator) + targets[:, None], targets)


class Counted(Classification):
    """Counts the batches that are evaluated, and lets the run be asked to end at one of them."""

    def __init__(self, ask_at: int | None = None) -> None:
        super().__init__(CrossEntropy())
        self.ask_at, self.seen = ask_at, 0

    def evaluate(self, model: nn.Module, loader: Any) -> dict[str, float]:
        def counted() -> Iterator[Any]:
            for batch in loader:
                self.seen += 1
                if self.seen == self.ask_at:
                    ask()
                yield batch

        return super().evaluate(model, counted())


def make(folder: Path, **options: Any) -> Run:
    torch.manual_seed(0)
    splits = Splits(train=options.pop("train", points(96)), validation=points(900, 1), test=points(900, 2))
    options = {"epochs": 3, "batch_size": 16, "task": Counted(), **options}
    tracking = partial(Tracker, progress="none", log_every=1, tensorboard=False)
    return assemble(nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.2), nn.Linear(8, 3)), splits, folder=folder,
                    tracking=tracking, **options)  # fmt: skip


def same(one: Path, other: Path) -> None:
    """Compare all that two runs have left: the newest state and the tables, byte for byte."""
    for name in ("steps.csv", "history.csv"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    states = [CheckpointStore(folder).latest() for folder in (one, other)]
    assert states[0] is not None and not differences(states[0], states[1])
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, other)]
    assert summaries[0]["metrics"] == summaries[1]["metrics"]


# 4 batches of validation an epoch, then as many of the test.
@pytest.mark.parametrize(
    ("batch", "position", "left"), [(2, (0, 6), 16), (4, (1, 0), 12), (7, (1, 6), 12), (13, (3, 0), 4), (14, (3, 0), 4)]
)
def test_asked_in_validation_or_test_it_repeats_that(
    tmp_path: Path, batch: int, position: tuple[int, int], left: int
) -> None:
    train(make(tmp_path / "undisturbed"))
    task = Counted(ask_at=batch)
    run = make(tmp_path / "asked", task=task)
    with pytest.raises(Interrupted, match=r"^SIGTERM at epoch \d, step \d; a checkpoint was saved, and the same"):
        train(run)
    assert task.seen == batch  # not one more
    assert run.checkpoint is not None and run.checkpoint.latest() is not None
    assert (run.checkpoint.position["epoch"], run.checkpoint.position["step"]) == position
    again = make(tmp_path / "asked")
    train(again)
    assert isinstance(again.task, Counted) and again.task.seen == left
    same(tmp_path / "asked", tmp_path / "undisturbed")


class Read(torch.utils.data.Dataset[Any]):
    """Counts how often samples are read, and lets the run be asked to end at one of them; two are bad."""

    def __init__(self, ask_at: int | None = None) -> None:
        self.data, self.ask_at, self.reads = points(99), ask_at, 0
        self.data.inputs[[11, 70]] = float("nan")

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        if self.reads == self.ask_at:
            ask()
        return self.data[index]


def test_asked_in_the_data_scan_it_scans_again(tmp_path: Path) -> None:
    guard = Policy(on_rejection="rollback", scan=True, max_quarantined=0.1)
    train(make(tmp_path / "undisturbed", train=Read(), guard=guard))
    run = make(tmp_path / "asked", train=Read(), guard=guard)
    data: Any = run.loader.dataset
    data.ask_at = data.reads + 40
    with pytest.raises(Interrupted, match="SIGTERM at epoch 0, step 0; a checkpoint was saved"):
        train(run)
    assert data.reads < data.ask_at + 16
    assert run.progress.steps == 0
    again = make(tmp_path / "asked", train=Read(), guard=guard)
    train(again)
    assert sorted(again.quarantine.found) == [11, 70]
    same(tmp_path / "asked", tmp_path / "undisturbed")


def test_asked_where_it_has_just_saved_it_saves_nothing_more(tmp_path: Path) -> None:
    run = make(tmp_path)
    note = run.tracker.epoch
    run.tracker.epoch = lambda record: (note(record), ask())  # type: ignore[method-assign,assign,func-returns-value]
    with pytest.raises(Interrupted, match="SIGTERM at epoch 1, step 0; a checkpoint was saved"):
        train(run)
    assert [path.name for path in (tmp_path / "checkpoints").glob("step_*")] == ["step_000000006"]


def test_what_was_saved_when_asked_is_never_best(tmp_path: Path) -> None:
    """The undisturbed run has no such checkpoint, so its test can't measure it."""
    run = make(tmp_path, checkpoint=partial(CheckpointStore, every_epochs=2))
    note = run.tracker.epoch
    run.tracker.epoch = lambda record: (note(record), ask())  # type: ignore[method-assign,assign,func-returns-value]
    with pytest.raises(Interrupted):
        train(run)
    assert run.checkpoint is not None and run.checkpoint.latest() is not None and run.checkpoint.best() is None


def test_asked_when_nothing_can_be_written_it_says_so(tmp_path: Path) -> None:
    run = make(tmp_path)
    (tmp_path / "checkpoints").write_text("in the way")
    ask_in_step(run, 8)
    with pytest.raises(Interrupted, match=r"no checkpoint could be written: checkpoint at update 8 not written"):
        train(run)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["checkpoints"]["failed"]) == ("interrupted", 2)


def test_asked_without_checkpoints_it_says_so(tmp_path: Path) -> None:
    run = make(tmp_path, checkpoint=partial(CheckpointStore, every_epochs=0))
    ask_in_step(run, 1)
    with pytest.raises(Interrupted, match="nothing was saved, checkpoints are off"):
        train(run)


def test_when_its_time_is_up_it_saves_and_ends(tmp_path: Path) -> None:
    run = make(tmp_path, epochs=100_000, checkpoint=partial(CheckpointStore, stop_after="1s", every_epochs=0))
    start = time.monotonic()
    with pytest.raises(Interrupted, match=r"^checkpoint\.stop_after=1s at epoch \d+, step \d; a checkpoint was saved"):
        train(run)
    assert time.monotonic() - start >= 0.9
    assert run.checkpoint is not None
    found = run.checkpoint.latest()
    assert found is not None and found["progress"] == run.progress.state_dict()


# ------------------------------------------------------------------------------------------------- real processes

SLOW = """
import time
import torch

class Slow(torch.utils.data.Dataset):
    random = True

    def __len__(self):
        return 8000

    def __getitem__(self, index):
        time.sleep(0.02)
        return torch.randn(4) + index % 2, index % 2
"""
COMMAND = [
    *(
        sys.executable,
        "-m",
        "stabletrain",
        "--config-dir",
        "conf",
        "data=slow",
        "model=mlp",
        "model.num_classes=2",
        "name=run",
        "epochs=1",
    ),
    *("log_every=1", "tracking.tensorboard=false", "tracking.progress=none", "device=cpu", "batch_size=8"),
]


@contextmanager
def training(folder: Path, *more: str, rows: int = 2, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Start a run with slow data in a process group of its own, and wait until it trains or has made some steps."""
    (folder / "conf" / "data").mkdir(parents=True, exist_ok=True)
    (folder / "conf" / "data" / "slow.yaml").write_text("_target_: slow.Slow\n")
    (folder / "slow.py").write_text(SLOW)
    table, deadline = folder / "runs" / "run" / "steps.csv", time.monotonic() + 60
    with started([*COMMAND, *more], folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **options) as process:
        while not (table.with_name("environment.json").exists() and (rows == 0 or _rows(table) >= rows)):
            assert process.poll() is None and time.monotonic() < deadline, "it ended or did not begin"
            time.sleep(0.01)
        yield process


def _rows(table: Path) -> int:
    return len(table.read_text().splitlines()) - 1 if table.exists() else 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_whole_process_group_leaves_its_workers_be(tmp_path: Path, number: signal.Signals) -> None:
    with training(tmp_path, "workers=2") as process:
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=60)
        with pytest.raises(ProcessLookupError):  # nobody is left
            os.killpg(process.pid, 0)
    assert process.returncode == 75, errors
    assert errors.startswith(f"stabletrain: {number.name} at epoch 0, step ") and errors.count("\n") == 1
    rows = list(csv.DictReader((tmp_path / "runs" / "run" / "steps.csv").read_text().splitlines()))
    store = CheckpointStore(tmp_path / "runs" / "run")
    assert store.latest() is not None and store.position["steps"] == int(rows[-1]["steps"])


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(tmp_path: Path, number: signal.Signals, before: signal.Handlers) -> None:
    def disposed() -> None:
        signal.signal(number, before)  # a shell lets its background jobs ignore SIGINT

    # Its first step takes longer than this waits.
    with training(tmp_path, "batch_size=4000", rows=0, preexec_fn=disposed) as process:
        process.send_signal(number)
        time.sleep(1.0)
        for _ in range(5):
            process.send_signal(number)
            try:
                _, errors = process.communicate(timeout=10)
                break
            except subprocess.TimeoutExpired:
                pass  # a machine with much to do delivered two signals as one
    assert process.returncode == (-signal.SIGTERM if number == signal.SIGTERM else 1)
    assert "Traceback" not in errors
    assert not list((tmp_path / "runs" / "run").glob("checkpoints/*"))
