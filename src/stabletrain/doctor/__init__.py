"""Why a step went bad, and what helps; before a run, what may go bad."""

from stabletrain.doctor.diagnosis import Diagnosis, Operation, Remedy
from stabletrain.doctor.notebook import diagnose

__all__ = ["Diagnosis", "Operation", "Remedy", "diagnose"]
