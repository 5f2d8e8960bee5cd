"""What a run leaves behind: tables, TensorBoard events, summary, environment, console."""

from __future__ import annotations

import csv
import fcntl
import json
import logging
import math
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.plugin_event_accumulator import (  # type: ignore[import-untyped]
    TENSORS,
    EventAccumulator,
)
from tensorboard.plugins.hparams import plugin_data_pb2  # type: ignore[import-untyped]

from processes import run
from stabletrain import __version__
from stabletrain.errors import ConfigurationError
from stabletrain.state import Progress
from stabletrain.tracking import Tracker, describe_environment
from stabletrain.tracking.environment import git_commit, shortened
from stabletrain.tracking.table import Table

STEPS_PER_EPOCH = 7
REJECTED = (5, 6, 20, 23)
NO_PROGRESS = Progress()

# A parent imports torch once; its children log without end and are killed at random moments.
KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
import stabletrain.tracking.events
from stabletrain.state import Progress
from stabletrain.tracking import Tracker
chance, parent = random.Random(0), Path(sys.argv[1])
rows = 0
for number in range(15):
    folder = parent / str(number)
    folder.mkdir()
    child = os.fork()
    if child == 0:
        tracker = Tracker(folder, progress="none", log_every=1)
        tracker.begin({"lr": 0.1}, {}, None, Progress())
        steps = 0
        while True:
            steps += 1
            tracker.step({"epoch": 0, "step": steps - 1, "steps": steps, "updates": steps, "loss": 1.0 / steps,
                          "grad_norm": 1.0, "lr": 0.1, "applied": True, "reason": None})
            tracker.summary({"steps": steps, "filler": ["x" * 50] * 50})
    while not (folder / "summary.json").exists():
        time.sleep(0.001)
    time.sleep(0.03 * chance.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lines = (folder / "steps.csv").read_text().splitlines(keepends=True)
    assert all(line.endswith("\\n") and line.count(",") == 8 for line in lines), lines[-1]
    import json
    summary = json.loads((folder / "summary.json").read_text())
    assert len(lines) - 1 - summary["steps"] in (0, 1), (len(lines), summary["steps"])
    events = [event for path in sorted(folder.glob("events*")) for event in EventFileLoader(str(path)).Load()]
    steps = [event.step for event in events if any(value.tag == "step/loss" for value in event.summary.value)]
    assert steps == list(range(1, len(steps) + 1)) and len(lines) - 1 - len(steps) in (0, 1)
    rows += len(lines) - 1
print(rows)
"""

# Logs until nothing can be written any more, goes on, and logs again when there is space.
FULL = """
import csv, logging, resource, sys
from pathlib import Path
from stabletrain.state import Progress
from stabletrain.tracking import Tracker
logging.basicConfig(stream=sys.stderr, format="%(message)s")
folder = Path(sys.argv[1])
tracker = Tracker(folder, progress="none", log_every=1)
def step(steps):
    tracker.step({"epoch": 0, "step": steps - 1, "steps": steps, "updates": steps, "loss": 0.5, "grad_norm": 1.0,
                  "lr": 0.1, "applied": True, "reason": None})
    tracker.summary({"steps": steps, "filler": "x" * 5000})
if len(sys.argv) > 2:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), hard))
tracker.begin({"lr": 0.1}, {}, None, Progress())
for steps in range(1, 101):
    step(steps)
    tracker.state_dict()
tracker.epoch({"epoch": 0, "train_loss": 0.5, "lr": 0.1, "grad_norm": 1.0, "applied": 100, "rejected": 0})
assert tracker.errors > 50, tracker.errors
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
for steps in range(101, 111):
    step(steps)
tracker.finish({"steps": 110, "rejected": 0, "status": "completed"})
tracker.close()
lines = (folder / "steps.csv").read_text().splitlines()
rows = list(csv.DictReader(lines))
assert [int(row["steps"]) for row in rows[-10:]] == list(range(101, 111))
assert all(len(line.split(",")) == 9 for line in lines)
"""

TERMINAL = """
import sys, time
from stabletrain.state import Progress
from stabletrain.tracking import Tracker
tracker = Tracker(None)
tracker.begin({}, {}, 40, Progress())
for steps in range(1, 41):
    tracker.step({"epoch": 0, "step": steps - 1, "steps": steps, "updates": steps, "loss": 0.5, "grad_norm": 1.25,
                  "lr": 0.1, "applied": True, "reason": None})
    time.sleep(0.02)
