"""Learning-rate schedules: each is built for a run and gives a factor on the base rate for every update.

All but `Plateau` are pure functions of the number of updates, so there is nothing to save or resume.
"""

from stabletrain.schedule.base import Observing, Planned, Schedule
from stabletrain.schedule.cycles import CosineRestarts, OneCycle
from stabletrain.schedule.plateau import Plateau
from stabletrain.schedule.shapes import Constant, Cosine, InverseSqrt, Linear, Polynomial, WarmupStableDecay

__all__ = [
    "Constant",
    "Cosine",
    "CosineRestarts",
    "InverseSqrt",
    "Linear",
    "Observing",
    "OneCycle",
    "Planned",
    "Plateau",
    "Polynomial",
    "Schedule",
    "WarmupStableDecay",
]
