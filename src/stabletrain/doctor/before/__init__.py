"""Before a run: data, model, numbers and settings are looked at, and nothing is trained."""

from __future__ import annotations

from stabletrain.doctor.before.environment import examine_environment
from stabletrain.doctor.before.examine import examine
from stabletrain.doctor.before.findings import Finding, Report

__all__ = ["Finding", "Report", "examine", "examine_environment"]
