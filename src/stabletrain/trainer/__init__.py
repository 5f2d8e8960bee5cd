"""The trainer: finished parts in, a trained model out."""

from __future__ import annotations

from stabletrain.trainer.evaluation import evaluate
from stabletrain.trainer.loop import train
from stabletrain.trainer.run import Run, Summary

__all__ = ["Run", "Summary", "evaluate", "train"]
