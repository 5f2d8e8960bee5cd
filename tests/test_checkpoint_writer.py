"""Checkpoints written beside the training: what is saved is the state at the call, and errors reach the user."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from processes import run
from stabletrain.assembly import assemble
from stabletrain.checkpoint import Checkpoint, CheckpointStore
from stabletrain.checkpoint.occasions import seconds
from stabletrain.checkpoint.retention import Retention
from stabletrain.checkpoint.staging import Staging
from stabletrain.data import ArrayDataset, Splits
from stabletrain.errors import ConfigurationError
from stabletrain.fault import DiskFull
from stabletrain.tracking import Tracker
from stabletrain.trainer import Run, train
from trees import differences


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Let the writer create nothing on the disk before the event is set."""
    released = threading.Event()
    mkdir = os.mkdir

    def slow(*arguments: Any, **keywords: Any) -> None:
        if threading.current_thread().name == "checkpoint writer":
            assert released.wait(60)
        mkdir(*arguments, **keywords)

    monkeypatch.setattr(os, "mkdir", slow)
    yield released
    released.set()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "list": [{"numbers": [1, 2]}]}


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
    model.add_module("tied", model[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(8, 64)).square().sum().backward()
    optimizer.step()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("step_*/*")}


# ------------------------------------------------------------------------------------------------------ the snapshot


def test_nothing_of_later_steps_leaks_into_a_checkpoint(tmp_path: Path, held: threading.Event) -> None:
    """Tensors and containers are changed in place while the writer stands still: the disk has the state before."""
    model, optimizer = trained()
    before = CheckpointStore(tmp_path / "before", asynchronous=False)
    held.set()
    state = state_of(model, optimizer)
    before.save(state, updates=1)
    store = CheckpointStore(tmp_path / "after")
    for updates in (1, 2):  # the second time into the memory of the first
        held.clear()
        store.save(state, updates=updates)
        for tensor in model.state_dict().values():
            tensor.add_(1)
        step(model, optimizer)
        state["list"][0]["numbers"].append(3)
        assert not list(store.folder.glob("step_00000000" + str(updates)))
        held.set()
        assert store.wait() is not None
        if updates == 1:
            assert contents(tmp_path / "before") == contents(tmp_path / "after")
            state = state_of(model, optimizer)
            again = CheckpointStore(tmp_path / "again", asynchronous=False)
            again.save(state, updates=2)
            expected = (tmp_path / "again/checkpoints/step_000000002/state.pt").read_bytes()
    assert (store.folder / "step_000000002" / "state.pt").read_bytes() == expected


def test_both_ways_write_the_same_bytes(tmp_path: Path) -> None:
    """Whole and tied tensors, views, kinds that are copied in other ways, and further files."""
    model, optimizer = trained()
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        **state_of(model, optimizer),
        "views": [base, base.t(), base[1:, ::2], base[:0], torch.empty(0), torch.empty(0), base[1:, ::2]],
        "kinds": {"sparse": torch.eye(3).to_sparse(), "conj": torch.tensor([1 + 2j]).conj(), "bf16": base.bfloat16(),
                  "float8": base.to(torch.float8_e4m3fn), "one": torch.tensor(3), "bool": base > 3},
    }  # fmt: skip
    stores = [CheckpointStore(tmp_path / str(way), asynchronous=way) for way in (True, False)]
    for updates in (1, 2):
        for store in stores:
            store.save(state, updates=updates, metrics={"loss": 0.5}, further={"rank00000.pt": {"random": base[1]}})
            store.wait()
    assert contents(tmp_path / "True") == contents(tmp_path / "False")
    found = stores[0].latest()
    assert found is not None and torch.equal(stores[0].further["rank00000.pt"]["random"], base[1])
    assert found["model"]["tied.weight"].data_ptr() == found["model"]["0.weight"].data_ptr()
    assert torch.equal(found["kinds"]["conj"], state["kinds"]["conj"])


def test_memory_is_used_again() -> None:
    """Copies of the same names and sizes lie where the ones before lay; what changed its size gets new memory."""
    staging = Staging(copy=True)
    first = staging.take({"a": torch.ones(1000), "b": [torch.ones(10)]}, "state")
    places = first["a"].data_ptr(), first["b"][0].data_ptr()
    second = staging.take({"a": torch.zeros(1000), "b": [torch.zeros(20)]}, "state")
    assert second["a"].data_ptr() == places[0] and second["b"][0].data_ptr() != places[1]
    assert torch.equal(second["a"], torch.zeros(1000)) and torch.equal(second["b"][0], torch.zeros(20))
    tensor = torch.ones(3)
    assert Staging(copy=False).take({"a": tensor}, "state")["a"].data_ptr() == tensor.data_ptr()


# -------------------------------------------------------------------------------------------------------- the writer


def test_saving_returns_at_once_and_the_next_save_waits(tmp_path: Path, held: threading.Event) -> None:
    store = CheckpointStore(tmp_path)
    store.save({"model": {"weight": torch.ones(3)}}, updates=1)  # returns although nothing can be written
    assert not list(store.folder.glob("step_*"))
    timer = threading.Timer(0.3, held.set)
    timer.start()
    store.save({"model": {"weight": torch.ones(3)}}, updates=2)
    assert held.is_set() and (store.folder / "step_000000001" / "manifest.json").exists()
    assert store.wait() == store.folder / "step_000000002"
    timer.join()


