"""Folders of files under a manifest of their sizes and hashes: written, verified, and read without running any code.

The manifest is written last and holds a hash of itself, so that what is torn or altered shows.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import platform
from pathlib import Path
from typing import Any

import torch

from stabletrain import __version__
from stabletrain.errors import ConfigurationError
from stabletrain.folder import json_text, write_all, write_whole

MANIFEST_NAME = "manifest.json"
_CHUNK = 1 << 20  # bytes

Entry = dict[str, Any]  # `size` in bytes and `sha256` of a file


class Damaged(Exception):
    """A file is torn, altered or harmful: says which one and what about it."""


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


def write_tensors(path: Path, tree: dict[str, Any]) -> Entry:
    """Write a tree that `plain` returned and flush it to the disk; return size and hash of what was written."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    file = _HashingFile(descriptor)
    crc32 = torch.serialization.get_crc32_options()
    try:
        # The sha256 sees more than zip's own checksums, which would take as long as all the rest.
        torch.serialization.set_crc32_options(False)
        torch.save(tree, file)  # type: ignore[arg-type]  # it asks for `write` and `flush` alone
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


def write_text(path: Path, text: str) -> Entry:
    """Write a text as UTF-8; return size and hash of what was written."""
    content = text.encode()
    write_whole(path, content)
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def versions() -> dict[str, str]:
    """Return the versions that a manifest names."""
    return {"stabletrain": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def manifest_text(manifest: dict[str, Any]) -> str:
    """Return the manifest as JSON with a hash of itself, so that a changed byte anywhere in it shows."""
    return json_text({**manifest, "sha256": hashlib.sha256(json_text(manifest).encode()).hexdigest()})


def read_manifest(path: Path, *, what: str, version: int, needed: str) -> dict[str, Any]:
    """Return what the manifest in the folder `path` says.

    Args:
        path: the folder.
        what: what to call it in an error, "checkpoint" for example.
        version: the format that is understood.
        needed: a file that the manifest must name.

    Raises:
        Damaged: it is missing, torn or altered.
        ConfigurationError: its format isn't known.
        OSError: it can't be read now.
    """
    try:
        text = (path / MANIFEST_NAME).read_bytes()
        manifest: dict[str, Any] = json.loads(text)
        del manifest["sha256"]
        if manifest_text(manifest).encode() != text:
            raise Damaged(f"{MANIFEST_NAME} is not what was written")
        if manifest["format"] != version:
            raise ConfigurationError(
                f"the {what} {path} has format {manifest['format']!r}; this stabletrain ({__version__}) reads format "
                f"{version}; use the version that wrote it: {manifest.get('versions')}"
            )
        manifest["files"] = {
            str(name): {"size": int(entry["size"]), "sha256": str(entry["sha256"])}
            for name, entry in manifest["files"].items()
        }
    except FileNotFoundError as error:
        raise Damaged(f"{MANIFEST_NAME} is missing") from error
    except ConfigurationError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise unreadable(error) from error
    names = manifest["files"]
    if needed not in names or any(Path(name).name != name for name in names):
        raise Damaged(f"{MANIFEST_NAME} names the files {sorted(names)}, expected {needed}")
    return manifest


def unreadable(error: Exception) -> Damaged:
    """Return the error for a manifest whose content isn't what was agreed."""
    return Damaged(f"{MANIFEST_NAME} can't be read ({type(error).__name__}: {error})")


def verify(path: Path, entry: Entry) -> None:
    """Compare a file with what its manifest says.

    Raises:
        Damaged: it is missing or differs.
        OSError: it can't be read now.
    """
    running = hashlib.sha256()
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry["size"]:
                raise Damaged(f"{path.name} has {size} bytes, its manifest says {entry['size']}")
            while chunk := file.read(_CHUNK):
                running.update(chunk)
    except FileNotFoundError as error:
        raise Damaged(f"{path.name} is missing") from error
    if running.hexdigest() != entry["sha256"]:
        raise Damaged(f"{path.name} is not what was written: its sha256 differs from the manifest's")


def read_tensors(path: Path) -> dict[str, Any]:
    """Read what `write_tensors` wrote to host memory, without running any code that the file may hold.

    Raises:
        Damaged: it isn't whole, or holds anything but tensors and plain containers.
        OSError: it can't be read now.
    """
    try:
        with path.open("rb") as file:
            tree = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError) as error:
        raise Damaged(f"{path.name} holds more than tensors and plain containers, or isn't whole: {error}") from error
    if not isinstance(tree, dict):
        raise Damaged(f"{path.name} holds a {type(tree).__name__}, expected a dictionary")
    return tree


def seal(path: Path) -> Entry:
    """Flush a file that somebody else's code has written to the disk, and return its size and hash."""
    running = hashlib.sha256()
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        while chunk := file.read(_CHUNK):
            running.update(chunk)
        return {"size": file.tell(), "sha256": running.hexdigest()}
