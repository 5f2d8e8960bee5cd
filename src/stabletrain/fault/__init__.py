"""Faults on purpose, to rehearse what a run does when something goes bad.

The trainer asks the fault at fixed places of every step. Nothing is random: the same run with the same fault does the
same. What a fault remembers is saved with the run, and a step that is run again is not hit a second time.
"""

from __future__ import annotations

from stabletrain.fault.base import Fault, NoFault, Surroundings
from stabletrain.fault.parts import EmptyInput, LargeOutput, NanPart
from stabletrain.fault.process import DiskFull, Kill
from stabletrain.fault.samples import InfInput, NanInput, NanLabel
from stabletrain.fault.step import Fp16Overflow, NanBuffer, NanGradient, NanLoss, NanValidation, NanWeight, Spike

__all__ = [
    "DiskFull",
    "EmptyInput",
    "Fault",
    "Fp16Overflow",
    "InfInput",
    "Kill",
    "LargeOutput",
    "NanBuffer",
    "NanGradient",
    "NanInput",
    "NanLabel",
    "NanLoss",
    "NanPart",
    "NanValidation",
    "NanWeight",
    "NoFault",
    "Spike",
    "Surroundings",
]
