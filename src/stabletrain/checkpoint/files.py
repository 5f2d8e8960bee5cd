"""One checkpoint's files: written with a hash, verified and read again without running any code."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stabletrain import __version__
from stabletrain.errors import ConfigurationError
from stabletrain.folder import json_text, write_all

FORMAT_VERSION = 1
STATE_NAME = "state.pt"
MANIFEST_NAME = "manifest.json"
_CHUNK = 1 << 20  # bytes


class BadCheckpoint(Exception):
    """A checkpoint is torn, altered or harmful: says which file and what about it."""


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint, as its manifest describes it."""

    path: Path
    serial: int  # 1 for the first that was saved in this folder, then counted on
    updates: int
    metrics: dict[str, float | None]
    files: dict[str, dict[str, Any]]


class _HashingFile:
    """What `torch.save` writes to: passes everything on to the disk and to a running hash."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.hash = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        piece = memoryview(data).cast("B")
        try:
            write_all(self._descriptor, piece)
        except OSError as error:
            self.error = error
            raise
        self.hash.update(piece)
        self.size += len(piece)
        return len(piece)

    def flush(self) -> None:
        """Nothing is held back."""


def write_state(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Write `state` and flush it to the disk; return size and hash of what was written."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    file = _HashingFile(descriptor)
    crc32 = torch.serialization.get_crc32_options()
    try:
        # The sha256 sees more than zip's own checksums, which would take as long as all the rest.
        torch.serialization.set_crc32_options(False)
        torch.save(state, file)  # type: ignore[arg-type]  # it asks for `write` and `flush` alone
        os.fsync(descriptor)
    except RuntimeError as error:
        # Closing its archive after a failed write, torch raises an error of its own that hides the disk's.
        if file.error is not None:
            raise file.error from error
        raise
    finally:
        torch.serialization.set_crc32_options(crc32)
        os.close(descriptor)
    return {"size": file.size, "sha256": file.hash.hexdigest()}


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return the published checkpoints in `folder`, good or not, without those that were set aside."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.glob("step_*") if path.is_dir() and not path.name.endswith(".corrupt"))


def free_name(folder: Path, name: str, suffix: str = "") -> str:
    """Return `name` + `suffix`, with a number between them where that is taken in `folder`."""
    candidate, number = f"{name}{suffix}", 1
    while (folder / candidate).exists():
        number += 1
        candidate = f"{name}-{number}{suffix}"
    return candidate


def manifest_text(manifest: dict[str, Any]) -> str:
    """Return the manifest as JSON with a hash of itself, so that a changed byte anywhere in it shows."""
    return json_text({**manifest, "sha256": hashlib.sha256(json_text(manifest).encode()).hexdigest()})


def read_manifest(path: Path) -> Checkpoint:
    """Return what the manifest of the checkpoint in `path` says.

    Args:
        path: the checkpoint's folder.

    Raises:
        BadCheckpoint: it is missing, torn or altered.
        ConfigurationError: its format isn't known.
        OSError: it can't be read now.
    """
    try:
        text = (path / MANIFEST_NAME).read_bytes()
        manifest = json.loads(text)
        del manifest["sha256"]
        if manifest_text(manifest).encode() != text:
            raise BadCheckpoint(f"{MANIFEST_NAME} is not what was written")
        version = manifest["format"]
        if version != FORMAT_VERSION:
            raise ConfigurationError(
                f"the checkpoint {path} has format {version!r}; this stabletrain ({__version__}) reads format "
                f"{FORMAT_VERSION}; use the version that wrote it: {manifest.get('versions')}"
            )
        checkpoint = Checkpoint(
            path=path,
            serial=int(manifest["serial"]),
            updates=int(manifest["updates"]),
            metrics={str(name): None if value is None else float(value) for name, value in manifest["metrics"].items()},
            files={str(name): {"size": int(entry["size"]), "sha256": str(entry["sha256"])}
                   for name, entry in manifest["files"].items()},
        )  # fmt: skip
    except FileNotFoundError as error:
        raise BadCheckpoint(f"{MANIFEST_NAME} is missing") from error
    except ConfigurationError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadCheckpoint(f"{MANIFEST_NAME} can't be read ({type(error).__name__}: {error})") from error
    if STATE_NAME not in checkpoint.files or any(Path(name).name != name for name in checkpoint.files):
        raise BadCheckpoint(f"{MANIFEST_NAME} names the files {sorted(checkpoint.files)}, expected {STATE_NAME}")
    return checkpoint


def manifest_or_none(path: Path) -> Checkpoint | None:
    """Return what the manifest says, or None for one that can't be used."""
    try:
        return read_manifest(path)
    except (BadCheckpoint, OSError, ConfigurationError):
        return None


def read_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """Verify every file of the checkpoint and read its state, without running any code that it may hold."""
    for name, entry in checkpoint.files.items():
        _verify(checkpoint.path / name, entry)
    path = checkpoint.path / STATE_NAME
    try:
        with path.open("rb") as file:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError) as error:
        raise BadCheckpoint(
            f"{STATE_NAME} holds more than tensors and plain containers, or isn't whole: {error}"
        ) from error
    if not isinstance(state, dict):
        raise BadCheckpoint(f"{STATE_NAME} holds a {type(state).__name__}, expected a dictionary")
    return state


def _verify(path: Path, entry: dict[str, Any]) -> None:
    running = hashlib.sha256()
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry["size"]:
                raise BadCheckpoint(f"{path.name} has {size} bytes, its manifest says {entry['size']}")
            while chunk := file.read(_CHUNK):
                running.update(chunk)
    except FileNotFoundError as error:
        raise BadCheckpoint(f"{path.name} is missing") from error
    if running.hexdigest() != entry["sha256"]:
        raise BadCheckpoint(f"{path.name} is not what was written: its sha256 differs from the manifest's")
