"""The doctor after an incident: of real runs, from the folder alone."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from processes import ENVIRONMENT, run
from stabletrain.doctor.after import diagnose_incident, latest_incident
from stabletrain.doctor.diagnosis import Diagnosis
from stabletrain.errors import ConfigurationError

SMALL = ["experiment=tabular", "device=cpu", "epochs=2", "tracking=quiet", "name=run"]


OWN = """
import torch

class Own(torch.utils.data.Dataset):
    def __len__(self):
        return 200

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randn(4, generator=generator) * (float("nan") if index == 17 else 1.0), index % 2
"""


def trained(folder: Path, *words: str) -> tuple[int, str]:
    done = run([sys.executable, "-m", "stabletrain", *SMALL, *words], folder)
    return done.returncode, done.stderr


def diagnosed(folder: Path, words: Sequence[str]) -> Diagnosis:
    code, said = trained(folder, *words)
    assert code in (0, 3), said
    return diagnose_incident(latest_incident(folder / "runs/run"))


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["+fault=nan_input", "fault.at=4"], "data"),
        (["+fault=nan_weight", "fault.at=4"], "weights"),
    ],
    ids=["input", "weight"],
)
def test_the_cause_of_a_rehearsed_fault_is_found(words: list[str], cause: str, tmp_path: Path) -> None:
    found = diagnosed(tmp_path, [*words, "guard=skip"])
    assert (found.reproduced, found.cause, found.confidence) == ("yes", cause, "high")
    written = json.loads((latest_incident(tmp_path / "runs/run") / "diagnosis.json").read_text())
    assert written["cause"] == cause and written["samples"] == list(found.samples)


def test_a_moved_incident_is_enough(tmp_path: Path) -> None:
    trained(tmp_path, "+fault=nan_input", "fault.at=4", "guard=skip")
    alone = tmp_path / "elsewhere" / "000000004"
    shutil.copytree(latest_incident(tmp_path / "runs/run"), alone)
    shutil.rmtree(tmp_path / "runs")
    found = diagnose_incident(alone)
    assert (found.reproduced, found.cause) == ("yes", "data") and len(found.samples) == 1


def test_an_incident_is_enough_where_the_data_is_gone(tmp_path: Path) -> None:
    np.savez(tmp_path / "table.npz", x=np.random.rand(64, 3).astype(np.float32), y=np.arange(64) % 2)
    trained(tmp_path, "data=npz", "data.path=table.npz", "model=mlp", "+fault=nan_input", "fault.at=1", "guard=skip")
    (tmp_path / "table.npz").unlink()
    found = diagnose_incident(latest_incident(tmp_path / "runs/run"))
    assert (found.reproduced, found.cause) == ("yes", "data") and len(found.samples) == 1
    assert any(remedy.held and remedy.tried_updates == 1 for remedy in found.remedies)


def test_the_printed_command_continues_without_the_bad_sample(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    data = ["data=dataset", "data.dataset._target_=mine.Own", "model=mlp", "model.num_classes=2"]
    code, said = trained(tmp_path, *data, "guard=raise")
    assert code == 3, said
    lines = said.strip().splitlines()[-3:]
    assert [line.partition(":")[0] for line in lines] == ["where", "samples", "to do"]
    incident = latest_incident(tmp_path / "runs/run")
    [sample] = json.loads((incident / "diagnosis.json").read_text())["samples"]
    assert lines[1] == f"samples: {sample}"
    words = shlex.split(lines[2].removeprefix("to do: "))
    assert words[:3] == ["python", "-m", "stabletrain"]
    again = run([sys.executable, *words[1:]], tmp_path)
    assert again.returncode == 0, again.stderr
    summary = json.loads((tmp_path / "runs/run/summary.json").read_text())
    assert summary["status"] == "completed"


MINE = """
import os
import torch

class Explodes:
    def __call__(self, data):
        inputs, labels = data
        return inputs / (inputs.sum() * 0 if torch.rand(()) > 0.9 else 1.0), labels

