"""stabletrain: training steps that cannot poison the model.

The public names are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stabletrain import safe
    from stabletrain.assembly import assemble, fit
    from stabletrain.doctor.diagnosis import Diagnosis
    from stabletrain.doctor.notebook import diagnose
    from stabletrain.errors import ConfigurationError, Interrupted, UnstableTraining
    from stabletrain.export import load_model
    from stabletrain.guard import Policy, StepGuard, Verdict
    from stabletrain.trainer import Run, Summary, train

__version__ = "0.1.0"

_HOMES = {
    "assemble": "stabletrain.assembly",
    "fit": "stabletrain.assembly",
    "Diagnosis": "stabletrain.doctor.diagnosis",
    "diagnose": "stabletrain.doctor.notebook",
    "ConfigurationError": "stabletrain.errors",
    "Interrupted": "stabletrain.errors",
    "UnstableTraining": "stabletrain.errors",
    "load_model": "stabletrain.export",
    "Policy": "stabletrain.guard",
    "StepGuard": "stabletrain.guard",
    "Verdict": "stabletrain.guard",
    "Run": "stabletrain.trainer",
    "Summary": "stabletrain.trainer",
    "train": "stabletrain.trainer",
}
_MODULES = ("safe",)  # public as a whole

__all__ = [
    "ConfigurationError",
    "Diagnosis",
    "Interrupted",
    "Policy",
    "Run",
    "StepGuard",
    "Summary",
    "UnstableTraining",
    "Verdict",
    "__version__",
    "assemble",
    "diagnose",
    "fit",
    "load_model",
    "safe",
    "train",
]


def __getattr__(name: str) -> Any:
    """Load a public name (PEP 562).

    Example:
        >>> import stabletrain
        >>> stabletrain.StepGuard.__name__
        'StepGuard'
    """
    if name in _MODULES:
        return import_module(f"stabletrain.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'stabletrain' has no attribute {name!r}; public names: {', '.join(__all__)}")
