"""What a run leaves behind for people to read: tables, TensorBoard events, a summary, a progress bar.

Every file is whole at any moment, and nothing that goes wrong here (a full disk, a closed terminal) stops training.
"""

from stabletrain.tracking.environment import describe_environment
from stabletrain.tracking.tracker import Tracker

__all__ = ["Tracker", "describe_environment"]