class Flaky(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(30, 2)

    def forward(self, inputs):
        outputs = self.inner(inputs)
        return outputs * float("nan") if "FLAKY" in os.environ else outputs
"""


def test_an_augmentation_is_told_from_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "conf/augmentation").mkdir(parents=True)
    (tmp_path / "conf/augmentation/explodes.yaml").write_text("_target_: mine.Explodes\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = diagnosed(tmp_path, ["--config-dir", "conf", "augmentation=explodes", "guard=skip"])
    assert (found.reproduced, found.cause, list(found.samples)) == ("yes", "augmentation", [])
    [held] = [remedy for remedy in found.remedies if remedy.held and remedy.group == "augmentation"]
    assert held.override == "augmentation=none"
    assert "'--config-dir=<the folder of your options>'" in found.command


def test_what_does_not_happen_again_is_called_not_reproducible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "conf/model").mkdir(parents=True)
    (tmp_path / "conf/model/flaky.yaml").write_text("_target_: mine.Flaky\n")
    flaky = [sys.executable, "-m", "stabletrain", *SMALL, "--config-dir", "conf", "model=flaky", "guard=raise"]
    assert run(flaky, tmp_path, {**ENVIRONMENT, "FLAKY": "1"}).returncode == 3
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    found = diagnose_incident(latest_incident(tmp_path / "runs/run"))
    assert (found.reproduced, found.cause, found.remedies) == ("no", "not_reproducible", ())


def test_the_sample_is_found_among_several_microbatches(tmp_path: Path) -> None:
    found = diagnosed(tmp_path, ["+fault=nan_input", "fault.at=4", "guard=skip", "accumulate=4"])
    assert found.cause == "data" and len(found.samples) == 1
    assert [remedy.held for remedy in found.remedies if remedy.group == "data"] == [True]


def test_each_printed_remedy_was_tried(tmp_path: Path) -> None:
    found = diagnosed(tmp_path, ["+fault=nan_input", "fault.at=4", "guard=skip", "precision=bf16"])
    overrides = {remedy.override.lstrip("+").partition("=")[0]: remedy for remedy in found.remedies}
    assert {"precision", "guard.quarantine", "loss_mode", "optimizer.lr", "clipping"} <= overrides.keys()
    held = overrides.pop("guard.quarantine")
    assert held.held and held.tried_updates > 1
    assert not any(remedy.held for remedy in overrides.values())


def test_the_command_says_what_it_found(tmp_path: Path) -> None:
    trained(tmp_path, "+fault=nan_input", "fault.at=4", "guard=skip")
    done = run([sys.executable, "-m", "stabletrain", "doctor", "run=runs/run"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.startswith("cause: data (confidence high)")
        and "\ngo on with: python -m stabletrain " in done.stdout
    )
    wrong = run([sys.executable, "-m", "stabletrain", "doctor", "incident=nowhere"], tmp_path)
    assert wrong.returncode == 2 and wrong.stderr.startswith("stabletrain: the incident nowhere can't be used")


WIDE = """
import torch

class Wide(torch.nn.Module):
    \"\"\"Sums squares in the format of its product: more of them than float16 can hold, in validation.\"\"\"

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(30, 2)

    def forward(self, inputs):
        outputs = self.inner(inputs)
        return outputs if self.training else outputs + (outputs * 0 + 300) * 300
"""


def test_a_validation_that_only_the_reduced_format_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(WIDE)
    (tmp_path / "conf/model").mkdir(parents=True)
    (tmp_path / "conf/model/wide.yaml").write_text("_target_: mine.Wide\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    words = ["--config-dir", "conf", "model=wide", "precision=fp16", "guard=skip"]
    found = diagnosed(tmp_path, words)
    assert (found.reproduced, found.cause, list(found.samples)) == ("yes", "overflow", [])
    assert found.operation is not None and found.operation.code.endswith("(outputs * 0 + 300) * 300")
    held = [remedy.override for remedy in found.remedies if remedy.held]
    assert held[:2] == ["precision=bf16", "precision=fp32"]


@pytest.mark.parametrize(
    ("fault", "cause", "held"),
    [("nan_gradient", "unknown", "fault=none"), ("nan_weight", "weights", "resume=")],
)
def test_what_is_no_operation_has_a_remedy_too(fault: str, cause: str, held: str, tmp_path: Path) -> None:
    found = diagnosed(tmp_path, [f"+fault={fault}", "fault.at=15", "guard=raise"])
    assert (found.cause, "the run rehearses a fault" in found.evidence[-1]) == (cause, True)
    [only] = [remedy for remedy in found.remedies if remedy.held]
    assert only.override.startswith(held) and only.tried_updates > 1
    if held == "resume=":
        words = [word for word in shlex.split(found.command)[1:] if "fault" not in word]
        again = run([sys.executable, *words], tmp_path)
        assert again.returncode == 0, again.stderr


def test_no_diagnosis_where_it_is_not_wanted(tmp_path: Path) -> None:
    code, said = trained(tmp_path, "+fault=nan_input", "fault.at=4", "guard=raise", "doctor.time_limit=0")
    assert code == 3 and "to do:" not in said


def test_a_run_without_incidents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="holds no incidents"):
        latest_incident(tmp_path)
