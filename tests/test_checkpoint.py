"""Checkpoints: whole, healthy and harmless, or not there."""

from __future__ import annotations

import collections
import enum
import hashlib
import json
import logging
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from processes import run
from stabletrain.checkpoint import CheckpointStore, nonfinite_names
from stabletrain.errors import ConfigurationError
from stabletrain.plain import plain
from stabletrain.sealed import manifest_text

# One parent imports torch once; its children save without end and are killed at random moments, most of them in a save.
KILLED = """
import logging, os, random, signal, sys, time
from pathlib import Path
import torch
from stabletrain.checkpoint import CheckpointStore
logging.disable(logging.CRITICAL)
torch.set_num_threads(1)
folder, kills, chance = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))

def save(store, updates):
    state = {"model": {"weight": torch.full((100_000,), float(updates))}, "updates": updates}
    store.save(state, updates=updates, metrics={"loss": 1.0 / updates})
    assert store.wait() is not None

start = time.perf_counter()
save(CheckpointStore(folder), 1)
duration = time.perf_counter() - start
half_written = aside = 0
last = 1
for _ in range(kills):
    ready, begins = os.pipe()
    child = os.fork()
    if child == 0:
        store = CheckpointStore(folder, keep_last=2)
        updates = store.latest()["updates"]
        while True:
            updates += 1
            os.write(begins, b".")
            save(store, updates)
    saves = chance.choice([1, 2, 3])
    while saves > 0:
        saves -= len(os.read(ready, saves))
    time.sleep(1.5 * duration * chance.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(ready), os.close(begins)
    half_written += any(name.startswith((".tmp", ".del")) for name in os.listdir(folder / "checkpoints"))
    store = CheckpointStore(folder)
    state = store.latest()
    aside += len(store.notes)
    assert not list((folder / "checkpoints").glob(".*-*")), "not swept"
    assert state["updates"] >= last, (state["updates"], last)
    last = state["updates"]
    assert torch.equal(state["model"]["weight"], torch.full((100_000,), float(last)))
print(last, half_written, aside)
"""

# Saves until the disk is full, goes on, and saves again when there is space.
FULL = """
import contextlib, logging, os, resource, sys
from pathlib import Path
import torch
from stabletrain.checkpoint import CheckpointStore
folder, how = Path(sys.argv[1]), sys.argv[2]
logging.basicConfig(stream=sys.stdout)

@contextlib.contextmanager
def full():
    if how == "limit":
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), hard))
        yield
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    else:
        filler = os.open(folder / "filler", os.O_WRONLY | os.O_CREAT)
        free = os.statvfs(folder)
        os.posix_fallocate(filler, 0, max(1, free.f_bavail * free.f_frsize - int(sys.argv[3])))
        yield
        os.close(filler)
        os.unlink(folder / "filler")

def state(updates):
    return {"model": {"weight": torch.full((100_000,), float(updates))}}

def saved(store, *arguments, **keywords):
    store.save(*arguments, **keywords)
    return store.wait()

store = CheckpointStore(folder)
assert saved(store, state(1), updates=1) and saved(store, state(2), updates=2)
before = {path: path.read_bytes() for path in folder.rglob("step_*/*")}
with full():
    assert saved(store, state(3), updates=3) is None
    assert store.errors == 1
    assert before == {path: path.read_bytes() for path in folder.rglob("step_*/*")}
    assert not list((folder / "checkpoints").glob(".*")), "left aside"
    assert store.latest()["model"]["weight"][0] == 2
assert saved(store, state(4), updates=4)
assert store.latest()["model"]["weight"][0] == 4
"""


def printed_by(script: str, *arguments: object) -> str:
    """Run a script of its own, which must succeed, and return what it prints."""
    done = run([sys.executable, "-c", script, *map(str, arguments)])
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def can_mount() -> bool:
    """Return whether this machine lets us have a small disk of our own."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder]
        try:
            mounted = subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            return False
        if mounted:
            subprocess.run(["umount", folder], check=True)
    return mounted


@pytest.fixture(params=["limit", *(["tmpfs"] if can_mount() else [])])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and how it gets full: by a limit on the size of files, and by being small where that may be had."""
    if request.param == "limit":
        yield tmp_path, "limit"
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)], check=True)
    try:
        yield tmp_path, "tmpfs"
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def simple(value: float, **more: Any) -> dict[str, Any]:
    """Return a state of one weight."""
    return {"model": {"weight": torch.full((64,), value)}, **more}


