"""Checkpoints: whole, healthy and harmless, or not there.

One folder a checkpoint, `checkpoints/step_000012300/`, named after the update: `state.pt`, further files where there
are any, and `manifest.json`. It is written aside in the same folder by a thread of its own, hashed while it is written,
flushed to the disk and then renamed, so that what bears the name is complete. The manifest is written last; it counts
the checkpoints (`serial`), which says what is newest even after a run went back to an older one.
"""

from stabletrain.checkpoint.files import STATE_NAME, Checkpoint, has_checkpoints
from stabletrain.checkpoint.health import nonfinite_names
from stabletrain.checkpoint.store import CheckpointStore

__all__ = ["STATE_NAME", "Checkpoint", "CheckpointStore", "has_checkpoints", "nonfinite_names"]