tracker.finish({"steps": 40, "rejected": 0, "status": "completed"})
tracker.close()
"""


def script(text: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script of its own, which must succeed."""
    done = run([sys.executable, "-c", text, *map(str, arguments)])
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def step_record(steps: int, **more: Any) -> dict[str, Any]:
    """Return what the trainer would say of one step of a run in which some are rejected."""
    applied = steps not in REJECTED
    return {
        "epoch": (steps - 1) // STEPS_PER_EPOCH,
        "step": (steps - 1) % STEPS_PER_EPOCH,
        "steps": steps,
        "updates": steps - sum(number <= steps for number in REJECTED),
        "loss": 1 / (3 * steps) if applied else math.nan,
        "grad_norm": 1.5 if applied else math.inf,
        "lr": 1e-4,
        "applied": applied,
        "reason": None if applied else "loss",
        **more,
    }


def epoch_record(epoch: int) -> dict[str, Any]:
    """Return what the trainer would say of one epoch."""
    return {
        "epoch": epoch, "train_loss": 1 / (epoch + 3), "val_loss": 0.25, "val_accuracy": 0.9, "lr": 1e-4,
        "grad_norm": 1.5, "applied": 6, "rejected": 1, "salvaged": 0, "seconds": time.time(),
    }  # fmt: skip


def drive(tracker: Tracker, first: int, last: int) -> None:
    """Tell the tracker of the steps from `first` to `last`, and of the epochs that end on the way."""
    for steps in range(first, last + 1):
        record = step_record(steps)
        if not record["applied"]:
            tracker.rejected(record, range(32))
        tracker.step(record)
        if steps % STEPS_PER_EPOCH == 0:
            tracker.epoch(epoch_record(record["epoch"]))


def progress_at(steps: int) -> Progress:
    """Return where a run stands that has taken `steps` steps."""
    epoch, step = divmod(steps, STEPS_PER_EPOCH)
    return Progress(epoch=epoch, step=step, steps=steps, updates=step_record(steps)["updates"] if steps else 0)


def quiet(folder: Path | None, **options: Any) -> Tracker:
    """Return a tracker that shows nothing, after its beginning."""
    tracker = Tracker(folder, **{"progress": "none", "log_every": 3, **options})
    tracker.begin({"seed": 0}, {}, 28, NO_PROGRESS)
    return tracker


def rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_events(folder: Path) -> Any:
    """Return what TensorBoard itself reads from a run's folder, every point of it."""
    accumulator = EventAccumulator(str(folder), size_guidance={TENSORS: 0})
    accumulator.Reload()
    return accumulator


def texts(accumulator: Any, tag: str) -> list[str]:
    """Return the texts under a tag."""
    return [event.tensor_proto.string_val[0].decode() for event in accumulator.Tensors(f"{tag}/text_summary")]


def curve(accumulator: Any, tag: str) -> dict[int, float]:
    """Return the points of a curve; each step has one."""
    points = accumulator.Tensors(tag)
    found = {point.step: float(point.tensor_proto.float_val[0]) for point in points}
    assert len(found) == len(points)
    return found


# Tables


def test_steps_table(tmp_path: Path) -> None:
    """Each third step and each rejected one; numbers read back exactly; nothing that depends on the clock."""
    tracker = quiet(tmp_path)
    drive(tracker, 1, 10)
    tracker.step(step_record(12, seconds=0.5, samples_per_second=64.0, unknown=1))
    tracker.close()
    header = "epoch,step,steps,updates,loss,grad_norm,lr,applied,reason"
    assert (tmp_path / "steps.csv").read_text().splitlines()[0] == header
    found = rows(tmp_path / "steps.csv")
    assert [int(row["steps"]) for row in found] == [3, 5, 6, 9, 12]
    assert float(found[0]["loss"]) == 1 / 9 and float(found[0]["lr"]) == 1e-4
    assert math.isnan(float(found[1]["loss"])) and float(found[1]["grad_norm"]) == math.inf
    assert [row["applied"] for row in found] == ["1", "0", "0", "1", "1"]
    assert [row["reason"] for row in found] == ["", "loss", "loss", "", ""]
    assert found[4]["epoch"] == "1" and found[4]["step"] == "4" and found[4]["updates"] == "10"