def saved(store: CheckpointStore, state: dict[str, Any], **options: Any) -> Path | None:
    """Save, and return the folder once everything is on disk; None if nothing was written."""
    store.save(state, **options)
    return store.wait()


def names(store: CheckpointStore) -> list[str]:
    """Return what lies in the checkpoints' folder."""
    return sorted(os.listdir(store.folder))


def weight(state: dict[str, Any] | None) -> float:
    """Return the weight of a state from `simple`."""
    assert state is not None
    return float(state["model"]["weight"][0])


def assert_same(found: Any, expected: Any) -> None:
    """Compare two trees: types, values, every bit of the tensors."""
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for name in expected:
            assert_same(found[name], expected[name])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


# Whole


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """Model, optimizer, schedule and random states, with numpy's numbers as plain ones."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=float(np.float32(0.1)))
    model(torch.randn(8, 3)).square().sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1.0)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "random": [random.getstate(), torch.get_rng_state(), np.random.default_rng(3).bit_generator.state],
        "several": {"bf16": torch.randn(5).bfloat16(), "whole": torch.arange(3), "none": None, 5: {1, 2}, "empty": ()},
        "text": "grün", "bytes": b"\x00\xff", "size": torch.Size((1, 2)), "dtype": torch.float16,
    }  # fmt: skip
    store = CheckpointStore(tmp_path)
    assert saved(store, state, updates=1) is not None
    found = CheckpointStore(tmp_path).latest()
    assert_same(found, state)
    assert found is not None
    assert found["model"]._metadata == model.state_dict()._metadata  # type: ignore[attr-defined]
    model.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])


def test_numpy_becomes_plain(tmp_path: Path) -> None:
    """What would need code to load is turned into what doesn't."""
    legacy = np.random.RandomState(3).get_state(legacy=False)
    state: dict[Any, Any] = {
        "numbers": [np.float64(0.1), np.float32(0.5), np.int64(3), np.bool_(True), np.str_("a")],
        "array": np.arange(4, dtype=">i4"), "legacy": legacy, np.int64(7): collections.defaultdict(list, a=[1]),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }  # fmt: skip
    store = CheckpointStore(tmp_path)
    saved(store, state, updates=1)
    found: dict[Any, Any] | None = store.latest()
    assert found is not None
    assert_same(found["numbers"], [0.1, 0.5, 3, True, "a"])
    assert_same(found["array"], torch.arange(4, dtype=torch.int32))
    assert_same(found[7], {"a": [1]})
    assert_same(found["parameter"], torch.ones(2))
    restored = np.random.RandomState()
    restored.set_state({**found["legacy"], "state": {**found["legacy"]["state"],
                        "key": found["legacy"]["state"]["key"].numpy()}})  # fmt: skip
    assert restored.random_sample() == np.random.RandomState(3).random_sample()


def test_files_and_manifest(tmp_path: Path) -> None:
    """One folder, two files, and the manifest tells the truth about the other."""
    store = CheckpointStore(tmp_path)
    path = saved(store, simple(1.0), updates=12300, metrics={"loss": 0.5, "accuracy": float("nan")})
    assert path == tmp_path / "checkpoints" / "step_000012300"
    assert sorted(os.listdir(path)) == ["manifest.json", "state.pt"]
    assert names(store) == ["best.json", "step_000012300"]
    manifest = json.loads((path / "manifest.json").read_text(), parse_constant=pytest.fail)
    data = (path / "state.pt").read_bytes()
    assert manifest["files"] == {"state.pt": {"size": len(data), "sha256": [hashlib.sha256(data).hexdigest()]}}
    assert (manifest["format"], manifest["updates"], manifest["serial"]) == (2, 12300, 1)
    assert manifest["metrics"] == {"loss": 0.5, "accuracy": None}
    assert manifest["versions"]["torch"] == torch.__version__
    assert torch.serialization.get_crc32_options() is True


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    """A run that never saved starts from the beginning."""
    store = CheckpointStore(tmp_path)
    assert store.latest() is None and store.best() is None
    assert list(tmp_path.iterdir()) == []


