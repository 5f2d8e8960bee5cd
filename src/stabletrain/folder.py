"""A run's folder: created and locked, with files in it that are whole at any moment.

A file is either replaced as a whole (`write_whole`) or grows by whole pieces (`AppendedFile`); a process that is
killed, or a disk that is full, leaves what was there before.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import logging
import math
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml  # type: ignore[import-untyped]

from stabletrain.errors import ConfigurationError

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"
TEMPORARY_PREFIX = ".tmp-"

# File systems that know no locks say so with one of these; the run goes on without.
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def fsync_folder(path: Path) -> None:
    """Let what was created, renamed or removed in the folder `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of `data`; `os.write` alone may stop half-way, for example when the disk fills."""
    rest = memoryview(data)
    while len(rest) > 0:
        rest = rest[os.write(descriptor, rest) :]


def write_whole(path: Path | str, content: bytes | str) -> None:
    """Replace the file `path` by `content` so that a reader sees the old file or the new one and nothing between.

    Args:
        path: the file; its folder must exist.
        content: bytes, or text that is written as UTF-8.

    Raises:
        OSError: the disk is full or the folder can't be written; the old file is as it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(Path(folder, "a.txt"), "hello")
        ...     print(Path(folder, "a.txt").read_text(), os.listdir(folder))
        hello ['a.txt']
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def json_text(value: Any) -> str:
    """Return `value` as strict JSON: NaN and infinities as null, tuples, arrays and tensors as lists or numbers.

    Example:
        >>> print(json_text({"loss": float("nan"), "indices": (1, 2)}), end="")
        {
          "loss": null,
          "indices": [
            1,
            2
          ]
        }
    """
    return json.dumps(_strict(value), indent=2, allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _strict(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return _strict(value.tolist())
    return str(value)


def yaml_text(value: Any) -> str:
    """Return `value` as YAML; anything that plain YAML can't hold as text.

    Example:
        >>> print(yaml_text({"folder": Path("runs"), "sizes": (8, 8)}), end="")
        folder: runs
        sizes:
        - 8
        - 8
    """
    text: str = yaml.safe_dump(_yaml_values(value), sort_keys=False, allow_unicode=True)
    return text


def _yaml_values(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _yaml_values(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_yaml_values(item) for item in value]
    return value if isinstance(value, (bool, int, float, str)) or value is None else str(value)


class AppendedFile:
    r"""A file that grows by whole pieces: what can't be written completely is taken back.

    Each piece goes to the operating system at once, so that killing the process loses nothing.

    Args:
        path: the file; it is begun when it isn't there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = AppendedFile(Path(folder, "a.csv"))
        ...     file.append(b"1,2\n")
        ...     file.close()
        ...     print(Path(folder, "a.csv").read_text(), end="")
        1,2
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self.size = os.fstat(self._descriptor).st_size

    def append(self, data: bytes) -> None:
        """Add `data` at the end.

        Raises:
            OSError: it could not be written completely; the file is as it was.
        """
        assert self._descriptor is not None, f"{self.path} is closed"
        try:
            write_all(self._descriptor, data)
        except OSError:
            os.ftruncate(self._descriptor, self.size)
            raise
        self.size += len(data)

    def sync(self) -> None:
        """Let what was appended survive a power cut."""
        assert self._descriptor is not None, f"{self.path} is closed"
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class RunFolder:
    """A run's folder, created where it isn't there and locked against a second trainer until `close`.

    The lock ends with the process, however that ends, and processes forked from it don't hold it.

    Args:
        path: the folder; its parents are created too.

    Raises:
        ConfigurationError: another process holds the lock, or the folder can't be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     with RunFolder(Path(parent, "runs", "a")) as folder:
        ...         print(folder.path.name, folder.path.is_dir())
        a True
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._descriptor: int | None = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        try:
            self._lock(descriptor)
            self._sweep()
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        _locked.add(self)

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 64, 0).decode(errors="replace").strip() or "unknown"
            raise ConfigurationError(
                f"the run folder {self.path} is in use by another trainer (process {holder}); "
                "wait until it ends, or give this run another name: name=<other>"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise _unwritable(self.path, error) from error
            logger.warning("%s: this file system has no locks; start no second run with this name", self.path)
        try:
            os.ftruncate(descriptor, 0)
            write_all(descriptor, f"{os.getpid()}\n".encode())
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def _sweep(self) -> None:
        # What a killed process left aside; the lock says that nobody is writing it.
        for stale in self.path.glob(f"{TEMPORARY_PREFIX}*"):
            if stale.is_file():
                stale.unlink(missing_ok=True)

    def set_aside(self) -> Path | None:
        """Move what an earlier run left here to a folder beside this one, `<name>-before-1` or the next free number.

        Returns:
            That folder, or None if there was nothing to move.
        """
        left = [entry for entry in self.path.iterdir() if entry.name != LOCK_NAME]
        if not left:
            return None
        numbers = itertools.count(1)
        aside = next(p for n in numbers if not (p := self.path.with_name(f"{self.path.name}-before-{n}")).exists())
        try:
            aside.mkdir()
            for entry in left:
                entry.rename(aside / entry.name)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        logger.warning("%s held an earlier run, which is now in %s", self.path, aside)
        return aside

    def close(self) -> None:
        """Give the lock back; a second time does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            _locked.discard(self)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _unwritable(path: Path, error: OSError) -> ConfigurationError:
    reason = error.strerror or type(error).__name__
    return ConfigurationError(
        f"the run folder {path} can't be written: {reason}; free space or rights there, or choose another folder"
    )


_locked: weakref.WeakSet[RunFolder] = weakref.WeakSet()


def _leave_locks_to_the_parent() -> None:
    # A forked worker (a data loader's) shares the lock: when it outlives a killed trainer, it would keep the folder.
    for folder in list(_locked):
        folder.close()


os.register_at_fork(after_in_child=_leave_locks_to_the_parent)
