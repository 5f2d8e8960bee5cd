"""All cases of the catalogue."""

from __future__ import annotations

from typing import get_args

from stabletrain.doctor.diagnosis import Cause

from .attention import ATTENTION
from .controls import CONTROLS
from .derivatives import DERIVATIVES
from .frozen import FROZEN
from .half_precision import HALF_PRECISION
from .healthy import HEALTHY as FIRST_HEALTHY
from .holdout import HOLDOUT
from .holdout_controls import HOLDOUT_HEALTHY
from .inputs import INPUTS
from .objectives import OBJECTIVES
from .states import STATES
from .updates import UPDATES

CAUSES = frozenset(get_args(Cause))
CASES = [*FROZEN, *INPUTS, *ATTENTION, *OBJECTIVES, *DERIVATIVES, *HALF_PRECISION, *STATES, *UPDATES, *HOLDOUT]
HEALTHY = [*FIRST_HEALTHY, *CONTROLS, *HOLDOUT_HEALTHY]
__all__ = ["CASES", "CAUSES", "FROZEN", "HEALTHY"]
