"""A run that is asked to end: by a signal, or because its time is up. It saves, and the same command continues."""

from __future__ import annotations

from collections.abc import Iterator

from stabletrain.data import Microbatch, OrderedLoader
from stabletrain.errors import Interrupted
from stabletrain.trainer.resume import save
from stabletrain.trainer.run import Run


def asked(run: Run) -> str | None:
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
    if (why := asked(run)) is not None:
        raise Interrupted(why)


class Polled:
    """Batches between which the run may be asked to end.

    Args:
        run: must be in the same state between any two of them.
        loader: what gives the batches.
    """

    def __init__(self, run: Run, loader: OrderedLoader) -> None:
        self._run, self._loader = run, loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Microbatch]:
        for batch in self._loader:
            poll(self._run)
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
    store.wait()
    if any(store.position.get(name) != getattr(run.progress, name) for name in ("epoch", "step", "steps")):
        save(run, planned=False)
        if store.wait() is None:
            return Interrupted(
                f"{where}; no checkpoint could be written: {store.problem}; the same command continues from the one "
                "before, if there is one"
            )
    return Interrupted(f"{where}; a checkpoint was saved, and the same command continues")
