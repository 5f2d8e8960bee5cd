"""Small real runs for the doctor to examine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from composed import checked
from stabletrain.assembly import assemble
from stabletrain.data import ArrayDataset, Splits
from stabletrain.doctor.before.findings import Finding
from stabletrain.doctor.before.subject import Subject


def table(count: int = 320, columns: int = 4, classes: int = 2, seed: int = 0) -> ArrayDataset:
    """Return normal points whose class is told by the first column."""
    inputs = torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))
    targets = (inputs[:, 0] > 0).long() if classes == 2 else torch.arange(count) % classes
    return ArrayDataset(inputs, targets)


def network(columns: int = 4, classes: int = 2, hidden: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(columns, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def subject(
    train: Any = None,
    *,
    model: nn.Module | None = None,
    validation: Any = None,
    config: tuple[str, ...] = (),
    **options: Any,
) -> Subject:
    """Return a run with these parts; its settings are those of a table read from a file, with `config` added."""
    train = train if train is not None else table()
    validation = validation if validation is not None else table(64, seed=1)
    of_a_file = () if any(word.startswith("data=") for word in config) else ("data=npz", "data.path=none.npz")
    settings = checked("experiment=tabular", "precision=fp32", *of_a_file, *config)
    options = {"epochs": 10, "device": "cpu", **options}
    run = assemble(model if model is not None else network(), Splits(train, validation), **options)
    return Subject(run, settings)


def by_check(findings: list[Finding]) -> dict[str, Finding]:
    """Return the findings by what was looked for, each of which may occur once."""
    found = {finding.check: finding for finding in findings}
    assert len(found) == len(findings), findings
    return found


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