def flip(path: Path, place: int) -> None:
    """Change one byte of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "hole", "longer"])
def test_every_damage_is_found(tmp_path: Path, name: str, damage: str) -> None:
    """At fifty places of each file: the damaged one is set aside and the one before is used."""
    store = CheckpointStore(tmp_path / "run")
    saved(store, simple(1.0), updates=1)
    saved(store, simple(2.0), updates=2)
    size = (store.folder / "step_000000002" / name).stat().st_size
    places = sorted({round(part * (size - 1) / 49) for part in range(50)})
    for place in places:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(tmp_path / "run", copy)
        path = copy / "checkpoints" / "step_000000002" / name
        data = path.read_bytes()
        if damage == "flipped":
            flip(path, place)
        elif damage == "cut":
            os.truncate(path, place)
        elif damage == "longer":
            path.write_bytes(data[:place] + b"\x20" + data[place:])
        else:
            path.write_bytes((data[:place] + bytes(min(16, size - place)) + data[place + 16 :])[:size])
            if path.read_bytes() == data:
                continue  # there were zeros already
        damaged = CheckpointStore(copy)
        assert weight(damaged.latest()) == 1.0, place
        assert name in damaged.notes[0]
        assert names(damaged) == ["step_000000001", "step_000000002.corrupt"]
        assert damaged.found == copy / "checkpoints" / "step_000000001"


@pytest.mark.parametrize("name", ["state.pt", "rollback.pt", "manifest.json"])
def test_missing_file_is_found(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """A folder that lost a file is bad, and said to be."""
    store = CheckpointStore(tmp_path)
    saved(store, simple(1.0), updates=1)
    saved(store, simple(2.0), updates=2, further={"rollback.pt": simple(1.0)})
    (store.folder / "step_000000002" / name).unlink()
    assert weight(store.latest()) == 1.0
    assert f"step_000000002: {name} is missing" in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_some_and_none_good_is_an_error_each_time(tmp_path: Path) -> None:
    """A run whose checkpoints are all bad doesn't start over, nor does the same command a second time."""
    store = CheckpointStore(tmp_path)
    for updates in (1, 2):
        saved(store, simple(1.0), updates=updates)
        flip(store.folder / f"step_{updates:09d}" / "state.pt", 700)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=r"none of the checkpoints .* is good"):
            CheckpointStore(tmp_path).latest()
    assert names(store) == ["step_000000001.corrupt", "step_000000002.corrupt"]


def test_same_step_corrupt_twice(tmp_path: Path) -> None:
    """Setting aside never overwrites what was set aside before."""
    store = CheckpointStore(tmp_path)
    saved(store, simple(1.0), updates=1)
    for _ in range(2):
        saved(store, simple(2.0), updates=2)
        flip(store.folder / "step_000000002" / "state.pt", 700)
        assert weight(store.latest()) == 1.0
    assert names(store) == ["step_000000001", "step_000000002-2.corrupt", "step_000000002.corrupt"]


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """After each of 40 kill -9, many of them during a save: nothing torn, nothing lost, nothing left aside."""
    last, half_written, aside = map(int, printed_by(KILLED, tmp_path, 40, 0).split())
    assert last > 10 and aside == 0
    assert half_written >= 8, "too few kills came during a save for this test to say anything"


@pytest.mark.parametrize("room", [0, 1000, 200_000])
def test_full_disk(disk: tuple[Path, str], room: int) -> None:
    """Saving fails, is counted and said; earlier checkpoints are untouched; with space it goes on."""
    folder, how = disk
    printed = printed_by(FULL, folder, how, room)
    assert "checkpoint at update 3 not written" in printed and "training goes on" in printed
    assert printed.count("\n") == 1


def test_unwritable_and_vanished_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither stops training; the next occasion tries again."""
    store = CheckpointStore(tmp_path)
    (tmp_path / "checkpoints").write_text("in the way")
    assert saved(store, simple(1.0), updates=1) is None
    assert store.errors == 1 and "not written" in caplog.text
    (tmp_path / "checkpoints").unlink()
    assert saved(store, simple(2.0), updates=2) is not None
    shutil.rmtree(tmp_path)
    assert saved(store, simple(3.0), updates=3) is not None
    assert weight(store.latest()) == 3.0 and store.errors == 1


def test_stale_folders_are_swept_but_not_those_of_the_living(tmp_path: Path) -> None:
    """Looking into a run that goes on doesn't disturb a save; who saves clears everything."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    folder = tmp_path / "checkpoints"
    for name in (f".tmp-step_000000005-{gone.pid}", f".del-step_000000004-{gone.pid}", f".tmp-step_000000006-{1}"):
        (folder / name).mkdir(parents=True)
        (folder / name / "state.pt").write_text("half")
    store = CheckpointStore(tmp_path)
    assert names(store) == [".tmp-step_000000006-1"]
    assert store.latest() is None
    saved(store, simple(1.0), updates=1)
    assert names(store) == ["step_000000001"]


