"""The checkpoints of one run: saved and found."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from stabletrain.checkpoint.files import (
    FORMAT_VERSION,
    STATE_NAME,
    Checkpoint,
    checkpoint_folders,
    free_name,
    manifest_or_none,
    read_files,
    read_manifest,
)
from stabletrain.checkpoint.health import unhealthy_names
from stabletrain.checkpoint.occasions import Occasions
from stabletrain.checkpoint.retention import Retention
from stabletrain.checkpoint.staging import Staging
from stabletrain.checkpoint.writer import Writer
from stabletrain.errors import ConfigurationError
from stabletrain.folder import fsync_folder, json_text, write_whole
from stabletrain.sealed import MANIFEST_NAME, Damaged, manifest_text, versions, write_tensors

logger = logging.getLogger(__name__)

BEST_NAME = "best.json"


class CheckpointStore:
    """Saves and finds the checkpoints of one run.

    Saving copies the state and returns; a thread looks whether it is finite, writes it and removes what is no longer to
    be kept. The next save waits for it, and so does whatever reads checkpoints. Nothing is removed before its successor
    is safely on disk, and a state that isn't finite is not written at all. A disk that is full or can't be written
    doesn't stop training: the error is logged and counted in `errors`, and the checkpoints that are there stay.

    Args:
        folder: the run's folder; the checkpoints lie in `checkpoints` below it.
        asynchronous: write in a thread, which takes as much host memory as the state has; False: `save` writes itself.
        keep_last: how many of the newest to keep, at least 1; the best is kept besides.
        keep_every: keep for good each checkpoint whose number of updates is a multiple of this; None for none.
        every_updates: save after each so many updates; None for never.
        every_minutes: save when so many minutes have passed since the last time; None for never.
        every_epochs: save at the end of each so many epochs; 0 for never.
        stop_after: save and stop after this duration, such as 3h30m; None for never.
        metric: name of the validation metric that says which one is best.
        mode: "min" if less is better, "max" if more is.

    Raises:
        ConfigurationError: something that can't be used.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = CheckpointStore(Path(folder))
        ...     store.save({"model": {"weight": torch.ones(2)}}, updates=10, metrics={"loss": 0.5})
        ...     print(store.wait().name, store.latest()["model"]["weight"])
        step_000000010 tensor([1., 1.])
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        asynchronous: bool = True,
        keep_last: int = 2,
        keep_every: int | None = None,
        every_updates: int | None = None,
        every_minutes: float | None = None,
        every_epochs: int = 1,
        stop_after: str | None = None,
        metric: str = "loss",
        mode: Literal["min", "max"] = "min",
    ) -> None:
        if not isinstance(asynchronous, bool):
            raise ConfigurationError(f"checkpoint.asynchronous={asynchronous!r}: give true or false")
        self.folder = Path(folder) / "checkpoints"
        self.occasions = Occasions(every_updates, every_minutes, every_epochs, stop_after)
        self.retention = Retention(keep_last, keep_every, metric, mode)
        self.facts: dict[str, str] = {}  # about the run, for the manifests
        self.saved = 0  # checkpoints written
        self.errors = 0  # saves that the disk refused
        self.refused = 0  # saves that were not made because the state wasn't finite
        self.problem = ""  # what the last of these had to say
        self.notes: list[str] = []  # what `latest` had to say about bad checkpoints
        self.found: Path | None = None  # the checkpoint that `latest` or `load` read last
        self.further: dict[str, dict[str, Any]] = {}  # its files besides the state, by name
        self.position: dict[str, int] = {}  # that of the checkpoint written or read last
        self._asynchronous = asynchronous
        self._staging: dict[str, Staging] = {}  # by file
        self._writer = Writer(asynchronous=asynchronous)
        self._exempt: tuple[str, ...] = ()
        self._first_save = True
        self._sweep(_left_by_a_dead_process)

    def exempt(self, names: Iterable[str]) -> None:
        """Let the tensors with these names hold infinities or NaN: buffers such as a causal mask, that always did.

        Args:
            names: names as in the model's `state_dict`, usually `nonfinite_names(model.state_dict())` before training.
        """
        self._exempt += tuple(names)

    def save(
        self,
        state: dict[str, Any],
        *,
        updates: int,
        position: Mapping[str, int] | None = None,
        metrics: Mapping[str, float] | None = None,
        further: Mapping[str, dict[str, Any]] | None = None,
    ) -> None:
        """Set the state aside and begin to write it; what the caller changes afterwards doesn't reach the disk.

        Args:
            state: what the parts of the run remember; tensors, numbers, text and plain containers of them.
            updates: updates so far; they name the checkpoint.
            position: where in the data that is, for the manifest: epoch, step, steps.
            metrics: validation metrics of this state; None when it wasn't validated.
            further: more files of this checkpoint, by name (such as `rank00000.pt`), each with what it holds.

        Raises:
            TypeError: the state holds something that can't be loaded without running code; names it.
            Exception: something unforeseen stopped the save before this one.
        """
        self.wait()
        self.occasions.saved()  # also when it fails: the next occasion tries again, not the next step
        trees = {STATE_NAME: state, **(further or {})}
        assert all(Path(name).name == name != MANIFEST_NAME for name in trees), list(trees)
        files = {name: self._staging_of(name).take(tree, name.removesuffix(".pt")) for name, tree in trees.items()}
        manifest = {"updates": updates, "position": dict(position or {}), "metrics": dict(metrics or {})}
        self._writer.start(lambda cancelled: self._write(files, manifest, cancelled))

    def wait(self) -> Path | None:
        """Wait until what was saved last is on disk.

        Returns:
            Its folder, or None when nothing was written: the state isn't finite, or the disk refused.

        Raises:
            Exception: something unforeseen stopped it; raised once.
        """
        return self._writer.wait()

    def give_up(self) -> None:
        """Drop what is being written, and leave nothing of it aside."""
        self._writer.cancel()

    def best(self) -> Checkpoint | None:
        """Return the best of the checkpoints that are there, or None when none was validated."""
        self.wait()
        return self.retention.best(self._good_manifests())

    def latest(self) -> dict[str, Any] | None:
        """Return the state of the newest good checkpoint, or None when there never was one.

        A bad one is renamed to `*.corrupt`, told as a warning and in `notes`, and the one before is tried.

        Raises:
            ConfigurationError: there are checkpoints and none is good, or one has a format that isn't known.
        """
        self.wait()
        self.notes = []
        candidates = []
        for path in self._folders():
            try:
                candidates.append(read_manifest(path))
            except (Damaged, OSError, RuntimeError) as error:
                self._set_aside(path, error)
        for checkpoint in sorted(candidates, key=lambda checkpoint: -checkpoint.serial):
            try:
                return self._read(checkpoint)
            except (Damaged, OSError, RuntimeError) as error:
                self._set_aside(checkpoint.path, error)
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
        self.wait()
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
            return self._read(read_manifest(path))
        except (Damaged, OSError, RuntimeError) as error:
            raise ConfigurationError(f"the checkpoint {path} can't be used: {error}; give another one") from error

    def summary(self) -> dict[str, Any]:
        """Return what this process has written, what it could not write, and why the last time."""
        return {"saved": self.saved, "failed": self.errors, "refused": self.refused, "problem": self.problem}

    def _read(self, checkpoint: Checkpoint) -> dict[str, Any]:
        files = read_files(checkpoint)
        state = files.pop(STATE_NAME)
        self.found, self.further, self.position = checkpoint.path, files, checkpoint.position
        return state

    def _staging_of(self, name: str) -> Staging:
        if name not in self._staging:
            self._staging[name] = Staging(copy=self._asynchronous)
        return self._staging[name]

    def _write(self, files: dict[str, Any], manifest: dict[str, Any], cancelled: Callable[[], bool]) -> Path | None:
        """Publish what was set aside, unless it isn't healthy, and remove what is no longer to be kept."""
        for staging in self._staging.values():
            staging.wait()
        bad = unhealthy_names(files, self._exempt)
        if bad:
            self.refused += 1
            more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
            self._complain(f"checkpoint at update {manifest['updates']} not written: not finite: "
                           f"{', '.join(bad[:5])}{more}")  # fmt: skip
            return None
        try:
            path = self._publish(files, manifest, cancelled)
        except OSError as error:
            self.errors += 1
            self._complain(
                f"checkpoint at update {manifest['updates']} not written ({error}); training goes on, earlier "
                f"checkpoints are intact; free space or rights in {self.folder}"
            )
            return None
        self.saved += 1
        self.position = manifest["position"]
        self._rotate()
        return path

    def _complain(self, problem: str) -> None:
        self.problem = problem
        logger.error("%s", problem)

    def _publish(self, files: dict[str, Any], manifest: dict[str, Any], cancelled: Callable[[], bool]) -> Path:
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True)
            fsync_folder(self.folder.parent)
        if self._first_save:
            # Who saves has the run folder's lock: nobody else is at what lies aside.
            self._sweep(lambda path: True)
            self._first_save = False
        name = free_name(self.folder, f"step_{manifest['updates']:09d}")
        temporary = self.folder / f".tmp-{name}-{os.getpid()}"
        try:
            temporary.mkdir()
            entries = {file: write_tensors(temporary / file, tree, cancelled) for file, tree in files.items()}
            whole = {
                "format": FORMAT_VERSION,
                "serial": max((checkpoint.serial for checkpoint in self._good_manifests()), default=0) + 1,
                **manifest,
                "facts": self.facts,
                "versions": versions(),
                "files": entries,
            }
            write_whole(temporary / MANIFEST_NAME, manifest_text(whole))
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
            checkpoints = self._good_manifests()
            best = self.retention.best(checkpoints)
            if best is not None:
                self._note_best(best)
            for checkpoint in self.retention.superfluous(checkpoints):
                doomed = checkpoint.path.with_name(f".del-{checkpoint.path.name}-{os.getpid()}")
                os.rename(checkpoint.path, doomed)
                shutil.rmtree(doomed)
        except OSError as error:
            self.errors += 1
            self._complain(f"old checkpoints in {self.folder} could not be removed, or the best not be noted ({error})")

    def _note_best(self, best: Checkpoint) -> None:
        metric, mode = self.retention.metric, self.retention.mode
        record = json_text(
            {"checkpoint": best.path.name, "metric": metric, "mode": mode, "updates": best.updates,
             "value": best.metrics[metric]}
        )  # fmt: skip
        path = self.folder / BEST_NAME
        if not path.exists() or path.read_text() != record:
            write_whole(path, record)

    def _folders(self) -> list[Path]:
        return checkpoint_folders(self.folder)

    def _good_manifests(self) -> list[Checkpoint]:
        found = [manifest_or_none(path) for path in self._folders()]
        return [checkpoint for checkpoint in found if checkpoint is not None]

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
