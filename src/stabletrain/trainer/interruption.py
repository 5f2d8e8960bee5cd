"""A run that is asked to end: by a signal, or because its time is up. It saves, and the same command continues."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stabletrain.checkpoint import CheckpointStore
from stabletrain.data import Microbatch, OrderedLoader
from stabletrain.errors import Interrupted
from stabletrain.trainer.resume import save
from stabletrain.trainer.run import Run


@dataclass(frozen=True)
class Wishes:
    """What is asked of the run from outside, the same on all ranks."""

    leave: str | None = None  # what asks it to end
    save: bool = False  # whether so many minutes have passed

    @property
    def any(self) -> bool:
        """Whether anything is asked."""
        return self.save or self.leave is not None


def wanted(run: Run) -> Wishes:
    """Return what is asked of this rank or any other; all have to look at once."""
    asked = _asked(run)
    overdue = run.checkpoint is not None and run.checkpoint.occasions.overdue
    if not run.ranks.together:
        return Wishes(asked, overdue)
    leaving, saving = run.ranks.sums(asked is not None, overdue)
    if not leaving:
        return Wishes(None, saving > 0)
    said = run.ranks.gather(asked)
    rank, why = next((rank, why) for rank, why in enumerate(said) if why is not None)
    return Wishes(f"{why} (at process {rank})", saving > 0)


def obey(wishes: Wishes) -> None:
    """End the run if that is asked.

    Raises:
        Interrupted: names what asked.
    """
    if wishes.leave is not None:
        raise Interrupted(wishes.leave)


def _asked(run: Run) -> str | None:
    """Return what asks the run to end, None if nothing does."""
    if run.signals.received:
        return run.signals.name
    if run.checkpoint is not None and run.checkpoint.occasions.time_is_up:
        return f"checkpoint.stop_after={run.checkpoint.occasions.stop_after}"
    return None


def poll(run: Run) -> None:
    """End the run if it is asked to.

    Args:
        run: in a state from which it can continue as if nothing had been.

    Raises:
        Interrupted: names what asked.
    """
    obey(wanted(run))


class Polled:
    """Batches between which the run may be asked to end.

    Args:
        run: must be in the same state between any two of them.
        loader: what gives the batches.
        shared: whether each rank sees its share of them; else each sees all.
    """

    def __init__(self, run: Run, loader: OrderedLoader, *, shared: bool = False) -> None:
        self._run, self._loader = run, loader
        self._rank, self._ranks = (run.ranks.rank, run.ranks.size) if shared else (0, 1)

    def __len__(self) -> int:
        return len(range(self._rank, len(self._loader), self._ranks))

    def __iter__(self) -> Iterator[Microbatch]:
        batches = self._loader.share(self._rank, self._ranks)
        for _ in range(0, len(self._loader), self._ranks):  # every rank polls as often, also without a batch
            poll(self._run)
            if (batch := next(batches, None)) is not None:
                yield batch


def leave(run: Run, request: Interrupted) -> Interrupted:
    """Save, unless this very state is saved already, and say how it went.

    Args:
        run: where it was asked to end.
        request: what asked.

    Returns:
        What to tell the user.
    """
    where = f"{request} at epoch {run.progress.epoch}, step {run.progress.step}"
    store = run.checkpoint
    if store is None or not store.occasions.any:
        return Interrupted(f"{where}; nothing was saved, checkpoints are off")
    if run.ranks.from_first(lambda: _is_unsaved(run, store)):
        save(run)
        problem = run.ranks.from_first(lambda: store.problem if store.wait() is None else None)
        if problem is not None:
            return Interrupted(
                f"{where}; no checkpoint could be written: {problem}; the same command continues from the one "
                "before, if there is one"
            )
    return Interrupted(f"{where}; a checkpoint was saved, and the same command continues")


def _is_unsaved(run: Run, store: CheckpointStore) -> bool:
    store.wait()
    return any(store.position.get(name) != getattr(run.progress, name) for name in ("epoch", "step", "steps"))