def test_history_table(tmp_path: Path) -> None:
    """The columns of the design in its order, whatever the metrics are called; the first row decides."""
    tracker = quiet(tmp_path)
    record = epoch_record(0)
    tracker.epoch({name: record[name] for name in sorted(record, reverse=True)} | {"val_f1": 0.5})
    tracker.epoch({**epoch_record(1), "val_other": 1.0, "val_accuracy": None})
    tracker.close()
    header, first, second = (tmp_path / "history.csv").read_text().splitlines()
    assert header == "epoch,train_loss,val_loss,val_accuracy,val_f1,lr,grad_norm,applied,rejected,salvaged"
    assert first == "0,0.3333333333333333,0.25,0.9,0.5,0.0001,1.5,6,1,0"
    assert second == "1,0.25,0.25,,,0.0001,1.5,6,1,0"


def test_the_loss_scale_is_a_column_where_there_is_one(tmp_path: Path) -> None:
    """In fp16 the records carry it."""
    tracker = quiet(tmp_path, log_every=1)
    tracker.step(step_record(1, scale=1024.0))
    tracker.close()
    assert rows(tmp_path / "steps.csv")[0]["scale"] == "1024.0"


@pytest.mark.parametrize("reason", ["a,b", 'say "no"', "two\nlines", "grün"])
def test_odd_text_stays_in_its_cell(tmp_path: Path, reason: str) -> None:
    """A row stays one line, and a reader of CSV gets the text back."""
    tracker = quiet(tmp_path)
    tracker.step(step_record(5) | {"reason": reason})
    tracker.step(step_record(6))
    tracker.close()
    assert len((tmp_path / "steps.csv").read_text().splitlines()) == 3
    assert rows(tmp_path / "steps.csv")[0]["reason"] == reason.replace("\n", " ")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    """Read the files of a run of 28 steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    tracker = quiet(folder)
    drive(tracker, 1, 28)
    tracker.close()
    return lambda name: (folder / name).read_bytes()


@settings(max_examples=60, deadline=None)
@given(saved=st.integers(0, 27), more=st.integers(0, 27), torn=st.integers(0, 60))
def test_resumed_tables_equal_the_undisturbed_ones(
    tmp_path_factory: pytest.TempPathFactory,
    undisturbed: Callable[[str], bytes],
    saved: int,
    more: int,
    torn: int,
) -> None:
    """Wherever the checkpoint lay, whenever the run was killed, however much of a row was there: byte for byte."""
    folder = tmp_path_factory.mktemp("run")
    tracker = quiet(folder, tensorboard=False)
    drive(tracker, 1, min(28, saved + more))
    tracker.close()
    for name in ("steps.csv", "history.csv"):
        with (folder / name).open("ab") as file:
            file.write(undisturbed(name)[-torn - 1 : -1] if torn else b"")
    resumed = Tracker(folder, tensorboard=False, progress="none", log_every=3)
    resumed.begin({}, {}, 28, progress_at(saved))
    drive(resumed, saved + 1, 28)
    resumed.close()
    for name in ("steps.csv", "history.csv"):
        assert (folder / name).read_bytes() == undisturbed(name)


def test_a_run_that_starts_anew_begins_its_tables_anew(tmp_path: Path) -> None:
    """Rows and columns of an earlier attempt that saved nothing are gone."""
    tracker = quiet(tmp_path, log_every=1)
    tracker.step(step_record(1, scale=2.0))
    tracker.close()
    again = quiet(tmp_path, log_every=1)
    again.step(step_record(1))
    again.close()
    assert list(rows(tmp_path / "steps.csv")[0])[-1] == "reason" and len(rows(tmp_path / "steps.csv")) == 1


def test_truncate_needs_no_space_and_no_file(tmp_path: Path) -> None:
    """It cuts in place, and a table that was never begun is fine."""
    table = Table(tmp_path / "a.csv", columns=("step",))
    table.truncate("step", 3)
    assert not (tmp_path / "a.csv").exists()
    for step in range(5):
        table.add({"step": step})
    before = (tmp_path / "a.csv").stat().st_ino
    table.truncate("step", 3)
    assert (tmp_path / "a.csv").read_text() == "step\n0\n1\n2\n" and (tmp_path / "a.csv").stat().st_ino == before
    (tmp_path / "a.csv").write_text("step,loss\n0,0.5\n1,0.25")  # the last row is torn: perhaps it was 0.2512
    table.truncate("step", 3)
    assert (tmp_path / "a.csv").read_text() == "step,loss\n0,0.5\n"
    (tmp_path / "a.csv").write_text("something else\n1\n")
    table.truncate("step", 3)
    assert (tmp_path / "a.csv").read_text() == ""


# TensorBoard


def test_tensorboard_reads_the_curves(tmp_path: Path) -> None:
    """With TensorBoard's own reader, which checks every checksum, while the run goes on."""
    tracker = quiet(tmp_path)
    drive(tracker, 1, 14)
    found = read_events(tmp_path)
    loss = curve(found, "step/loss")
    assert list(loss) == [3, 9, 12] and loss[9] == pytest.approx(1 / 27)  # NaN can't be drawn: the counter says it
    assert curve(found, "guard/rejected") == {3: 0, 5: 1, 6: 2, 9: 2, 12: 2}
    assert curve(found, "epoch/val_accuracy") == pytest.approx({7: 0.9, 14: 0.9})
    assert min(curve(found, "time/steps_per_second").values()) > 0
    assert len(curve(found, "time/epoch_seconds")) == 2
    assert not {"step/epoch", "step/updates", "step/applied", "epoch/epoch"} & set(found.Tags()[TENSORS])
    tracker.close()


