"""Sweeps: every job runs, leaves nothing to the next, and has its row."""

from __future__ import annotations

import csv
import json
import os
import random
import sys

import numpy as np
import pytest
import torch

from stabletrain.__main__ import main
from stabletrain.sweep import Job, table, unchanged_surroundings, write_table

SMALL = ["experiment=tabular", "epochs=1", "batch_size=128", "tracking=none", "checkpoint=none", "device=cpu"]


class Messy(torch.nn.Module):
    """A model that leaves a mess behind and fails."""

    def __init__(self, in_features: int) -> None:
        super().__init__()
        torch.set_default_dtype(torch.float64)
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.set_num_threads(torch.get_num_threads() + 1)
        os.environ["LEFT_BY_A_JOB"] = "1"
        raise RuntimeError("what a mess")


class Poisoned(torch.nn.Module):
    """A model whose outputs are NaN."""

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(in_features, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs) * float("nan")


def rows(folder):
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_nine_runs_and_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["-m", "+preset=normal,stable,safe", "seed=0,1,2", "name=nine", *SMALL]) == 0
    found = rows(tmp_path / "runs" / "nine")
    assert [row["status"] for row in found] == ["completed"] * 9
    jobs = {(f"preset={preset}", f"seed={seed}") for preset in ("normal", "stable", "safe") for seed in range(3)}
    assert {tuple(row["overrides"].split()[:2]) for row in found} == jobs
    assert len({row["value"] for row in found}) == 9
    for row in found:
        summary = json.loads((tmp_path / "runs" / "nine" / row["folder"] / "summary.json").read_text())
        assert float(row["value"]) == summary["metrics"]["final"]["loss"]
        assert row["overrides"].startswith(f"preset={summary['preset']} seed={summary['seed']} ")
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("job  overrides"))
    assert [line.split()[1:3] for line in lines[start + 1 : start + 10]] == [
        row["overrides"].split()[:2] for row in found
    ]
    assert not list((tmp_path / "runs").rglob("*.log"))


def test_a_job_that_fails_or_goes_unstable_stops_no_other_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("Messy", "Poisoned"):
        (tmp_path / "mine" / "model").mkdir(parents=True, exist_ok=True)
        option = f"_target_: test_sweep.{name}\nin_features: auto\n"
        (tmp_path / "mine" / "model" / f"{name.lower()}.yaml").write_text(option)
    before = (torch.get_default_dtype(), torch.backends.cuda.matmul.fp32_precision, torch.get_num_threads())

    given = ["--config-dir", "mine", "guard.max_rejected=1", *SMALL]
    assert main(["-m", *given, "model=messy,mlp,poisoned", "seed=0,1", "name=six"]) == 1

    after = (torch.get_default_dtype(), torch.backends.cuda.matmul.fp32_precision, torch.get_num_threads())
    assert after == before
    assert "LEFT_BY_A_JOB" not in os.environ
    found = rows(tmp_path / "runs" / "six")
    statuses = [row["status"] for row in found]
    assert statuses == ["failed", "failed", "completed", "completed", "stopped_unstable", "stopped_unstable"]
    assert all("what a mess" in row["error"] for row in found if "messy" in row["overrides"])
    output = capsys.readouterr()
    assert output.err.count("what a mess") == 2
    assert "Traceback" not in output.err
    assert "Error executing job" not in output.err

    # A job among messy ones ends with the same number, bit for bit, as a run that is started by itself.
    assert main([*given, "model=mlp", "seed=0", "name=alone"]) == 0
    alone = json.loads((tmp_path / "runs" / "alone" / "summary.json").read_text())["metrics"]
    assert float(found[2]["value"]) == alone["final"]["loss"]


def test_a_job_that_never_began_has_a_row_and_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["-m", "batch_size=0,128", "name=two", *[word for word in SMALL if "batch" not in word]]) == 1
    bad, good = rows(tmp_path / "runs" / "two")
    assert (bad["status"], good["status"]) == ("failed", "completed")
    assert bad["error"].startswith("batch_size=0 is not allowed")
    assert bad["value"] == ""
    folders = [entry.name for entry in (tmp_path / "runs" / "two").iterdir() if entry.is_dir()]
    assert folders == [good["folder"]]
    assert "batch_size=0 is not allowed" in capsys.readouterr().out


def test_an_unknown_option_stops_a_sweep_before_its_first_job(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["-m", "precision=fp32,bf61", *SMALL]) == 2
    assert capsys.readouterr().err.startswith("stabletrain: precision=bf61 is no option; allowed: bf16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", [["-m"], ["--multirun"], ["hydra.mode=MULTIRUN"]])
def test_no_sweeps_under_torchrun(how, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*how, "seed=0,1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("stabletrain: a sweep (-m) can't run under torchrun")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_surroundings_are_put_back():
    def look():
        backends = torch.backends
        holders = [backends, backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul]
        return (
            torch.get_default_dtype(),
            torch.get_num_threads(),
            [holder.fp32_precision for holder in holders],
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_grad_enabled(),
            torch.is_anomaly_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.random.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(),
            random.getstate(),
            dict(os.environ),
            os.getcwd(),
            list(sys.path),
        )

    def change():
        torch.set_default_dtype(torch.bfloat16)
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.set_float32_matmul_precision("medium")
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        torch.use_deterministic_algorithms(True)
        torch.autograd.set_grad_enabled(False)
        torch.set_autocast_enabled("cpu", True)
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        os.environ["NEW"] = "1"
        os.environ.pop("HOME", None)
        os.chdir("/")
        sys.path.append("/nowhere")
        raise KeyError

    before = look()
    with pytest.raises(KeyError), unchanged_surroundings():
        change()
    assert look() == before


def test_a_table_of_nothing_but_failures(tmp_path):
    jobs = [Job(overrides=["a=1"], folder=tmp_path / "a", error="first\nsecond"), Job(overrides=[], folder=tmp_path)]
    assert [line.split() for line in table(jobs).splitlines()[1:]] == [["0", "a=1", "failed", "first"], ["1", "failed"]]
    write_table(jobs, tmp_path / "sweep.csv")
    assert [row["error"] for row in rows(tmp_path)] == ["first\nsecond", ""]
    assert [entry.name for entry in tmp_path.iterdir()] == ["sweep.csv"]