@pytest.mark.parametrize("read", ["best", "latest", "load"])
def test_whoever_reads_waits(tmp_path: Path, held: threading.Event, read: str) -> None:
    store = CheckpointStore(tmp_path)
    store.save({"model": {"weight": torch.ones(3)}}, updates=1, metrics={"loss": 1.0})
    threading.Timer(0.2, held.set).start()
    found: Any = store.load(tmp_path) if read == "load" else getattr(store, read)()
    assert found is not None and (store.folder / "step_000000001").exists()


def test_an_error_of_the_disk_is_told_counted_and_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(full))
        store.save({"model": {"weight": torch.ones(3)}}, updates=1)
        assert store.wait() is None
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert store.summary()["failed"] == 1 and "No space left on device" in store.summary()["problem"]
    assert os.listdir(store.folder) == []
    store.save({"model": {"weight": torch.ones(3)}}, updates=2)
    assert store.wait() is not None
    assert store.summary() == {"saved": 1, "failed": 1, "refused": 0, "problem": store.problem}


def test_an_unforeseen_error_is_raised_once_where_somebody_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", lambda *_: 1 // 0)
        store.save({"model": {"weight": torch.ones(3)}}, updates=1)
        with pytest.raises(ZeroDivisionError):
            store.save({"model": {"weight": torch.ones(3)}}, updates=2)
    assert store.wait() is None
    store.save({"model": {"weight": torch.ones(3)}}, updates=3)
    assert store.wait() is not None and torch.serialization.get_crc32_options() is True


def test_giving_up_leaves_nothing_and_takes_no_time(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save({"model": {"weight": torch.ones(3)}}, updates=1)
    store.wait()
    store.save({"model": {"weight": torch.ones(30_000_000)}}, updates=2)
    store.give_up()
    assert os.listdir(store.folder) == ["step_000000001"]
    assert store.errors == 0 and torch.serialization.get_crc32_options() is True


@pytest.mark.parametrize("end", ["", "raise ValueError('over')", "sys.exit(3)"])
def test_a_process_that_ends_finishes_its_checkpoint(tmp_path: Path, end: str) -> None:
    program = f"""
import sys, torch
from stabletrain.checkpoint import CheckpointStore
CheckpointStore(sys.argv[1]).save({{"model": {{"weight": torch.ones(10_000_000)}}}}, updates=1)
{end}
"""
    run([sys.executable, "-c", program, str(tmp_path)])
    found = CheckpointStore(tmp_path).latest()
    assert found is not None and float(found["model"]["weight"].sum()) == 1e7


def test_large_files_have_a_hash_for_each_chunk(tmp_path: Path) -> None:
    """What is changed in any of them is found."""
    store = CheckpointStore(tmp_path)
    store.save({"model": {"weight": torch.arange(17_000_000.0)}}, updates=1)
    path = store.wait()
    assert path is not None
    entry = json.loads((path / "manifest.json").read_text())["files"]["state.pt"]
    assert len(entry["sha256"]) == 3 and entry["size"] > 2 * 32 * 2**20
    assert store.latest() is not None
    for place in (100, 40_000_000, entry["size"] - 100):
        with (path / "state.pt").open("r+b") as file:
            file.seek(place)
            byte = file.read(1)
            file.seek(place)
            file.write(bytes([byte[0] ^ 1]))
        with pytest.raises(ConfigurationError, match=r"state\.pt is not what was written"):
            store.load(path)
        with (path / "state.pt").open("r+b") as file:
            file.seek(place)
            file.write(byte)
    store.load(path)


# -------------------------------------------------------------------------------------------------------- the trainer


def ready(folder: Path, **options: Any) -> Run:
    torch.manual_seed(0)
    targets = torch.arange(96) % 3
    data = ArrayDataset(torch.randn(96, 5) + targets[:, None], targets)
    options = {"epochs": 3, "batch_size": 16, "tracking": partial(Tracker, progress="none", log_every=1), **options}
    return assemble(nn.Linear(5, 3), Splits(train=data, validation=data), folder=folder, **options)


def test_a_run_saves_the_same_bytes_either_way(tmp_path: Path) -> None:
    for way in (True, False):
        make = partial(CheckpointStore, asynchronous=way, every_updates=4, keep_last=9)
        train(ready(tmp_path / str(way), checkpoint=make))
    assert len(contents(tmp_path / "True")) == 2 * 7
    assert contents(tmp_path / "True") == contents(tmp_path / "False")


def test_the_summary_tells_what_was_saved_and_what_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = ready(tmp_path)
    (tmp_path / "checkpoints").write_text("in the way")
    train(one)
    said = json.loads((tmp_path / "summary.json").read_text())["checkpoints"]
    assert (said["saved"], said["failed"], said["refused"]) == (0, 3, 0) and "not written" in said["problem"]
    assert sum("not written" in record.getMessage() for record in caplog.records) == 3


@pytest.mark.parametrize("how", ["full", "vanished"])
def test_trouble_with_the_disk_costs_checkpoints_and_nothing_else(tmp_path: Path, how: str) -> None:
    """The run goes on to the same weights, and saves again as soon as it can."""
    cadence = partial(CheckpointStore, every_updates=2)
    calm = ready(tmp_path / "calm", checkpoint=cadence)
    train(calm)
    one = ready(tmp_path / how, checkpoint=cadence, fault=DiskFull(at=6, times=8) if how == "full" else None)
    note = one.tracker.step

    def step(record: Any) -> None:
        note(record)
        if how == "vanished" and record["steps"] == 8:
            os.rename(tmp_path / how / "checkpoints", tmp_path / "elsewhere")

    one.tracker.step = step  # type: ignore[method-assign]
    summary = train(one)
    assert summary.status == "completed"
    assert summary.checkpoints["failed"] >= (how == "full") and summary.checkpoints["saved"] >= 6
    assert one.checkpoint is not None and calm.checkpoint is not None
    assert not differences(one.checkpoint.latest()["model"], calm.checkpoint.latest()["model"])  # type: ignore[index]


def test_the_manifest_says_what_the_checkpoint_is(tmp_path: Path) -> None:
    one = ready(tmp_path, settings={"epochs": 3})
    train(one)
    manifest = json.loads((tmp_path / "checkpoints" / "step_000000018" / "manifest.json").read_text())
    assert manifest["position"] == {"epoch": 3, "step": 0, "steps": 18}
    assert (manifest["format"], manifest["updates"], manifest["serial"]) == (2, 18, 3)
    assert manifest["metrics"].keys() == {"loss", "accuracy"}
    assert manifest["facts"]["data"] == one.identity["data"] and len(manifest["facts"]["config"]) == 64


def test_an_exception_in_training_does_not_cost_the_checkpoint(tmp_path: Path) -> None:
    one = ready(tmp_path)
    note = one.tracker.epoch

    def fail(record: Any) -> None:
        note(record)
        if record["epoch"] == 1:
            raise ValueError("over")

    one.tracker.epoch = fail  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="over"):
        train(one)
    assert one.checkpoint is not None
    found = one.checkpoint.latest()
    assert found is not None and found["progress"]["updates"] == 6
    assert not any(thread.name == "checkpoint writer" for thread in threading.enumerate())


