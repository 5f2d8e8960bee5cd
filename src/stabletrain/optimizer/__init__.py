"""Optimizers from torch and `pytorch_optimizer`, with their arguments checked and their parameters grouped."""

from stabletrain.optimizer.builders import adafactor, adam, adamw, adopt, lion, sgd, stable_adamw
from stabletrain.optimizer.doubts import Doubt, doubts
from stabletrain.optimizer.groups import ModelParameters
from stabletrain.optimizer.muon import MuonWithAdamW, muon
from stabletrain.optimizer.settings import (
    copied,
    grouping,
    hyperparameters,
    regrouped,
    set_learning_rate,
    with_changed,
)

__all__ = [
    "Doubt",
    "ModelParameters",
    "MuonWithAdamW",
    "adafactor",
    "adam",
    "adamw",
    "adopt",
    "copied",
    "doubts",
    "grouping",
    "hyperparameters",
    "lion",
    "muon",
    "regrouped",
    "set_learning_rate",
    "sgd",
    "stable_adamw",
    "with_changed",
]
