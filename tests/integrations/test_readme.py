"""The README's lines for other people's loops are run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import accelerate
import lightning.pytorch
import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader

from integrations.loops import Module, Samples, forget_accelerator
from integrations.parts import batches, network

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def run(kind: str, **names: Any) -> dict[str, Any]:
    [text] = re.findall(rf"```python {kind}\n(.*?)```", README, re.DOTALL)
    exec(compile(text, kind, "exec"), names)
    return names


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# Both are about machines and runs as small as a test's.
@pytest.mark.filterwarnings(r"ignore:The number of training batches \(5\) is smaller:UserWarning:lightning\.pytorch")
def test_lightning() -> None:
    loader = DataLoader(batches(5, bad=[2]), batch_size=None)
    left = run("lightning", Trainer=lightning.pytorch.Trainer, module=Module(), loader=loader)
    [stats] = [one.guard.stats for one in left["trainer"].callbacks if isinstance(one, left["GuardCallback"])]
    assert (stats.applied, stats.rejected) == (4, 1)


@pytest.mark.filterwarnings(r"ignore:'pin_memory' argument is set as true:UserWarning:torch\.utils\.data\.dataloader")
def test_huggingface() -> None:
    names = {"Trainer": transformers.Trainer, "TrainingArguments": transformers.TrainingArguments}
    left = run("huggingface", **names, model=network(), data=Samples(batches(5, bad=[2])))
    assert left["trainer"].state.log_history[-1]["guard_rejected"] == 1


def test_accelerate() -> None:
    forget_accelerator()
    data = [(batch["inputs"], batch["labels"]) for batch in batches(5, bad=[2])]
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    left = run(
        "accelerate",
        accelerator=accelerate.Accelerator(),
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        loader=DataLoader(data, batch_size=None),
        criterion=nn.CrossEntropyLoss(),
    )
    assert left["guard"].stats.reasons == {"loss": 1} and left["guard"].stats.applied == 4
