"""The run folder: its lock, and files that are whole whatever happens."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from processes import started
from stabletrain.errors import ConfigurationError
from stabletrain.folder import AppendedFile, RunFolder, json_text, write_whole

HOLD = """
import os, sys, time
from stabletrain.folder import RunFolder
folder = RunFolder(sys.argv[1])
if sys.argv[2] == "forks" and os.fork() == 0:
    os.close(1)
    time.sleep(60)
print(os.getpid(), flush=True)
time.sleep(60)
"""

REPLACE = """
import sys
from pathlib import Path
from stabletrain.folder import write_whole
print("begins", flush=True)
number = 0
while True:
    number += 1
    write_whole(Path(sys.argv[1]), f"{number}\\n" * 20000)
"""


@contextmanager
def script(text: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Start a script of its own."""
    with started([sys.executable, "-c", text, *map(str, arguments)], stdout=subprocess.PIPE) as process:
        yield process


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Let the system refuse to make any file larger than `size` bytes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_write_whole_replaces_and_leaves_nothing_aside(tmp_path: Path) -> None:
    """Text and bytes are written as they are, over what was there."""
    write_whole(tmp_path / "a", "grün\n")
    assert (tmp_path / "a").read_bytes() == "grün\n".encode()
    write_whole(tmp_path / "a", b"\x00\xff")
    assert (tmp_path / "a").read_bytes() == b"\x00\xff"
    assert os.listdir(tmp_path) == ["a"]


def test_write_whole_killed_at_any_moment(tmp_path: Path) -> None:
    """After kill -9 the file is one of those that were written, complete; the run folder sweeps the rest."""
    path = tmp_path / "a.json"
    chance = random.Random(0)
    for _ in range(12):
        with script(REPLACE, path) as process:
            assert process.stdout is not None and process.stdout.readline() == "begins\n"
            time.sleep(0.01 + 0.05 * chance.random())
        if path.exists():
            lines = path.read_text().splitlines()
            assert len(lines) == 20000 and len(set(lines)) == 1
    assert path.exists()
    RunFolder(tmp_path).close()
    assert sorted(os.listdir(tmp_path)) == [".lock", "a.json"]


def test_write_whole_on_a_full_disk(tmp_path: Path) -> None:
    """The error reaches the caller, the old file stays, nothing lies aside."""
    path = tmp_path / "a"
    write_whole(path, "old")
    with files_limited_to(10_000), pytest.raises(OSError, match="too large"):
        write_whole(path, b"x" * 100_000)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_appended_file_takes_back_what_does_not_fit(tmp_path: Path) -> None:
    """A piece is there as a whole or not at all, and the file goes on when there is space again."""
    file = AppendedFile(tmp_path / "a")
    file.append(b"first\n")
    with files_limited_to(1000), pytest.raises(OSError, match="too large"):
        file.append(b"x" * 2000)
    assert (tmp_path / "a").read_bytes() == b"first\n"
    file.append(b"second\n")
    file.sync()
    file.close()
    file.close()
    again = AppendedFile(tmp_path / "a")
    again.append(b"third\n")
    again.close()
    assert (tmp_path / "a").read_bytes() == b"first\nsecond\nthird\n"


def test_second_trainer_is_refused_with_folder_and_pid(tmp_path: Path) -> None:
    """Another process can't have the folder until the first one is gone, even by kill -9."""
    with script(HOLD, tmp_path / "runs" / "a", "alone") as process:
        assert process.stdout is not None
        pid = process.stdout.readline().strip()
        with pytest.raises(ConfigurationError) as caught:
            RunFolder(tmp_path / "runs" / "a")
        assert str(tmp_path / "runs" / "a") in str(caught.value) and f"process {pid}" in str(caught.value)
        RunFolder(tmp_path / "runs" / "b").close()
    with RunFolder(tmp_path / "runs" / "a") as folder:
        assert (folder.path / ".lock").read_text() == f"{os.getpid()}\n"


def test_second_trainer_in_the_same_process_is_refused(tmp_path: Path) -> None:
    """A job of a sweep can't take the folder of one that still runs; after `close` it can."""
    with RunFolder(tmp_path), pytest.raises(ConfigurationError, match=f"process {os.getpid()}"):
        RunFolder(tmp_path)
    RunFolder(tmp_path).close()


def test_forked_workers_do_not_hold_the_lock(tmp_path: Path) -> None:
    """A worker that outlives its killed trainer doesn't keep the folder."""
    with script(HOLD, tmp_path, "forks") as process:
        assert process.stdout is not None and process.stdout.readline()
        with pytest.raises(ConfigurationError, match="in use"):
            RunFolder(tmp_path)
        process.kill()
        process.wait()
        limit = time.monotonic() + 20.0
        while True:
            try:
                RunFolder(tmp_path).close()
                break
            except ConfigurationError:  # the worker gives the lock up as soon as it runs at all
                assert time.monotonic() < limit
                time.sleep(0.05)


@pytest.mark.parametrize("place", ["below a file", "in proc"])
def test_unwritable_folder_is_a_configuration_error(tmp_path: Path, place: str) -> None:
    """The message names the folder and says what to do."""
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "run" if place == "below a file" else Path("/proc/1/run")
    with pytest.raises(ConfigurationError, match=r"can't be written.*choose another folder") as caught:
        RunFolder(path)
    assert str(path) in str(caught.value)


def test_full_disk_is_a_configuration_error(tmp_path: Path) -> None:
    """Not even the lock can be written: one message, and the lock isn't held."""
    with files_limited_to(0), pytest.raises(ConfigurationError, match="can't be written"):
        RunFolder(tmp_path)
    RunFolder(tmp_path).close()


def test_json_is_strict() -> None:
    """What people put into a summary becomes JSON that every reader takes."""
    text = json_text(
        {"a": float("inf"), "b": (1, np.float32(0.5)), "c": np.arange(2), "d": torch.tensor(3), 5: Path("x"), "e": True}
    )
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": None, "b": [1, 0.5], "c": [0, 1], "d": 3, "5": "x", "e": True,
    }  # fmt: skip
