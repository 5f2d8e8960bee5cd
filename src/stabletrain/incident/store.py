"""The incidents of one run: which to keep, and how they come to the disk."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stabletrain.checks import whole
from stabletrain.errors import ConfigurationError
from stabletrain.folder import fsync_folder, json_text, write_whole, yaml_text
from stabletrain.incident.files import (
    CONFIG_NAME,
    FORMAT_VERSION,
    INCIDENT_NAME,
    STATE_NAME,
    VERDICT_NAME,
    Incident,
    incident_folders,
)
from stabletrain.incident.statistics import named_tensors, statistics
from stabletrain.plain import plain
from stabletrain.sealed import (
    MANIFEST_NAME,
    Damaged,
    Entry,
    manifest_text,
    read_manifest,
    versions,
    write_tensors,
    write_text,
)

logger = logging.getLogger(__name__)


class IncidentStore:
    """Writes the incidents of one run: the first ones and the latest, within limits of number and size.

    A disk that is full or can't be written doesn't stop training: the error is logged and counted in `errors`.

    Args:
        folder: the run's folder; the incidents lie in `incidents` below it.
        max_incidents: how many to keep, half of them the first ones; 0 for none.
        max_bytes: size of all of them. Where it is too small, those in the middle go first; a state that doesn't fit
            at all is left out, and that incident can't be replayed.

    Raises:
        ConfigurationError: for a negative number.
    """

    def __init__(self, folder: Path | str, *, max_incidents: int = 20, max_bytes: int = 200 << 20) -> None:
        for name, value in (("guard.max_incidents", max_incidents), ("guard.max_incident_bytes", max_bytes)):
            whole(name, value, 0)
        self.folder = Path(folder) / "incidents"
        self.max_incidents, self.max_bytes = max_incidents, max_bytes
        self.recorded = 0  # incidents, kept or not
        self.errors = 0  # incidents that could not be written

    def record(self, incident: Incident) -> Path | None:
        """Write an incident, and drop one that is no longer to be kept.

        Args:
            incident: its tensors may be the run's own; they are written before this returns.

        Returns:
            Its folder, or None where nothing was written.
        """
        self.recorded += 1
        if self.max_incidents == 0:
            return None
        temporary = self.folder / f".tmp-{incident.name}-{os.getpid()}"
        try:
            self._prepare()
            temporary.mkdir()
            self._write(temporary, incident)
            path = self._publish(temporary, self.folder / incident.name)
        except (OSError, TypeError) as error:
            self.errors += 1
            logger.error("incident %s not written (%s); training goes on", incident.name, error)
            shutil.rmtree(temporary, ignore_errors=True)
            return None
        return path

    def amend(self, path: Path | None, **facts: Any) -> None:
        """Add facts to an incident's `verdict.json`, for example `kind="salvaged"` and `samples` once they are known.

        Args:
            path: what `record` returned; None does nothing.
            facts: what JSON can hold.
        """
        if path is None:
            return
        try:
            verdict = json.loads((path / VERDICT_NAME).read_text())
            write_whole(path / VERDICT_NAME, json_text({**verdict, **facts}))
        except (OSError, ValueError) as error:
            self.errors += 1
            logger.error("incident %s not amended (%s); training goes on", path.name, error)

    def state_dict(self) -> dict[str, int]:
        """Return the counts; the incidents themselves are on disk."""
        return {"recorded": self.recorded, "errors": self.errors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the counts."""
        self.recorded, self.errors = int(state["recorded"]), int(state["errors"])

    def _prepare(self) -> None:
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True)
            fsync_folder(self.folder.parent)
        for pattern in (".tmp-*", ".del-*"):  # left by a process that was killed; the run's folder is locked
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    def _write(self, folder: Path, incident: Incident) -> None:
        content, state = incident.content(), plain(incident.state, "state")
        files = {
            INCIDENT_NAME: write_tensors(folder / INCIDENT_NAME, plain(content, "incident")),
            CONFIG_NAME: write_text(folder / CONFIG_NAME, yaml_text(incident.settings)),
        }
        updates = incident.position["updates"]
        entry = self._write_state(folder / STATE_NAME, state, updates)
        if entry is not None:
            files[STATE_NAME] = entry
        stored = replace(incident, batches=content["batches"], state=state if entry is not None else None)
        verdict = {
            **incident.verdict(),
            "replayable": stored.replayable,
            "statistics": statistics(content["batches"], state),
        }
        write_whole(folder / VERDICT_NAME, json_text(verdict))
        manifest = {"format": FORMAT_VERSION, "updates": updates, "versions": versions(), "files": files}
        write_whole(folder / MANIFEST_NAME, manifest_text(manifest))
        fsync_folder(folder)

    def _write_state(self, path: Path, state: dict[str, Any] | None, updates: int) -> Entry | None:
        """Write the state, or let the file be that of the latest incident if the state is the same."""
        if state is None:
            return None
        kept = incident_folders(self.folder)
        if kept and (entry := _link_if_same(kept[-1], path, state, updates)) is not None:
            return entry
        needed = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _strided(state)}.values())
        if needed + _size(kept[:1]) + _size([path.parent]) > self.max_bytes:
            logger.warning(
                "the state of %s (%.0f MiB) is left out: the incidents of this run may fill %.0f MiB "
                "(guard.max_incident_bytes); it can't be replayed", path.parent.name, needed / 2**20,
                self.max_bytes / 2**20,
            )  # fmt: skip
            return None
        return write_tensors(path, state)

    def _publish(self, temporary: Path, path: Path) -> Path | None:
        """Drop what has to go, and give the new incident its name."""
        kept = [folder for folder in incident_folders(self.folder) if folder != path]
        first = kept[: max(1, self.max_incidents // 2)]
        # Those in the middle go first, then the latest of the first ones, but never the very first.
        droppable = [*kept[len(first) :], *reversed(first[1:])]
        while droppable and (len(kept) >= self.max_incidents or _size([*kept, temporary]) > self.max_bytes):
            kept.remove(droppable[0])
            self._drop(droppable.pop(0))
        if len(kept) >= self.max_incidents or _size([*kept, temporary]) > self.max_bytes:
            shutil.rmtree(temporary)
            return None
        if path.exists():  # the same step again, after a resumption
            self._drop(path)
        os.rename(temporary, path)
        fsync_folder(self.folder)
        return path

    def _drop(self, path: Path) -> None:
        doomed = path.with_name(f".del-{path.name}-{os.getpid()}")
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def _link_if_same(previous: Path, path: Path, state: dict[str, Any], updates: int) -> Entry | None:
    """Make `path` one file with the state of `previous`, if that holds the same bits; else return None."""
    try:
        manifest = read_manifest(previous, what="incident", version=FORMAT_VERSION, needed=STATE_NAME)
        if manifest["updates"] != updates:
            return None
        before = torch.load(str(previous / STATE_NAME), map_location="cpu", weights_only=True, mmap=True)
        if not _same(before, state):
            return None
        os.link(previous / STATE_NAME, path)
    except (Damaged, ConfigurationError, OSError, RuntimeError, pickle.UnpicklingError):
        return None  # damaged, or a file system without links: a copy of its own is as good
    entry: Entry = manifest["files"][STATE_NAME]
    return entry


def _same(one: Any, other: Any) -> bool:
    """Return whether two trees hold the same bits."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if (one.dtype, one.shape, one.layout) != (
            other.dtype,
            other.shape,
            other.layout,
        ) or one.layout != torch.strided:
            return False
        return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _size(folders: Iterable[Path]) -> int:
    """Return the bytes of all files in some folders; a file with several names counts once."""
    facts = [path.stat() for folder in folders for path in folder.iterdir()]
    return sum({(fact.st_dev, fact.st_ino): fact.st_size for fact in facts}.values())


def _strided(tree: Any) -> list[Tensor]:
    return [tensor for _, tensor in named_tensors(tree) if tensor.layout == torch.strided]
