"""Every command of the README is run, with the installed wheel, from a folder that isn't the checkout."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

from installation import Installation
from processes import run, started

PROJECT = Path(__file__).resolve().parents[1]
README = (PROJECT / "README.md").read_text()


@dataclass(frozen=True)
class Block:
    language: str
    kind: str
    text: str


BLOCKS = [Block(*found) for found in re.findall(r"```(\w+) ?(\w*)\n(.*?)```", README, re.DOTALL)]
SHELL = [
    [line.partition("  #")[0].strip() for line in block.text.splitlines() if line.strip()]
    for block in BLOCKS
    if block.language == "sh"
]
COMMANDS = [command for commands in SHELL for command in commands]
PROGRAMS = [commands for commands in SHELL if commands[0].startswith("python -m stabletrain")]
LAUNCHES = [command for command in COMMANDS if command.startswith("torchrun ")]
TARGETS = [command for command in COMMANDS if command.startswith("make ")]


def python_block(kind: str) -> str:
    [block] = [block for block in BLOCKS if (block.language, block.kind) == ("python", kind)]
    return block.text


def write_files(folder: Path) -> None:
    """Write the README's files: blocks whose first line is a comment with a path; and the table that it names."""
    written = 0
    for block in BLOCKS:
        if (found := re.match(r"# (\S+\.(?:py|yaml))\n", block.text)) is not None:
            path = folder / found[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
            written += 1
    assert written == 3
    rows = [["height", "weight", "kind"]]
    rows += [[str(i % 7), "nan" if i == 50 else str(i % 5), "ab"[i % 7 > 3]] for i in range(200)]
    (folder / "mine.csv").write_text("".join(",".join(row) + "\n" for row in rows))


def test_every_command_is_one_that_this_test_knows() -> None:
    assert sum(map(len, PROGRAMS)) >= 8
    assert set(COMMANDS) == {*(command for commands in PROGRAMS for command in commands), *TARGETS, *LAUNCHES}


@pytest.mark.parametrize("commands", PROGRAMS, ids=lambda commands: commands[0])
def test_the_commands_of_stabletrain(commands: list[str], installed: Installation, tmp_path: Path) -> None:
    write_files(tmp_path)
    for command in commands:
        words = shlex.split(command)
        done = installed.run(words[0], *words[1:], folder=tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        if "--cfg" in words:
            assert "max_norm" not in done.stdout
        elif "export" in words:
            assert "model.safetensors: the weights of runs/base/checkpoints/" in done.stdout
        elif "doctor" in words:
            assert "clean: nothing found" in done.stdout
        else:
            assert re.search(r"0 of \d+ steps were rejected|completed", done.stdout), command
    run = tmp_path / "runs" / "first"
    if run.exists():
        summary = json.loads((run / "summary.json").read_text())
        assert (summary["status"], summary["updates"], summary["preset"]) == ("completed", 117, "normal")
    run = tmp_path / "runs" / "mine"
    if run.exists():
        assert len((run / "history.csv").read_text().splitlines()) == 1 + 3  # a header, three epochs


def test_the_folder_of_a_run_holds_what_the_table_says(installed: Installation, tmp_path: Path) -> None:
    done = installed.run("python", "-m", "stabletrain", "name=mine", "epochs=1", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    section = README.partition("## What a run leaves behind")[2].partition("\n## ")[0]
    named = {word.rstrip("/").rstrip("…") for row in section.splitlines() if row.startswith("| `")
             for word in re.findall(r"`([\w.…/]+)`", row.split("|")[1])}  # fmt: skip
    there = [entry.name for entry in (tmp_path / "runs" / "mine").iterdir() if not entry.name.startswith(".")]
    assert len(named) == 8
    for name in named:
        assert any(entry.startswith(name) for entry in there), name
    assert all(any(entry.startswith(name) for name in named) for entry in there), there


@pytest.mark.parametrize("command", LAUNCHES)
def test_several_processes(command: str, installed: Installation, tmp_path: Path) -> None:
    words = shlex.split(command)[1:]  # the program itself is a script of torch's for the module
    done = installed.run("python", "-m", "torch.distributed.run", "--standalone", *words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    [run] = (tmp_path / "runs").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["preset"], summary["rejected"]) == ("completed", "stable", 0)


@pytest.mark.parametrize("command", TARGETS)
def test_the_targets_of_make(command: str) -> None:
    """What make would do, without doing it: `make test` is what runs this test, and the rest is run elsewhere."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = run([*shlex.split(command), "--dry-run"], PROJECT, environment)
    assert done.returncode == 0, done.stderr
    expected = {
        "test": "-m pytest",
        "test-integrations": "tests/integrations",
        "train-stable-multi": "--nproc-per-node 2 -m stabletrain +preset=stable parallel=ddp",
        "train-semantic-recommendation": "-m stabletrain +experiment=semantic_recommendation +preset=stable",
        "train-semantic-recommendation-safe": "-m stabletrain +experiment=semantic_recommendation +preset=safe",
        "checks": "-m mypy",
        "setup": "pip install",
    }
    target = command.split()[1]
    preset = target.removeprefix("train-")
    wanted = expected.get(target, f"-m stabletrain +preset={preset}")
    assert wanted in done.stdout or (target == "setup" and "ready" in done.stdout)


def test_the_three_lines_for_a_loop_of_your_own(installed: Installation, tmp_path: Path) -> None:
    before, after = python_block("before"), python_block("after")
    start = """
import torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
criterion = torch.nn.CrossEntropyLoss()
inputs, labels = torch.randn(64, 4), torch.randint(0, 2, (64,))
inputs[5] = float("nan")
loader = list(zip(inputs.split(16), labels.split(16)))
class Scheduler:
    steps = 0
    def step(self):
        self.steps += 1
scheduler = Scheduler()
"""
    end = """
print(all(bool(torch.isfinite(tensor).all()) for tensor in model.state_dict().values()), scheduler.steps)
"""
    for text, said in ((before, "False 4"), (after, "True 3")):
        done = installed.run("python", "-c", start + text + end, folder=tmp_path)
        assert done.stdout.strip() == said, done.stderr
    same = set(before.splitlines()) & set(after.splitlines())
    assert len([line for line in after.splitlines() if line.strip() and line not in same]) <= 5


def test_the_notebook(installed: Installation, tmp_path: Path) -> None:
    text = python_block("notebook")
    assert len(text.strip().splitlines()) <= 15
    done = installed.run("python", "-W", "error", "-c", text, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith("completed {'loss'")
    assert (tmp_path / "runs" / "notebook" / "summary.json").exists()


def test_a_trained_model_is_loaded(installed: Installation, tmp_path: Path) -> None:
    done = installed.run("python", "-m", "stabletrain", "name=mine", "epochs=1", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    text = f"import torch\nimages = torch.zeros(3, 1, 8, 8)\n{python_block('inference')}print(classes.shape)"
    done = installed.run("python", "-W", "error", "-c", text, folder=tmp_path)
    assert done.stdout.strip() == "torch.Size([3])", done.stderr


def test_your_own_model_and_data_take_at_most_20_lines() -> None:
    section = README.partition("## Your own model and data")[2].partition("It is split")[0]
    blocks = re.findall(r"```[\w ]+\n(.*?)```", section, re.DOTALL)
    assert len([line for block in blocks for line in block.splitlines() if line.strip()]) <= 20


def test_tensorboard_shows_a_run(installed: Installation, tmp_path: Path) -> None:
    done = installed.run("python", "-m", "stabletrain", "name=shown", "epochs=1", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "`tensorboard --logdir runs`" in README
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "tensorboard.main", "--logdir", "runs", "--port", str(port), "--host", "127.0.0.1"]
    with started(words, tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        assert "shown" in _runs(port)


def _runs(port: int) -> list[str]:
    """Ask the server for the runs that it has found, until it has started and found one."""
    for _ in range(240):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/runs", timeout=5) as answer:
                runs: list[str] = json.load(answer)
            if runs:
                return runs
        except OSError:
            pass  # not up yet
        time.sleep(0.25)
    return []


def test_every_option_that_the_table_of_groups_names_is_there() -> None:
    section = README.partition("## Groups")[2].partition("\n## ")[0]
    rows = [row.split("|")[1:3] for row in section.splitlines() if row.startswith("| `") and ";" not in row]
    named = {(group.strip(" `"), option) for group, options in rows for option in re.findall(r"`(\w+)`", options)}
    there = {(path.parent.name, path.stem) for path in (PROJECT / "conf").glob("*/*.yaml")}
    assert named == there
    assert len(there) > 40