# Healthy


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["model.weight", "model.running_var", "optimizer.state.0.exp_avg", "ema.average.weight"]
)
def test_what_is_not_finite_is_not_written(
    tmp_path: Path, name: str, poison: float, caplog: pytest.LogCaptureFixture
) -> None:
    """The healthy checkpoints stay as they are, and the log names the tensor."""

    def state() -> dict[str, Any]:
        return {
            "model": {"weight": torch.ones(3), "running_var": torch.ones(3), "count": torch.tensor(3)},
            "optimizer": {"state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(1.0)}}, "param_groups": []},
            "ema": {"average": {"weight": torch.ones(3, dtype=torch.bfloat16)}},
        }

    store = CheckpointStore(tmp_path, keep_last=1)
    saved(store, state(), updates=1, metrics={"loss": 1.0})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    poisoned = state()
    place: Any = poisoned
    *parents, last = name.split(".")
    for part in parents:
        place = place[int(part) if part.isdigit() else part]
    place[last][1] = poison
    assert saved(store, poisoned, updates=2, metrics={"loss": 0.5}) is None
    assert store.refused == 1 and name in caplog.text
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_masks_may_hold_infinities(tmp_path: Path) -> None:
    """A buffer that always held infinities is no fault; the others are judged as before."""
    model = torch.nn.Linear(2, 2)
    model.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))
    assert nonfinite_names(model.state_dict()) == ["mask"]
    store = CheckpointStore(tmp_path)
    assert saved(store, {"model": model.state_dict()}, updates=1) is None
    store.exempt(nonfinite_names(model.state_dict()))
    assert saved(store, {"model": model.state_dict(), "ema": {"average": model.state_dict()}}, updates=2) is not None
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    assert saved(store, {"model": model.state_dict()}, updates=3) is None


def test_finite_check_knows_every_kind_of_tensor() -> None:
    """Sparse, complex, 8-bit and empty tensors, and those without NaN by their type."""
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[0, 0]]), torch.tensor([1.0, float("nan")]), (3,), check_invariants=True
    )
    tree = {
        "sparse": [sparse],
        "complex": (torch.tensor([complex(0, float("inf"))]),),
        "eight": torch.tensor([float("nan")]).to(torch.float8_e4m3fn),
        "fine": [torch.ones(1).to(torch.float8_e4m3fn), torch.arange(3), torch.empty(0), torch.eye(2).to_sparse()],
        "text": "nan",
    }
    assert nonfinite_names(tree) == ["sparse.0", "complex.0", "eight"]


def test_newest_and_best_are_kept(tmp_path: Path) -> None:
    """The last two by time, the best by metric; NaN and what wasn't validated is never best."""
    store = CheckpointStore(tmp_path, keep_last=2)
    losses = [0.9, 0.3, float("nan"), 0.5, None, 0.3, float("-inf"), 0.4]
    for number, loss in enumerate(losses, start=1):
        saved(store, simple(float(number)), updates=number, metrics=None if loss is None else {"loss": loss})
    assert names(store) == ["best.json", "step_000000002", "step_000000007", "step_000000008"]
    best = CheckpointStore(tmp_path).best()
    assert best is not None and best.updates == 2 and best.metrics == {"loss": 0.3}
    assert json.loads((store.folder / "best.json").read_text()) == {
        "checkpoint": "step_000000002", "metric": "loss", "mode": "min", "updates": 2, "value": 0.3,
    }  # fmt: skip
    saved(store, simple(9.0), updates=9, metrics={"loss": 0.2})
    saved(store, simple(10.0), updates=10, metrics={"loss": 0.7})
    assert names(store) == ["best.json", "step_000000009", "step_000000010"]
    assert json.loads((store.folder / "best.json").read_text())["updates"] == 9


