"""Interrupted twice, at any step and in any way, a run ends at the bits of the undisturbed one, with every option."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stabletrain import Policy, fault
from stabletrain.assembly import assemble
from stabletrain.checkpoint import CheckpointStore
from stabletrain.data import ArrayDataset, Splits
from stabletrain.ema import ExponentialMovingAverage
from stabletrain.errors import Interrupted
from stabletrain.optimizer import adamw
from stabletrain.precision import Ladder, Precision
from stabletrain.schedule import Cosine
from stabletrain.tracking import Tracker
from stabletrain.trainer import Run, train
from trees import differences


class Jittered(torch.utils.data.Dataset[Any]):
    """Points that are moved at random, each time they are read, by all three generators."""

    random = True

    def __init__(self, data: ArrayDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        inputs, target = self.data[index]
        return inputs + torch.randn(5) * random.random(), target


def points(count: int, seed: int) -> ArrayDataset:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % 3
    return ArrayDataset(torch.randn(count, 5, generator=generator) + 2.0 * targets[:, None], targets)


def noisy(data: Any) -> Any:
    inputs, targets = data
    return inputs + 0.1 * torch.randn_like(inputs), targets


ROLLBACK = Policy(on_rejection="rollback", snapshot_every=5, max_rejected=2, rewarm=4, recover=6, spike_window=10)
SALVAGE = Policy(on_rejection="salvage", spikes=True, spike_window=10, max_quarantined=0.2)
RARELY = {"every_updates": None, "every_epochs": 4}
# Arguments of `assemble`, and: samples, whether they are random, which of the first epoch overflow in the model, how
# often to save, steps to interrupt after.
CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "accumulation, bf16, average": lambda: {
        "accumulate": 2, "precision": partial(Precision, "bfloat16"), "ema": ExponentialMovingAverage,
    },
    "fp16 that overflows": lambda: {
        "precision": partial(Precision, "float16", initial_scale=2.0**8, growth_interval=3),
        "fault": fault.Fp16Overflow(at=9, times=2), "guard": Policy(max_rejected=9),
    },
    "salvage, quarantine, spikes": lambda: {
        "fault": fault.NanInput(at=5, samples=2), "guard": SALVAGE, "accumulate": 2,
    },
    "salvage with partners from the step before": lambda: {
        "hidden": (48, 53), "guard": SALVAGE, "accumulate": 2, "samples": 96, "batch_size": 4, "epochs": 1,
        "stops": (12, 13),
    },
    "rollback from ruined weights": lambda: {
        "fault": fault.NanWeight(at=19), "guard": ROLLBACK, "cadence": RARELY, "stops": (12, 18),
    },
    "rollback with fp16 and average": lambda: {
        "fault": fault.NanWeight(at=20), "guard": ROLLBACK, "ema": ExponentialMovingAverage, "accumulate": 2,
        "precision": partial(Precision, "float16", initial_scale=2.0**20, growth_interval=3),
    },
    "rollback early and late": lambda: {
        "fault": fault.NanWeight(at=6, times=12), "cadence": RARELY,
        "guard": Policy(on_rejection="rollback", snapshot_every=4, max_rollbacks=20),
    },
    "a ramp of batch sizes": lambda: {
        "ramp": [{"epoch": 1, "batch_size": 24}, {"epoch": 3, "batch_size": 50, "lr": 2.0}], "epochs": 5,
        "ema": ExponentialMovingAverage,
    },
    "a ladder of precision": lambda: {
        "precision": partial(Ladder, stable_epochs=1, watch_updates=5), "fault": fault.NanGradient(at=9), "epochs": 6,
        "guard": Policy(on_rejection="rollback", snapshot_every=2), "cadence": {"every_updates": 3},
    },
    "random data with any number of workers": lambda: {"random": True, "augmentation": noisy},
}  # fmt: skip


def make(folder: Path, case: str, *, workers: int = 0, every_minutes: float | None = None) -> Run:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    options = {"epochs": 4, "batch_size": 16, **CASES[case]()}
    data: Any = points(options.pop("samples", 102), 0)  # six more than 6 steps, so that some may be quarantined
    data = Jittered(data) if options.pop("random", False) else data
    cadence = {"every_updates": 4, "every_epochs": 2, **options.pop("cadence", {})}
    hidden, _ = options.pop("hidden", ()), options.pop("stops", None)
    run = assemble(
        model,
        Splits(train=data, validation=points(30, 1), test=points(30, 2)),
        folder=folder,
        optimizer=partial(adamw, lr=1e-2),
        schedule=partial(Cosine, warmup_updates=6),
        tracking=partial(Tracker, progress="none", log_every=1, tensorboard=False),
        checkpoint=partial(CheckpointStore, every_minutes=every_minutes, **cadence),
        workers=workers,
        **options,
    )
    for place in hidden:
        run.loader.dataset.inputs[run.loader.order(0)[place]] = 3e38
    return run


class Killed(BaseException):
    """Takes the place of a kill -9: nothing of ours is done after it."""


def interrupt(run: Run, at: int, how: str) -> None:
    """Train until something ends the run after step `at`: a signal that comes during it, or a kill just after it."""
    note, before = run.tracker.step, run.fault.before_step

    def step(record: Any) -> None:
        note(record)
        if record["steps"] == at and how != "signal":
            raise Killed

    def before_step(steps: int, microbatches: Any) -> Any:
        if steps == at - 1 and how == "signal" and not run.signals.received:
            signal.raise_signal(signal.SIGUSR1)  # to this thread: noted before the next line
        return before(steps, microbatches)

    run.tracker.step, run.fault.before_step = step, before_step  # type: ignore[method-assign,assign]
    with pytest.raises(Interrupted if how == "signal" else Killed):
        train(run)


def left(run: Run) -> dict[str, Any]:
    """Return everything that a run has come to: its state, what it would roll back to, and its tables."""
    assert run.checkpoint is not None and run.folder is not None
    kept = run.rollback.kept() if run.rollback is not None else None
    tables = {name: (run.folder.path / name).read_bytes() for name in ("steps.csv", "history.csv")}
    return {"state": run.checkpoint.latest(), "kept": kept, "metrics": run.metrics, **tables}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    @cache
    def result(case: str) -> dict[str, Any]:
        run = make(tmp_path_factory.mktemp("undisturbed"), case)
        train(run)
        return left(run)

    return result


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
@pytest.mark.parametrize("how", ["kill", "signal", "kill, with checkpoints by the clock"])
@pytest.mark.parametrize("case", CASES)
def test_interrupted_twice_it_ends_at_the_same_bits(
    undisturbed: Callable[[str], dict[str, Any]], tmp_path: Path, case: str, how: str
) -> None:
    expected = undisturbed(case)
    chance = random.Random(f"{case} {how}")
    every_minutes = 1e-9 if "clock" in how else None
    several = case.startswith("random data")
    workers = chance.sample([0, 1, 2, 3], 3) if several else [0, 0, 0]
    stops = CASES[case]().get("stops") or sorted(chance.sample(range(3, expected["state"]["progress"]["steps"] - 1), 2))
    for number, at in enumerate(stops):
        interrupt(make(tmp_path, case, workers=workers[number], every_minutes=every_minutes), at, how)
    last = make(tmp_path, case, workers=workers[2], every_minutes=every_minutes)
    train(last)
    assert not differences(left(last), expected), f"interrupted after the steps {stops}"


def test_what_is_tested_does_happen(undisturbed: Callable[[str], dict[str, Any]]) -> None:
    """The cases are what their names say."""
    states = {case: undisturbed(case)["state"] for case in CASES}
    reasons = {case: dict(state["guard"]["ledger"]["reasons"]) for case, state in states.items()}
    assert reasons["fp16 that overflows"]["overflow"] >= 2
    assert reasons["rollback with fp16 and average"]["overflow"] >= 2
    for case in ("salvage, quarantine, spikes", "salvage with partners from the step before"):
        assert states[case]["guard"]["ledger"]["salvaged"] >= 1
    for case, least in (("rollback from ruined weights", 1), ("rollback with fp16 and average", 1),
                        ("rollback early and late", 4)):  # fmt: skip
        assert states[case]["rollback"]["count"] >= least
