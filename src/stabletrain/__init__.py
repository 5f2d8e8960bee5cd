"""stabletrain: training steps that cannot poison the model."""

from __future__ import annotations

__version__ = "0.1.0"