def test_best_by_any_metric_and_mode(tmp_path: Path) -> None:
    """More may be better; another metric from now on judges what is there by its own values."""
    store = CheckpointStore(tmp_path, keep_last=3, metric="accuracy", mode="max")
    for number, (loss, accuracy) in enumerate([(0.5, 0.7), (0.6, 0.9), (0.7, 0.8)], start=1):
        saved(store, simple(1.0), updates=number, metrics={"loss": loss, "accuracy": accuracy})
    best = store.best()
    assert best is not None and best.updates == 2
    best = CheckpointStore(tmp_path, metric="loss").best()
    assert best is not None and best.updates == 1
    assert CheckpointStore(tmp_path, metric="other").best() is None


def test_best_survives_a_kill_before_it_was_noted(tmp_path: Path) -> None:
    """The manifests are the record: without `best.json`, or with an old one, the best is still kept."""
    store = CheckpointStore(tmp_path, keep_last=1)
    saved(store, simple(1.0), updates=1, metrics={"loss": 0.1})
    (store.folder / "best.json").write_text("{torn")
    again = CheckpointStore(tmp_path, keep_last=1)
    saved(again, simple(2.0), updates=2, metrics={"loss": 0.2})
    saved(again, simple(3.0), updates=3, metrics={"loss": 0.3})
    assert names(again) == ["best.json", "step_000000001", "step_000000003"]
    assert json.loads((store.folder / "best.json").read_text())["updates"] == 1


def test_going_back_makes_what_is_saved_next_the_newest(tmp_path: Path) -> None:
    """Newest is what was saved last, whatever its number of updates."""
    store = CheckpointStore(tmp_path, keep_last=3)
    for updates in (10, 20, 30):
        saved(store, simple(float(updates)), updates=updates)
    assert weight(store.load(store.folder / "step_000000010")) == 10.0
    saved(store, simple(15.0), updates=15)
    saved(store, simple(20.5), updates=20)
    assert weight(store.latest()) == 20.5
    assert names(store) == ["step_000000015", "step_000000020-2", "step_000000030"]


# Harmless


class Payload:
    """Runs a command when it is unpickled carelessly."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("how", ["torch", "pickle", "legacy"])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("name", ["state.pt", "rollback.pt"])
def test_planted_code_does_not_run(tmp_path: Path, how: str, alone: bool, name: str) -> None:
    """Even with a manifest that vouches for it, the file is refused by name."""
    marker = tmp_path / "ran"
    store = CheckpointStore(tmp_path)
    if not alone:
        saved(store, simple(1.0), updates=1)
    saved(store, simple(2.0), updates=2, further={"rollback.pt": simple(1.0)})
    path = store.folder / "step_000000002"
    state = {"model": {"weight": torch.ones(2)}, "extra": Payload(marker)}
    if how == "pickle":
        (path / name).write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, path / name, _use_new_zipfile_serialization=how == "torch")
    data = (path / name).read_bytes()
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"][name] = {"size": len(data), "sha256": [hashlib.sha256(data).hexdigest()]}
    (path / "manifest.json").write_text(manifest_text(manifest))
    if alone:
        with pytest.raises(ConfigurationError, match=name):
            store.latest()
    else:
        assert weight(store.latest()) == 1.0
    assert f"{name} holds more than tensors" in store.notes[0]
    assert not marker.exists()
    assert names(store)[-1] == "step_000000002.corrupt"
    # The same file, loaded carelessly, does run: the test would see it.
    with (store.folder / "step_000000002.corrupt" / name).open("rb") as file:
        if how == "pickle":
            pickle.load(file)
        else:
            torch.load(file, weights_only=False)
    assert marker.exists()


class Level(enum.IntEnum):
    """Looks like a number and is saved as a class."""

    LOW = 1


@pytest.mark.parametrize(
    "value",
    [collections.deque([1]), Path("a"), Level.LOW, object(), print, np.array(["a", None]), np.longdouble(1), Payload],
)
def test_what_is_not_plain_is_refused_by_name(tmp_path: Path, value: Any) -> None:
    """The error says where it is, and nothing is written."""
    store = CheckpointStore(tmp_path)
    with pytest.raises(TypeError, match=r"state\['parts'\]\[0\]\['memory'\] is a "):
        saved(store, {"parts": [{"memory": value}]}, updates=1)
    assert not store.folder.exists()


def test_plain_leaves_the_state_alone() -> None:
    """The given tree isn't changed, and large tensors aren't copied."""
    state: dict[str, Any] = {"a": [np.float64(1.0)], "b": torch.ones(3)}
    result = plain(state, "state")
    assert type(state["a"][0]) is np.float64
    assert result["b"].data_ptr() == state["b"].data_ptr()


def test_file_names_in_a_manifest_stay_in_its_folder(tmp_path: Path) -> None:
    """A manifest can't make us read elsewhere."""
    store = CheckpointStore(tmp_path)
    path = saved(store, simple(1.0), updates=1)
    assert path is not None
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"]["../../other"] = {"size": 1, "sha256": []}
    (path / "manifest.json").write_text(manifest_text(manifest))
    with pytest.raises(ConfigurationError, match="names the files"):
        store.latest()