def test_tensorboard_shows_incidents_config_and_hparams(tmp_path: Path) -> None:
    """As text and in the HPARAMS tab, in the run's own folder and no other."""
    tracker = Tracker(tmp_path, progress="none", log_every=3)
    config = {
        "seed": 3, "optimizer": {"_target_": "a.B", "lr": 0.5, "betas": [0.9, 0.99]}, "debug": False, "name": "grün",
        "limit": math.inf, "threads": None,
    }  # fmt: skip
    tracker.begin(config, {}, 28, NO_PROGRESS)
    drive(tracker, 1, 5)
    tracker.warning("validation is not finite")
    metrics = {"test": {"accuracy": 0.75, "loss": math.nan}, "best": {}}
    tracker.finish({"status": "completed", "steps": 5, "rejected": 1, "metrics": metrics})
    tracker.close()
    found = read_events(tmp_path)
    assert "      lr: 0.5\n" in texts(found, "config")[0]
    assert len(texts(found, "guard/rejected")) == 1 and "samples [0, 1, " in texts(found, "guard/rejected")[0]
    assert texts(found, "warning") == ["validation is not finite"]
    assert curve(found, "test/accuracy") == {5: 0.75}
    parts = {}
    for name in ("session_start_info", "session_end_info"):
        content = found.SummaryMetadata(f"_hparams_/{name}").plugin_data
        assert content.plugin_name == "hparams"
        parts[name] = getattr(plugin_data_pb2.HParamsPluginData.FromString(content.content), name)
    hparams = parts["session_start_info"].hparams
    assert set(hparams) == {"seed", "optimizer.lr", "optimizer.betas", "debug", "name", "limit", "threads"}
    assert (hparams["seed"].number_value, hparams["optimizer.lr"].number_value) == (3, 0.5)
    assert hparams["debug"].WhichOneof("kind") == "bool_value" and hparams["name"].string_value == "grün"
    assert parts["session_end_info"].status == 1  # success
    assert [path.name for path in tmp_path.rglob("*tfevents*")] == [path.name for path in tmp_path.glob("*tfevents*")]


def test_tensorboard_hides_what_lies_after_the_checkpoint(tmp_path: Path) -> None:
    """After a resumption each step has one point, though the file of the killed attempt still holds others."""
    tracker = quiet(tmp_path)
    drive(tracker, 1, 24)
    tracker.close()
    with next(tmp_path.glob("events*")).open("ab") as file:
        file.write(b"\x10\x00\x00")  # killed while it wrote a record
    resumed = Tracker(tmp_path, progress="none", log_every=3)
    resumed.begin({}, {}, 28, progress_at(12))
    drive(resumed, 13, 28)
    resumed.close()
    found = read_events(tmp_path)
    assert list(curve(found, "step/loss")) == [3, 9, 12, 15, 18, 21, 24, 27]
    assert list(curve(found, "epoch/train_loss")) == [7, 14, 21, 28]
    assert [event.step for event in found.Tensors("guard/rejected/text_summary")] == list(REJECTED)
    assert len(list(tmp_path.glob("events*"))) == 2


