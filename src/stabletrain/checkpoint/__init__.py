"""Checkpoints: whole, healthy and harmless, or not there.

One folder a checkpoint, `checkpoints/step_000012300/`, with `state.pt` and `manifest.json`, named after the update. It
is written aside in the same folder, hashed while it is written, flushed to the disk and then renamed, so that what
bears the name is complete. The manifest is written last; it counts the checkpoints (`serial`), which says what is
newest even after a run went back to an older one.
"""

from stabletrain.checkpoint.files import Checkpoint, has_checkpoints
from stabletrain.checkpoint.store import CheckpointStore, nonfinite_names

__all__ = ["Checkpoint", "CheckpointStore", "has_checkpoints", "nonfinite_names"]
