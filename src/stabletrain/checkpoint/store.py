"""The checkpoints of one run: when to save, what to keep, what to continue from."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from stabletrain.checkpoint.files import (
    FORMAT_VERSION,
    STATE_NAME,
    Checkpoint,
    checkpoint_folders,
    free_name,
    manifest_or_none,
    read_manifest,
    read_state,
)
from stabletrain.errors import ConfigurationError
from stabletrain.folder import fsync_folder, json_text, write_whole
from stabletrain.plain import plain
from stabletrain.sealed import MANIFEST_NAME, Damaged, manifest_text, versions, write_tensors

logger = logging.getLogger(__name__)

BEST_NAME = "best.json"
_HEALTHY_SECTIONS = ("model", "optimizer", "ema")


class CheckpointStore:
    """Saves and finds the checkpoints of one run.

    Keeps the newest `keep_last` and the best. Nothing is removed before its successor is safely on disk, and a state
    that isn't finite is not written at all. A disk that is full or can't be written doesn't stop training: the
    error is logged and counted in `errors`, and the checkpoints that are there stay.

    Args:
        folder: the run's folder; the checkpoints lie in `checkpoints` below it.
        keep_last: how many of the newest to keep, at least 1; the best is kept besides.
        every_updates: save after this many updates; None for epoch ends only.
        every_epochs: save at the end of each so many epochs; 0 for never.
        metric: name of the validation metric that says which one is best.
        mode: "min" if less is better, "max" if more is.

    Raises:
        ConfigurationError: a number or mode that can't be used.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = CheckpointStore(Path(folder))
        ...     path = store.save({"model": {"weight": torch.ones(2)}}, updates=10, metrics={"loss": 0.5})
        ...     print(path.name, store.latest()["model"]["weight"])
        step_000000010 tensor([1., 1.])
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        keep_last: int = 2,
        every_updates: int | None = None,
        every_epochs: int = 1,
        metric: str = "loss",
        mode: Literal["min", "max"] = "min",
    ) -> None:
        _require_count("checkpoint.keep_last", keep_last, 1)
        _require_count("checkpoint.every_epochs", every_epochs, 0)
        if every_updates is not None:
            _require_count("checkpoint.every_updates", every_updates, 1)
        if mode not in ("min", "max"):
            raise ConfigurationError(f"checkpoint.mode={mode!r}: give min (less is better) or max (more is better)")
        self.folder = Path(folder) / "checkpoints"
        self.keep_last, self.every_updates, self.every_epochs = keep_last, every_updates, every_epochs
        self.metric, self.mode = metric, mode
        self.errors = 0  # saves that the disk refused
        self.refused = 0  # saves that were not made because the state wasn't finite
        self.notes: list[str] = []  # what `latest` had to say about bad checkpoints
        self.found: Path | None = None  # the checkpoint that `latest` or `load` read last
        self._exempt: tuple[str, ...] = ()
        self._saved_updates = -1
        self._first_save = True
        self._sweep(_left_by_a_dead_process)

    @property
    def enabled(self) -> bool:
        """Whether anything is ever due."""
        return self.every_updates is not None or self.every_epochs > 0

    def exempt(self, names: Iterable[str]) -> None:
        """Let the tensors with these names hold infinities or NaN: buffers such as a causal mask, that always did.

        Args:
            names: names as in the model's `state_dict`, usually `nonfinite_names(model.state_dict())` before training.
        """
        self._exempt += tuple(names)

    def due(self, *, updates: int, epoch_ended: bool, epoch: int) -> bool:
        """Return whether to save now.

        Args:
            updates: updates so far.
            epoch_ended: an epoch has just ended.
            epoch: the epoch that runs or has just ended, counted from 0.
        """
        if epoch_ended and self.every_epochs > 0 and (epoch + 1) % self.every_epochs == 0:
            return True
        if self.every_updates is None or updates == 0 or updates == self._saved_updates:
            return False
        return updates % self.every_updates == 0

    def save(self, state: dict[str, Any], *, updates: int, metrics: dict[str, float] | None = None) -> Path | None:
        """Write a checkpoint, then remove those that are no longer to be kept.

        Args:
            state: what the parts of the run remember; tensors, numbers, text and plain containers of them.
            updates: updates so far; they name the checkpoint.
            metrics: validation metrics of this state; None when it wasn't validated.

        Returns:
            The checkpoint's folder, or None when nothing was written: the state isn't finite, or the disk refused.

        Raises:
            TypeError: the state holds something that can't be loaded without running code; names it.
        """
        state = plain(state, "state")
        self._saved_updates = updates  # also when it fails: the next occasion tries again, not the next step
        bad = [name for name in _nonfinite_in_sections(state) if not self._is_exempt(name)]
        if bad:
            self.refused += 1
            more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
            logger.error("checkpoint at update %d not written: not finite: %s%s", updates, ", ".join(bad[:5]), more)
            return None
        try:
            path = self._publish(state, updates, metrics)
        except OSError as error:
            self.errors += 1
            logger.error(
                "checkpoint at update %d not written (%s); training goes on, earlier checkpoints are intact; "
                "free space or rights in %s", updates, error, self.folder
            )  # fmt: skip
            return None
        self._rotate()
        return path

    def _publish(self, state: dict[str, Any], updates: int, metrics: dict[str, float] | None) -> Path:
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True)
            fsync_folder(self.folder.parent)
        if self._first_save:
            # Who saves has the run folder's lock: nobody else is at what lies aside.
            self._sweep(lambda path: True)
            self._first_save = False
        name = free_name(self.folder, f"step_{updates:09d}")
        temporary = self.folder / f".tmp-{name}-{os.getpid()}"
        try:
            temporary.mkdir()
            files = {STATE_NAME: write_tensors(temporary / STATE_NAME, state)}
            manifest = {
                "format": FORMAT_VERSION,
                "serial": max((checkpoint.serial for checkpoint in self._good_manifests()), default=0) + 1,
                "updates": updates,
                "metrics": {} if metrics is None else metrics,
                "versions": versions(),
                "files": files,
            }
            write_whole(temporary / MANIFEST_NAME, manifest_text(manifest))
            fsync_folder(temporary)
            os.rename(temporary, self.folder / name)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_folder(self.folder)
        return self.folder / name

    def _rotate(self) -> None:
        # Runs after the newest one is safe. A failure here loses nothing; the next save tries again.
        try:
            newest_first = sorted(self._good_manifests(), key=lambda checkpoint: -checkpoint.serial)
            best = self._best_of(newest_first)
            if best is not None:
                self._note_best(best)
            for checkpoint in newest_first[self.keep_last :]:
                if best is None or checkpoint.path != best.path:
                    doomed = checkpoint.path.with_name(f".del-{checkpoint.path.name}-{os.getpid()}")
                    os.rename(checkpoint.path, doomed)
                    shutil.rmtree(doomed)
        except OSError as error:
            self.errors += 1
            logger.error("old checkpoints in %s could not be removed (%s)", self.folder, error)

    def best(self) -> Checkpoint | None:
        """Return the best of the checkpoints that are there, or None when none was validated."""
        return self._best_of(sorted(self._good_manifests(), key=lambda checkpoint: -checkpoint.serial))

    def _best_of(self, newest_first: list[Checkpoint]) -> Checkpoint | None:
        # The manifests are the record: the best is never removed, so it is always among them. NaN is null there.
        # Of equals, the oldest.
        sign = 1.0 if self.mode == "min" else -1.0
        rated = [
            (sign * value, checkpoint.serial, checkpoint)
            for checkpoint in newest_first
            if (value := checkpoint.metrics.get(self.metric)) is not None
        ]
        return min(rated, key=lambda item: item[:2])[2] if rated else None

    def _note_best(self, best: Checkpoint) -> None:
        record = json_text(
            {"checkpoint": best.path.name, "metric": self.metric, "mode": self.mode, "updates": best.updates,
             "value": best.metrics[self.metric]}
        )  # fmt: skip
        path = self.folder / BEST_NAME
        if not path.exists() or path.read_text() != record:
            write_whole(path, record)

    def latest(self) -> dict[str, Any] | None:
        """Return the state of the newest good checkpoint, or None when there never was one.

        A bad one is renamed to `*.corrupt`, told as a warning and in `notes`, and the one before is tried.

        Raises:
            ConfigurationError: there are checkpoints and none is good, or one has a format that isn't known.
        """
        self.notes = []
        candidates = []
        for path in self._folders():
            try:
                candidates.append(read_manifest(path))
            except (Damaged, OSError, RuntimeError) as error:
                self._set_aside(path, error)
        for checkpoint in sorted(candidates, key=lambda checkpoint: -checkpoint.serial):
            try:
                state = read_state(checkpoint)
            except (Damaged, OSError, RuntimeError) as error:
                self._set_aside(checkpoint.path, error)
                continue
            self.found, self._saved_updates = checkpoint.path, checkpoint.updates
            return state
        if self.folder.is_dir() and (any(self.folder.glob("*.corrupt")) or any(self._folders())):
            raise ConfigurationError(
                f"none of the checkpoints in {self.folder} is good"
                + "".join(f"\n  {note}" for note in self.notes)
                + "\nput a good copy back, or start anew under another name: name=<other>"
            )
        return None

    def load(self, path: Path | str) -> dict[str, Any]:
        """Return the state of one checkpoint.

        Args:
            path: a checkpoint's folder, or a run's folder, whose newest checkpoint is taken.

        Raises:
            ConfigurationError: there is no checkpoint, it is bad, or its format isn't known. Nothing is renamed.
        """
        path = Path(path)
        if not (path / MANIFEST_NAME).exists():
            inside = path / "checkpoints" if (path / "checkpoints").is_dir() else path
            checkpoints = [manifest_or_none(folder) for folder in checkpoint_folders(inside)]
            found = [checkpoint for checkpoint in checkpoints if checkpoint is not None]
            if not found:
                raise ConfigurationError(
                    f"no checkpoint in {path}; give the folder of a checkpoint (…/step_000000100) or of a run"
                )
            path = max(found, key=lambda checkpoint: checkpoint.serial).path
        try:
            checkpoint = read_manifest(path)
            state = read_state(checkpoint)
        except (Damaged, OSError, RuntimeError) as error:
            raise ConfigurationError(f"the checkpoint {path} can't be used: {error}; give another one") from error
        self.found, self._saved_updates = checkpoint.path, checkpoint.updates
        return state

    def state_dict(self) -> dict[str, Any]:
        """Return the counts; what is best is read from the manifests."""
        return {"errors": self.errors, "refused": self.refused}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the counts."""
        self.errors, self.refused = int(state["errors"]), int(state["refused"])

    def _folders(self) -> list[Path]:
        return checkpoint_folders(self.folder)

    def _good_manifests(self) -> Iterator[Checkpoint]:
        for path in self._folders():
            checkpoint = manifest_or_none(path)
            if checkpoint is not None:
                yield checkpoint

    def _is_exempt(self, name: str) -> bool:
        return any(name == exempt or name.endswith(f".{exempt}") for exempt in self._exempt)

    def _set_aside(self, path: Path, error: Exception) -> None:
        note = f"{path.name}: {error}"
        # A file that can't be read now may be good tomorrow (rights, a network disk); what is wrong stays wrong.
        if isinstance(error, Damaged):
            aside = path.with_name(free_name(path.parent, path.name, ".corrupt"))
            try:
                os.rename(path, aside)
                note += f" (set aside as {aside.name})"
            except OSError as refusal:
                note += f" (could not be set aside: {refusal})"
        self.notes.append(note)
        logger.warning("bad checkpoint, the one before is used: %s", note)

    def _sweep(self, stale: Callable[[Path], bool]) -> None:
        # What a killed process left half written or half removed.
        for pattern in (".tmp-*", ".del-*"):
            for path in self.folder.glob(pattern) if self.folder.is_dir() else ():
                if stale(path):
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _left_by_a_dead_process(path: Path) -> bool:
    # The name ends with the writer's number. One that lives may be at it: somebody may look into a run that goes on.
    number = path.name.rpartition("-")[2]
    if not number.isdigit() or int(number) == os.getpid():
        return True
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def nonfinite_names(tree: Any, prefix: str = "") -> list[str]:
    """Return the dotted names of the floating tensors in `tree` that hold NaN or an infinity.

    Example:
        >>> nonfinite_names({"weight": torch.ones(2), "mask": torch.tensor([0.0, float("-inf")])})
        ['mask']
    """
    if isinstance(tree, torch.Tensor):
        floating = tree.is_floating_point() or tree.is_complex()
        if floating and tree.is_sparse:
            tree = tree.coalesce().values()
        if floating and tree.element_size() == 1:
            tree = tree.float()  # 8 bits: what follows isn't written for them
        return [prefix] if floating and not bool(torch.isfinite(tree).all()) else []
    items: Iterable[tuple[Any, Any]]
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, (list, tuple)):
        items = enumerate(tree)
    else:
        return []
    dot = f"{prefix}." if prefix else ""
    return [found for name, item in items for found in nonfinite_names(item, f"{dot}{name}")]


def _nonfinite_in_sections(state: dict[str, Any]) -> list[str]:
    return [name for section in _HEALTHY_SECTIONS for name in nonfinite_names(state.get(section), section)]


def _require_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(f"{name}={value!r}: give a whole number, at least {least}")