def test_tensorboard_forgets_an_attempt_that_starts_anew(tmp_path: Path) -> None:
    """Nothing of it is shown any more."""
    first = quiet(tmp_path)
    drive(first, 1, 9)
    first.close()
    second = quiet(tmp_path)
    drive(second, 1, 3)
    second.close()
    assert list(curve(read_events(tmp_path), "step/loss")) == [3]


def test_files_are_whole_when_killed_at_any_moment(tmp_path: Path) -> None:
    """After kill -9: whole rows, valid JSON, every event readable, and at most one record behind another."""
    assert int(script(KILLED, tmp_path).stdout) > 15


@pytest.mark.parametrize("room", [0, 300, 3000])
def test_a_full_disk_does_not_stop_training(tmp_path: Path, room: int) -> None:
    """It is said once and counted; when there is space again the records go on, and what is there is whole."""
    done = script(FULL, tmp_path, room)
    assert done.stderr.count("records can't be written") == 1
    assert done.stdout.splitlines()[-1] == "0 of 110 steps were rejected"
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 110
    if room > 0:  # with 0, not even the file of curves could be begun
        assert set(range(101, 111)) <= set(curve(read_events(tmp_path), "step/loss"))


def test_a_vanished_folder_does_not_stop_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nor does it fill the log."""
    tracker = Tracker(tmp_path / "nowhere", progress="none", log_every=1)
    tracker.begin({}, {}, None, NO_PROGRESS)
    for steps in range(1, 4):
        tracker.step(step_record(steps))
    tracker.summary({"steps": 3})
    tracker.close()
    assert tracker.errors >= 7
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


# Summary, configuration, environment


def test_summary_is_strict_json_and_replaced_whole(tmp_path: Path) -> None:
    """NaN, which isn't JSON, becomes null; nothing lies aside."""
    tracker = quiet(tmp_path)
    for loss in (1.0, math.nan):
        tracker.summary({"status": "running", "metrics": {"final": {"loss": loss}}, "quarantined": (1, 2)})
    found = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert found == {"status": "running", "metrics": {"final": {"loss": None}}, "quarantined": [1, 2]}
    assert not list(tmp_path.glob(".tmp*"))
    tracker.close()


def test_configuration_and_environment(tmp_path: Path) -> None:
    """The resolved configuration reads back; the environment says what a run was made with."""
    tracker = Tracker(tmp_path, progress="none", tensorboard=False)
    config = {"lr": 1e-4, "betas": (0.9, 0.99), "path": Path("x.csv"), "off": None, "name": "grün", "flag": True}
    tracker.begin(config, {"device": "cpu", "seed": 0, "preset": "safe"}, 28, NO_PROGRESS, overrides=["seed=0", "a=b"])
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {
        "lr": 1e-4, "betas": [0.9, 0.99], "path": "x.csv", "off": None, "name": "grün", "flag": True,
    }  # fmt: skip
    assert yaml.safe_load((tmp_path / "overrides.yaml").read_text()) == ["seed=0", "a=b"]
    found = json.loads((tmp_path / "environment.json").read_text())
    assert found["seed"] == 0 and found["device"] == "cpu" and found["preset"] == "safe" and found["threads"] >= 1
    assert found["versions"]["stabletrain"] == __version__
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "numpy", "hydra-core", "scikit-learn"} <= set(found["versions"])
    assert str(Path.home()) not in (tmp_path / "environment.json").read_text()
    assert not list(tmp_path.glob("events*"))
    tracker.close()


def test_git_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit of the repository that the program was started in; None elsewhere and without git."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert git_commit() is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "--no-verify", "-m", "first"], check=True)
    expected = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert git_commit() == expected and describe_environment(seed=1)["git_commit"] == expected
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() is None


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("/opt/venv/bin/python", "python"),
        ("--config-dir=/home/me/conf", "--config-dir=conf"),
        ("hydra.searchpath=[file:///home/me/conf,/a/b]", "hydra.searchpath=[file://conf,b]"),
        ("data.path='/home/me/a b.csv'", "data.path='a b.csv'"),
        ("data.path=sub/x.csv", "data.path=sub/x.csv"),
        ("url=http://host/x", "url=http://host/x"),
        ("ratio=1/2", "ratio=1/2"),
    ],
)
def test_command_line_holds_no_absolute_paths(word: str, expected: str) -> None:
    """Whoever gets the folder doesn't learn where it was made."""
    assert shortened([word]) == [expected]


