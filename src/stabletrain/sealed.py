"""Folders of files under a manifest of their sizes and hashes: written, verified, and read without running any code.

The manifest is written last and holds a hash of itself, so that what is torn or altered shows.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import platform
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from stabletrain import __version__
from stabletrain.errors import ConfigurationError
from stabletrain.folder import json_text, write_all, write_whole

MANIFEST_NAME = "manifest.json"
CHUNK = 32 << 20  # bytes that one hash covers, so that the chunks of a large file can be verified side by side
_PIECE = 1 << 20  # bytes that are read or written at once

_VERIFIERS = 8  # threads

Entry = dict[str, Any]  # `size` in bytes of a file, and `sha256` of each of its chunks


class Damaged(Exception):
    """A file is torn, altered or harmful: says which one and what about it."""


class Cancelled(Exception):
    """Writing a file was given up, because nobody wants it any more."""


def _never() -> bool:
    return False


class _HashingFile:
    """What `torch.save` writes to: passes everything on to the disk and to the hash of the current chunk."""

    def __init__(self, descriptor: int, cancelled: Callable[[], bool]) -> None:
        self._descriptor, self._cancelled = descriptor, cancelled
        self._hashes: list[Any] = [hashlib.sha256()]
        self.size = 0
        self.error: OSError | Cancelled | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        written = len(rest)
        try:
            while len(rest) > 0:
                rest = rest[self._write_piece(rest[: min(_PIECE, CHUNK - self.size % CHUNK)]) :]
        except (OSError, Cancelled) as error:
            self.error = error
            raise
        return written

    def _write_piece(self, piece: memoryview) -> int:
        if self._cancelled():
            raise Cancelled("given up")
        write_all(self._descriptor, piece)
        if self.size > 0 and self.size % CHUNK == 0:
            self._hashes.append(hashlib.sha256())
        self._hashes[-1].update(piece)
        self.size += len(piece)
        return len(piece)

    def flush(self) -> None:
        """Nothing is held back."""

    def entry(self) -> Entry:
        return {"size": self.size, "sha256": [running.hexdigest() for running in self._hashes]}


class _WithoutChecksums:
    """Switches zip's own checksums off inside the block; several threads may be in one at a time.

    The sha256 sees more, and they would take as long as all the rest.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = True

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = torch.serialization.get_crc32_options()
                torch.serialization.set_crc32_options(False)
            self._inside += 1

    def __exit__(self, *details: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                torch.serialization.set_crc32_options(self._before)


_without_checksums = _WithoutChecksums()


def write_tensors(path: Path, tree: dict[str, Any], cancelled: Callable[[], bool] = _never) -> Entry:
    """Write a tree that `plain` returned and flush it to the disk.

    Args:
        path: the file, which must not be there.
        tree: tensors and plain containers.
        cancelled: asked now and then; True gives up.

    Returns:
        Size and hashes of what was written.

    Raises:
        OSError: the disk refused.
        Cancelled: it was given up.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    file = _HashingFile(descriptor, cancelled)
    try:
        with _without_checksums:
            torch.save(tree, file)  # type: ignore[arg-type]  # it asks for `write` and `flush` alone
        os.fsync(descriptor)
    except RuntimeError as error:
        # Closing its archive after a failed write, torch raises an error of its own that hides the disk's.
        if file.error is not None:
            raise file.error from error
        raise
    finally:
        os.close(descriptor)
    return file.entry()


def write_text(path: Path, text: str) -> Entry:
    """Write a text as UTF-8; return size and hashes of what was written."""
    content = text.encode()
    write_whole(path, content)
    chunks = range(0, max(len(content), 1), CHUNK)
    hashes = [hashlib.sha256(content[first : first + CHUNK]).hexdigest() for first in chunks]
    return {"size": len(content), "sha256": hashes}


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
            str(name): {"size": int(entry["size"]), "sha256": [str(one) for one in entry["sha256"]]}
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
    with _verifying(path, entry):
        pass


def read_tensors(path: Path, entry: Entry) -> dict[str, Any]:
    """Read what `write_tensors` wrote to host memory, without running any code that the file may hold.

    The file is verified while it is read, and nothing of it is returned unless it is what was written.

    Raises:
        Damaged: it is missing or differs, or holds anything but tensors and plain containers.
        OSError: it can't be read now.
    """
    with _verifying(path, entry) as file:
        try:
            tree = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError) as error:
            raise Damaged(
                f"{path.name} holds more than tensors and plain containers, or isn't whole: {error}"
            ) from error
    if not isinstance(tree, dict):
        raise Damaged(f"{path.name} holds a {type(tree).__name__}, expected a dictionary")
    return tree


@contextmanager
def _verifying(path: Path, entry: Entry) -> Iterator[BinaryIO]:
    """Open a file and hash its chunks in threads while the block runs; what they find counts before its own errors."""
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise Damaged(f"{path.name} is missing") from error
    with file, ThreadPoolExecutor(min(_VERIFIERS, os.cpu_count() or 1)) as threads:
        size = os.fstat(file.fileno()).st_size
        if size != entry["size"]:
            raise Damaged(f"{path.name} has {size} bytes, its manifest says {entry['size']}")
        chunks = [threads.submit(_chunk_hash, file.fileno(), first) for first in range(0, max(size, 1), CHUNK)]
        try:
            yield file
        finally:
            if [chunk.result() for chunk in chunks] != entry["sha256"]:
                raise Damaged(f"{path.name} is not what was written: its sha256 differs from the manifest's")


def _chunk_hash(descriptor: int, first: int) -> str:
    running, buffer = hashlib.sha256(), memoryview(bytearray(_PIECE))
    place = first
    while (read := os.preadv(descriptor, [buffer[: first + CHUNK - place]], place)) > 0:
        running.update(buffer[:read])
        place += read
    return running.hexdigest()


def seal(path: Path) -> Entry:
    """Flush a file that somebody else's code has written to the disk, and return its size and hashes."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
        return {"size": size, "sha256": [_chunk_hash(file.fileno(), first) for first in range(0, max(size, 1), CHUNK)]}
