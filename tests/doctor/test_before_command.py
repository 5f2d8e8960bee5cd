"""`python -m stabletrain doctor`: real processes, their exit codes, and what they leave behind."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import sys
import termios
from pathlib import Path

import numpy as np
import pytest

from composed import checked
from processes import ENVIRONMENT, run, started
from stabletrain.__main__ import main
from stabletrain.doctor.before import examine


def command(*words, folder):
    return run([sys.executable, "-m", "stabletrain", "doctor", *words], folder)


def report(folder):
    return json.loads((folder / "doctor.json").read_text())


@pytest.mark.parametrize("experiment", ["digits", "tabular", "sequences"])
@pytest.mark.parametrize("preset", ["normal", "stable", "safe"])
def test_what_is_shipped_is_clean(experiment, preset):
    found = examine(checked(f"experiment={experiment}", f"preset={preset}", "device=cpu"))
    assert found.findings == []
    assert found.facts["learning_rate"]["said"] == ""
    rates = found.facts["learning_rate"]
    assert 4 * rates["configured"] < rates["stable"] < rates["unstable"] <= 2.01 * rates["stable"]


def test_a_clean_run_ends_with_0_and_leaves_one_file(tmp_path):
    ran = command("experiment=tabular", "+preset=safe", "device=cpu", folder=tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines()[0] == "doctor: experiment=tabular preset=safe device=cpu"
    assert ran.stdout.splitlines()[-1].startswith("clean: nothing found (")
    assert [path.name for path in tmp_path.iterdir()] == ["doctor.json"]
    content = report(tmp_path)
    assert (content["verdict"], content["exit_code"], content["findings"]) == ("clean", 0, [])


def test_warnings_end_with_1_and_a_remedy_that_works(tmp_path):
    ran = command("experiment=tabular", "schedule=constant", "device=cpu", "to=out", folder=tmp_path)
    assert (ran.returncode, ran.stderr) == (1, "")
    assert "warning  settings: no warm-up of the learning rate" in ran.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    [found] = report(tmp_path / "out")["findings"]
    assert f"remedy:   {found['remedy']}" in ran.stdout
    cured = command("experiment=tabular", "schedule=constant", found["remedy"], "device=cpu", folder=tmp_path)
    assert cured.returncode == 0


def poisoned(path: Path) -> None:
    random = np.random.default_rng(0)
    inputs = random.normal(size=(200, 3)).astype(np.float32)
    inputs[[17, 150], 1] = np.nan
    np.savez(path, x=inputs, y=(inputs[:, 0] > 0).astype(np.int64))


def test_broken_data_end_with_3_and_the_remedy_of_the_message(tmp_path):
    poisoned(tmp_path / "mine.npz")
    words = ("data=npz", "data.path=mine.npz", "model=mlp", "device=cpu")
    ran = command(*words, folder=tmp_path)
    assert (ran.returncode, ran.stderr) == (3, "")
    assert "broken   data: the data can't be used" in ran.stdout
    [found] = report(tmp_path)["findings"]
    assert "row 17" in found["evidence"]
    assert command(*words, "data.nonfinite=drop", folder=tmp_path).returncode == 0


def test_a_data_set_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "class Data(torch.utils.data.Dataset):\n"
        "    def __init__(self):\n"
        "        self.x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))\n"
        "        self.targets = (self.x[:, 0] > 0).long()\n"
        "        self.x[[5, 60, 120]] = float('nan')\n"
        "    def __len__(self):\n"
        "        return 200\n"
        "    def __getitem__(self, index):\n"
        "        return self.x[index], self.targets[index]\n"
    )
    words = (
        "data=dataset",
        "data.dataset._target_=mine.Data",
        "model=mlp",
        "device=cpu",
        "data.validation=0",
        "data.test=0",
    )
    ran = command(*words, folder=tmp_path)
    assert ran.returncode == 3
    [found] = report(tmp_path)["findings"]
    assert found["samples"] == [5, 60, 120]
    assert found["remedy"] == "guard=salvage guard.scan=true"
    # The run with it leaves them out.
    trained = run(
        [sys.executable, "-m", "stabletrain", *words, *found["remedy"].split(), "epochs=1", "name=cured"], tmp_path
    )
    assert trained.returncode == 0
    summary = json.loads((tmp_path / "runs" / "cured" / "summary.json").read_text())
    assert summary["quarantined"] == [5, 60, 120]
    assert summary["rejected"] == 0


def test_a_rate_that_is_too_high_is_told_with_one_that_holds(tmp_path):
    words = ("experiment=tabular", "device=cpu")
    assert command(*words, "base_lr=30", folder=tmp_path).returncode in (1, 3)
    [found] = report(tmp_path)["findings"]
    assert (found["check"], found["where"]) == ("rate", "settings")
    assert found["remedy"].startswith("base_lr=")
    assert command(*words, found["remedy"], folder=tmp_path).returncode == 0


def test_a_misspelled_key_ends_with_2(tmp_path):
    ran = command("epoch=3", folder=tmp_path)
    assert ran.returncode == 2
    assert ran.stderr.startswith("stabletrain: ")
    assert ran.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_setting_that_does_not_fit_ends_with_2_as_in_training(tmp_path):
    ran = command("experiment=tabular", "batch_size=100000", "device=cpu", folder=tmp_path)
    assert ran.returncode == 2
    assert "choose a batch_size" in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_sweeps_and_ranks_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "-m", "seed=0,1"]) == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["doctor", "seed=0"]) == 2
    assert capsys.readouterr().err.count("one run in one process") == 2


def test_help_needs_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--help"]) == 0
    assert "doctor env" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_environment(tmp_path):
    ran = command("env", folder=tmp_path)
    assert ran.returncode in (0, 1)  # a machine may be short of memory
    assert "torch" in ran.stdout
    assert report(tmp_path)["subject"] == "env"
    assert command("env", "seed=1", folder=tmp_path).returncode == 2


def on_a_terminal(words: list[str], folder: Path) -> tuple[int, str]:
    """Run a program whose standard output and error are a terminal, and return its exit code and what it showed."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    environment = {**ENVIRONMENT, "COLUMNS": "120", "TERM": "xterm"}
    shown = b""
    with started(words, folder, environment, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # Linux says so when the other end is closed
                break
            if not piece:
                break
            shown += piece
        code = process.wait(60)
    os.close(ours)
    return code, shown.decode(errors="replace")


def test_a_terminal_gets_a_table_and_a_bar(tmp_path):
    words = [sys.executable, "-m", "stabletrain", "doctor", "experiment=tabular", "schedule=constant", "device=cpu"]
    code, shown = on_a_terminal(words, tmp_path)
    assert code == 1
    for said in ("severity", "what to do", "no warm-up of the learning rate", "┃", "training data", "0/397"):
        assert said in shown
