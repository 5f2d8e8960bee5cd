"""Back to the last healthy state, past the data that led away from it, at a lower learning rate."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from stabletrain.errors import UnstableTraining
from stabletrain.guard import Policy
from stabletrain.guard.measure import state_is_finite
from stabletrain.guard.spikes import Divergence
from stabletrain.trainer.run import Run


class Rollback:
    """Keeps a copy of the state in host memory, returns to it, and says how far the learning rate is lowered.

    Args:
        policy: how often to copy, how far to lower the rate, how slowly to raise it again, how often to return.

    Example:
        >>> rollback = Rollback(Policy(backoff=0.5, rewarm=10, recover=100))
        >>> rollback.factor(0)
        1.0
        >>> rollback.lower(updates=40)
        >>> [rollback.factor(update) for update in (40, 45, 50, 139, 140)]
        [0.05, 0.275, 0.5, 0.5, 1.0]
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.count = 0
        self._level = 1.0
        self._since = 0  # update at which the rate was lowered or raised last, or a step was rejected
        self._warm_from: int | None = None  # update after which the rate rises again
        self._kept: dict[str, Any] | None = None
        self._kept_updates = -1
        self._divergence = Divergence(factor=policy.diverged_factor, updates=policy.diverged_updates)

    def observe(self, run: Run, loss: float) -> str | None:
        """Take in the loss of an applied step, and copy the state if it is time.

        Args:
            run: after the step.
            loss: of the step.

        Returns:
            In words, that the training has diverged; None while it hasn't.
        """
        diverged = self._divergence.observe(loss)
        if self._divergence.at_ease:
            self.keep(run)
        return diverged

    def factor(self, updates: int) -> float:
        """Return the factor on the learning rate: lowered by each rollback, warmed up after it, given back in calm.

        Args:
            updates: updates done so far.
        """
        level = self._settled(updates)
        if self._warm_from is None or updates >= self._warm_from + self.policy.rewarm:
            return level
        return level * (0.1 + 0.9 * (updates - self._warm_from) / self.policy.rewarm)

    def lower(self, updates: int) -> None:
        """Lower the rate once more, from this update on."""
        self._level, self._since, self._warm_from = self._settled(updates) * self.policy.backoff, updates, updates

    def disturbed(self, updates: int) -> None:
        """Note a rejected step: calm begins anew."""
        self._level, self._since = self._settled(updates), updates

    def _settled(self, updates: int) -> float:
        """The level after one `backoff` was taken back for each calm stretch."""
        calm = max(0, updates - self._since) // self.policy.recover
        return min(1.0, self._level * self.policy.backoff**-calm)

    def keep(self, run: Run, *, now: bool = False) -> None:
        """Copy the state if it is time and everything in it is finite.

        Args:
            run: whose state is copied.
            now: copy whatever the time, at a checkpoint for example, so that a resumed run holds the same copy.
        """
        due = self._kept is None or run.progress.updates >= self._kept_updates + self.policy.snapshot_every
        # At a checkpoint even if there was no update since: a rejected step may have lowered the loss scale.
        due = due and run.progress.updates != self._kept_updates
        if (due or now) and not run.ranks.any(not bool(state_is_finite([run.optimizer])))[0]:
            self._kept, self._kept_updates = _copied(learned_state(run)), run.progress.updates

    def kept(self) -> dict[str, Any] | None:
        """Return the copy, for a checkpoint of another state than this; None while there is none."""
        return self._kept

    def go_back(self, run: Run, why: UnstableTraining) -> None:
        """Restore the copy, count it, and lower the rate; the data goes on where it stands.

        Raises:
            UnstableTraining: when there is no healthy state to return to, or it was returned to too often already.
        """
        if self._kept is None or self.count >= self.policy.max_rollbacks:
            tried = f"{self.count} rollbacks were tried, the learning rate is at {self._level:.3g} of its plan"
            raise UnstableTraining(f"{why} {tried if self.count else 'No healthy state was there to return to'}.")
        kept = _copied(self._kept)  # an optimizer keeps what it loads
        run.model.load_state_dict(kept["model"])
        run.optimizer.load_state_dict(kept["optimizer"])
        if run.ema is not None:
            run.ema.load_state_dict(kept["ema"])
        run.precision.load_state_dict(kept["precision"])
        run.progress.updates = self._kept_updates
        run.guard.ledger.forgive()
        run.ramp.disturb()
        self._divergence.reset()
        self.count += 1
        self.lower(self._kept_updates)
        run.tracker.warning(
            f"rolled back to update {self._kept_updates} (rollback {self.count} of {self.policy.max_rollbacks}): {why} "
            f"The learning rate is now at {self._level:.3g} of its plan."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return counts and level; the copy itself is the checkpoint's own state, or a file of its own there."""
        return {
            "kept_updates": self._kept_updates,
            "count": self.count,
            "level": self._level,
            "since": self._since,
            "warm_from": self._warm_from,
            "divergence": self._divergence.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], kept: dict[str, Any] | None = None) -> None:
        """Take over counts and level.

        Args:
            state: what `state_dict` returned.
            kept: the copy that it belongs to; None: there was none, or it is the state that the run is in, which `keep`
                is to copy.
        """
        self.count, self._level = int(state["count"]), float(state["level"])
        self._since, self._warm_from = int(state["since"]), state["warm_from"]
        self._divergence.load_state_dict(state["divergence"])
        self._kept, self._kept_updates = kept, int(state["kept_updates"]) if kept is not None else -1


def learned_state(run: Run) -> dict[str, Any]:
    """Return what updates change: model, optimizer, average of the weights, loss scaler."""
    return {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "ema": run.ema.state_dict() if run.ema is not None else {},
        "precision": run.precision.state_dict(),
    }


def _copied(tree: Any) -> Any:
    """Copy a state to host memory, so that nothing in it is shared."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {name: _copied(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_copied(value) for value in tree]
    return copy.deepcopy(tree)