# ------------------------------------------------------------------------------------------- what is kept, and when


def listed(losses: list[float | None]) -> list[Checkpoint]:
    return [
        Checkpoint(Path(str(n)), n, 10 * n, {}, {} if loss is None else {"loss": loss}, {}, {})
        for n, loss in enumerate(losses, start=1)
    ]


@given(
    losses=st.lists(st.none() | st.floats(-2, 2), min_size=1, max_size=12),
    keep_last=st.integers(1, 4),
    keep_every=st.none() | st.integers(1, 40),
)
def test_newest_best_and_multiples_stay(losses: list[float | None], keep_last: int, keep_every: int | None) -> None:
    checkpoints = listed(losses)
    retention = Retention(keep_last, keep_every)
    gone = retention.superfluous(reversed(checkpoints))
    kept = [one for one in checkpoints if one not in gone]
    assert kept[-1] is checkpoints[-1] and kept[-keep_last:] == checkpoints[-keep_last:]
    known = [loss for loss in losses if loss is not None]
    if known:
        best = retention.best(kept)
        assert best is not None and best.metrics["loss"] == min(known)
    for one in checkpoints[:-keep_last]:
        multiple = keep_every is not None and one.updates % keep_every == 0
        assert (one in kept) == (multiple or one is retention.best(checkpoints))


def test_multiples_are_kept_for_good(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1, keep_every=20)
    for updates in range(5, 70, 5):
        store.save({"model": {}}, updates=updates)
    store.wait()
    found = sorted(path.name for path in store.folder.iterdir())
    assert found == ["step_000000020", "step_000000040", "step_000000060", "step_000000065"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [("90s", 90), ("45m", 2700), ("3h30m", 12600), ("1d12h", 129600), ("1d2h3m4s", 93784), ("0h5m", 300)],
)
def test_durations(given: str, expected: int) -> None:
    assert seconds(given, "stop_after") == expected


@pytest.mark.parametrize(
    "given", ["", "30", 30, 1.5, "3h 30m", "30m3h", "m", "0s", "-3m", "1.5h", "3H", True, [], "3h30"]
)
def test_what_is_no_duration_is_refused_with_what_is(given: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"checkpoint\.stop_after=.*such as 1d12h, 3h30m, 45m or 90s"):
        CheckpointStore("nowhere", stop_after=given)


def test_minutes_count_from_the_last_save(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, every_minutes=0.2 / 60, every_epochs=0)
    assert store.occasions.any and not store.occasions.overdue
    time.sleep(0.21)
    assert store.occasions.overdue
    store.save({"model": {}}, updates=1)
    assert not store.occasions.overdue
    store.wait()