# Called


def test_due(tmp_path: Path) -> None:
    """At epoch ends and after so many updates, by the counts alone: whatever was saved, resumed or rolled back."""
    occasions = CheckpointStore(tmp_path, every_updates=10, every_epochs=2).occasions
    mid_epoch = [updates for updates in range(35) if occasions.due(updates=updates, epoch_ended=False, epoch=0)]
    assert mid_epoch == [10, 20, 30]
    ends = [epoch for epoch in range(6) if occasions.due(updates=7, epoch_ended=True, epoch=epoch)]
    assert ends == [1, 3, 5]
    assert occasions.any and not occasions.overdue and not occasions.time_is_up
    nothing = CheckpointStore(tmp_path, every_updates=None, every_epochs=0).occasions
    assert not nothing.any
    assert not any(nothing.due(updates=n, epoch_ended=end, epoch=n) for n in range(99) for end in (False, True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_last": 0}, "checkpoint.keep_last=0: give a whole number, at least 1"),
        ({"keep_last": 1.5}, "checkpoint.keep_last=1.5"),
        ({"every_updates": 0}, "checkpoint.every_updates=0"),
        ({"every_epochs": -1}, "checkpoint.every_epochs=-1: give a whole number, at least 0"),
        ({"keep_every": 0}, "checkpoint.keep_every=0: give a whole number, at least 1"),
        ({"every_minutes": 0}, "checkpoint.every_minutes=0: give a number above 0, or null"),
        ({"every_minutes": float("inf")}, "checkpoint.every_minutes=inf"),
        ({"asynchronous": "no"}, "checkpoint.asynchronous='no': give true or false"),
        ({"mode": "least"}, "checkpoint.mode='least': give min"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    """What was given, what is allowed."""
    with pytest.raises(ConfigurationError) as caught:
        CheckpointStore(tmp_path, **settings)
    assert message in str(caught.value)


def test_load_from_a_given_place(tmp_path: Path) -> None:
    """A checkpoint's folder, the checkpoints' or a run's; a bad one is refused and left where it is."""
    store = CheckpointStore(tmp_path / "a")
    saved(store, simple(1.0), updates=1)
    saved(store, simple(2.0), updates=2)
    other = CheckpointStore(tmp_path / "b")
    assert weight(other.load(store.folder / "step_000000001")) == 1.0
    assert weight(other.load(tmp_path / "a")) == weight(other.load(str(store.folder))) == 2.0
    for missing in (tmp_path / "b", tmp_path / "nowhere"):
        with pytest.raises(ConfigurationError, match=f"no checkpoint in {missing}"):
            other.load(missing)
    flip(store.folder / "step_000000002" / "state.pt", 700)
    with pytest.raises(ConfigurationError, match=r"state\.pt is not what was written"):
        other.load(tmp_path / "a")
    assert names(store) == ["step_000000001", "step_000000002"]


def test_unknown_format_is_refused(tmp_path: Path) -> None:
    """A later version's checkpoint isn't set aside; the message says what to use."""
    store = CheckpointStore(tmp_path)
    path = saved(store, simple(1.0), updates=1)
    assert path is not None
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["format"] = 3
    (path / "manifest.json").write_text(manifest_text(manifest))
    for read in (store.latest, lambda: store.load(path)):
        with pytest.raises(ConfigurationError, match=r"has format 3.*reads format 2; use the version that wrote it"):
            read()
    assert names(store) == ["step_000000001"]
