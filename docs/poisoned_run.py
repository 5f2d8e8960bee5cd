"""Draws the README's picture: the same run with two poisoned samples, without and with the guard.

    python docs/poisoned_run.py [docs/poisoned_run.png]

Needs matplotlib (`pip install stabletrain[docs]`).
"""

from __future__ import annotations

import csv
import logging
import sys
import tempfile
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch

from stabletrain import Policy, fit
from stabletrain.data import digits
from stabletrain.model import ConvNet
from stabletrain.optimizer import adamw
from stabletrain.tracking import Tracker

EPOCHS = 8


def history(guard: str, folder: Path) -> list[dict[str, float]]:
    """Train on digits with two samples of NaN, and return the rows of `history.csv`."""
    data = digits(seed=0)
    data.train.inputs[[100, 700]] = float("nan")
    torch.manual_seed(0)
    fit(
        ConvNet(in_channels=1, num_classes=10, image_size=(8, 8)),
        data,
        epochs=EPOCHS,
        optimizer=partial(adamw, lr=1e-3),
        guard=Policy(on_rejection=guard),
        tracking=partial(Tracker, progress="none"),
        folder=folder,
    )
    rows = csv.DictReader((folder / "history.csv").read_text().splitlines())
    return [{name: float(value or "nan") for name, value in row.items()} for row in rows]


def main(target: Path) -> None:
    """Train both and draw validation accuracy and loss over the epochs."""
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            "without a guard": (history("none", Path(folder, "none")), "tab:red"),
            "with stabletrain's guard": (history("skip", Path(folder, "skip")), "tab:blue"),
        }
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 4.6), sharex=True, layout="constrained")
    epochs = range(1, EPOCHS + 1)
    for label, (rows, colour) in runs.items():
        top.plot(epochs, [row["val_accuracy"] for row in rows], "o-", color=colour, label=label)
        bottom.plot(epochs, [row["train_loss"] for row in rows], "o-", color=colour)
    for epoch, row in zip(epochs, runs["with stabletrain's guard"][0], strict=True):
        top.annotate(f"{row['rejected']:.0f} rejected", (epoch, 0.5), ha="center", fontsize=7, color="tab:blue")
    top.set(ylabel="validation accuracy", ylim=(0, 1.05), title="digits, 2 of 1,259 training samples are NaN")
    top.legend(loc="center right", fontsize=8, bbox_to_anchor=(1.0, 0.28))
    bottom.set(ylabel="training loss", xlabel="epoch", ylim=(0, None))
    bottom.text(EPOCHS, 0.25, "without a guard: NaN from the first epoch on", ha="right", color="tab:red", fontsize=8)
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".png"))
