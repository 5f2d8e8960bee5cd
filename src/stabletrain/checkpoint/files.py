"""One checkpoint's files: what the manifest says of it, and its state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stabletrain.errors import ConfigurationError
from stabletrain.sealed import Damaged, Entry, read_tensors, unreadable
from stabletrain.sealed import read_manifest as read_any_manifest

FORMAT_VERSION = 2
STATE_NAME = "state.pt"


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint, as its manifest describes it."""

    path: Path
    serial: int  # 1 for the first that was saved in this folder, then counted on
    updates: int
    position: dict[str, int]  # epoch, step within it, steps of the whole run
    metrics: dict[str, float | None]  # of the validation of this state; empty if it wasn't validated
    facts: dict[str, str]  # of the run: `config`, a sha256 of its config, and `data`, the fingerprint of its data
    files: dict[str, Entry]


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return the published checkpoints in `folder`, good or not, without those that were set aside."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.glob("step_*") if path.is_dir() and not path.name.endswith(".corrupt"))


def has_checkpoints(run: Path | str) -> bool:
    """Return whether the run's folder holds checkpoints, good or bad, so that a run goes on there."""
    return any(Path(run, "checkpoints").glob("step_*"))


def free_name(folder: Path, name: str, suffix: str = "") -> str:
    """Return `name` + `suffix`, with a number between them where that is taken in `folder`."""
    candidate, number = f"{name}{suffix}", 1
    while (folder / candidate).exists():
        number += 1
        candidate = f"{name}-{number}{suffix}"
    return candidate


def read_manifest(path: Path) -> Checkpoint:
    """Return what the manifest of the checkpoint in `path` says.

    Args:
        path: the checkpoint's folder.

    Raises:
        Damaged: it is missing, torn or altered.
        ConfigurationError: its format isn't known.
        OSError: it can't be read now.
    """
    manifest = read_any_manifest(path, what="checkpoint", version=FORMAT_VERSION, needed=STATE_NAME)
    try:
        return Checkpoint(
            path=path,
            serial=int(manifest["serial"]),
            updates=int(manifest["updates"]),
            position={str(name): int(value) for name, value in manifest["position"].items()},
            metrics={str(name): None if value is None else float(value) for name, value in manifest["metrics"].items()},
            facts={str(name): str(value) for name, value in manifest["facts"].items()},
            files=manifest["files"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise unreadable(error) from error


def manifest_or_none(path: Path) -> Checkpoint | None:
    """Return what the manifest says, or None for one that can't be used."""
    try:
        return read_manifest(path)
    except (Damaged, OSError, ConfigurationError):
        return None


def read_files(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Verify every file of the checkpoint and read it, without running any code that it may hold.

    Returns:
        What each file holds, by its name; `STATE_NAME` is always among them.

    Raises:
        Damaged: a file is torn, altered or harmful; says which one.
        OSError: it can't be read now.
    """
    return {name: read_tensors(checkpoint.path / name, entry) for name, entry in checkpoint.files.items()}


def read_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """Verify every file of the checkpoint and return its state alone; see `read_files`."""
    return read_files(checkpoint)[STATE_NAME]