# Console


def test_rejections_are_logged_one_line_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With step, reason, values and the first 20 samples."""
    tracker = quiet(tmp_path)
    tracker.rejected(step_record(5), [7, 8], "layer.weight")
    tracker.rejected(step_record(6), range(100, 164))
    tracker.close()
    first, second = (record.getMessage() for record in caplog.records)
    assert first == (
        "step 5 (epoch 0, step 4) rejected: loss: layer.weight; loss nan, gradient norm inf; samples [7, 8]"
    )
    assert second.endswith("117, 118, 119] and 44 more")


@pytest.mark.parametrize("style", ["lines", "bar", "none"])
def test_last_line_counts_the_rejected_steps(tmp_path: Path, style: str, capsys: pytest.CaptureFixture[str]) -> None:
    """However little is shown."""
    tracker = quiet(tmp_path, progress=style)
    drive(tracker, 1, 28)
    tracker.finish({"status": "completed", "steps": 28, "rejected": 4, "metrics": {"test": {"accuracy": 0.5}}})
    tracker.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == ["test: accuracy 0.5", f"completed: {tmp_path}", "4 of 28 steps were rejected"]
    assert any(line.startswith("epoch 3 train_loss 0.1667") for line in lines) == (style != "none")


def test_without_a_folder_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A notebook's run without a name."""
    monkeypatch.chdir(tmp_path)
    tracker = quiet(None)
    drive(tracker, 1, 28)
    tracker.finish({"status": "completed", "steps": 28, "rejected": 4})
    tracker.close()
    assert tracker.errors == 0 and list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out.splitlines() == ["completed", "4 of 28 steps were rejected"]


@pytest.mark.parametrize("terminal", [True, False])
def test_bar_in_a_terminal_and_lines_elsewhere(terminal: bool) -> None:
    """The bar carries loss, gradient norm, learning rate and both counts."""
    if not terminal:
        done = script(TERMINAL)
        assert done.stderr == "" and done.stdout.splitlines()[-1] == "0 of 40 steps were rejected"
        return
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    words = [sys.executable, "-c", TERMINAL]
    done = run(words, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:
        pass  # all was read: the other side is closed
    os.close(ours)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "0 of 40 steps were rejected"
    assert b"\r" in shown and b"loss 0.5 norm 1.25 lr 0.1 applied " in shown and b"rejected 0" in shown


def test_closed_output_does_not_stop_training() -> None:
    """As when the reader of a pipe has gone."""
    text = TERMINAL.replace("Tracker(None)", "Tracker(None, progress='lines')") + "\nassert tracker.errors > 0"
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-u", "-c", text]
    done = run(words, stdout=writer)
    os.close(writer)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_every": 0}, "log_every=0: give a whole number of steps, at least 1"),
        ({"log_every": 2.5}, "log_every=2.5"),
        ({"progress": "loud"}, "tracking.progress='loud': give auto, bar, lines or none"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    """What was given, what is allowed."""
    with pytest.raises(ConfigurationError) as caught:
        Tracker(tmp_path, **options)
    assert message in str(caught.value)


def test_counts_are_kept(tmp_path: Path) -> None:
    """Failures are remembered over a restart."""
    tracker = Tracker(tmp_path / "nowhere", progress="none", tensorboard=False)
    tracker.summary({})
    again = Tracker(tmp_path, progress="none")
    again.load_state_dict(tracker.state_dict())
    assert again.errors == 1


def test_tensorboard_is_loaded_only_when_it_is_used() -> None:
    """And then its messages alone: its writers take longer to import than everything else here."""
    code = """
import sys, tempfile
from stabletrain.state import Progress
from stabletrain.tracking import Tracker
with tempfile.TemporaryDirectory() as folder:
    tracker = Tracker(folder, tensorboard=False, progress="none")
    tracker.begin({}, {}, None, Progress())
    tracker.close()
    print("without:", *(name for name in sys.modules if name.startswith("tensorboard")))
    tracker = Tracker(folder, progress="none")
    tracker.begin({}, {}, None, Progress())
    tracker.close()
heavy = [name for name in sys.modules if "event_file_writer" in name or name.startswith(("tensorflow", "grpc"))]
print("with:", "tensorboard" in sys.modules, *heavy)
"""
    assert script(code).stdout.splitlines() == ["without:", "with: True"]
