"""All cases of the catalogue."""

from __future__ import annotations

from typing import get_args

from stabletrain.doctor.diagnosis import Cause

from .frozen import FROZEN
from .healthy import HEALTHY

CAUSES = frozenset(get_args(Cause))
CASES = [*FROZEN]
__all__ = ["CASES", "CAUSES", "FROZEN", "HEALTHY"]
