"""Back to the last healthy state, past the data that led away from it, at a lower learning rate."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from stabletrain.errors import UnstableTraining
from stabletrain.guard import Policy
from stabletrain.guard.measure import state_is_finite
from stabletrain.guard.spikes import Divergence
from stabletrain.optimizer import set_learning_rate
from stabletrain.state import Stateful
from stabletrain.trainer import ladder
from stabletrain.trainer.run import Run
from stabletrain.tree import is_distributed

SOON = 4  # times `diverged_updates`: a rollback before that follows from what led to the one before


class Rollback:
    """Keeps a copy of the state in host memory, returns to it, and says how far the learning rate is lowered.

    With the state comes back what was known of losses and gradient norms then, so that a level reached on the way into
    trouble doesn't count as the best or as usual. The rate is lowered by one `backoff`, and where it may be to blame by
    one more for each rollback in a row, so that a rate far too high is left behind in a few of them. Calm gives it back
    step by step, but never as far as a rate that may be to blame for a rollback.

    Args:
        policy: how often to copy, how far to lower the rate, how slowly to raise it again, how often to return.

    Example:
        >>> rollback = Rollback(Policy(backoff=0.5, rewarm=10, recover=100))
        >>> rollback.factor(0)
        1.0
        >>> rollback.lower(updates=40)
        >>> [rollback.factor(update) for update in (40, 45, 50, 139, 140)]
        [0.05, 0.275, 0.5, 0.5, 1.0]
        >>> rollback.lower(updates=300, times=2, blame_rate=True)
        >>> [rollback.factor(update) for update in (310, 400, 500)]
        [0.25, 0.5, 0.5]
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.count = 0
        self._in_a_row = 0  # rollbacks, each soon after the one before
        self._level = 1.0
        self._lowered_to = 1.0  # the level that the latest rollback set
        self._ceiling = 1.0  # calm doesn't raise the level beyond it
        self._since = 0  # update at which the rate was lowered or raised last, or a step was rejected
        self._warm_from: int | None = None  # update after which the rate rises again
        self._kept: dict[str, Any] | None = None  # the state to return to
        self._trial: dict[str, Any] | None = None  # the one that takes its place, once a loss shows that it is healthy
        self._memory: dict[str, Any] | None = None  # of the copy before, to be written over
        self._divergence = self._detector()

    def _detector(self) -> Divergence:
        return Divergence(factor=self.policy.diverged_factor, updates=self.policy.diverged_updates)

    def observe(self, run: Run, loss: float) -> str | None:
        """Take in the loss of an applied step, and copy the state if it is time.

        The loss is that of the weights before the update, so a copy is trusted only when the next loss is known.

        Args:
            run: after the step.
            loss: of the step.

        Returns:
            In words, that the training has diverged; None while it hasn't.
        """
        diverged = self._divergence.observe(loss)
        if self._trial is not None and self._divergence.is_near_best(loss):
            self._kept, self._memory, self._trial = self._trial, self._kept, None
        newest = self._trial or self._kept
        due = newest is None or run.progress.updates >= newest["updates"] + self.policy.snapshot_every
        if due and self._divergence.at_ease:
            self._trial = self._copy(run, self._trial or self._memory)
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

    def lower(self, updates: int, *, times: int = 1, blame_rate: bool = False) -> None:
        """Lower the rate from this update on.

        Args:
            updates: updates done so far.
            times: how many times `backoff` is applied.
            blame_rate: whether the rate may be to blame, so that calm never raises it as far again. It is blamed in
                any case when it had risen since it was lowered last.
        """
        level = self._settled(updates)
        if blame_rate or level > self._lowered_to:
            self._ceiling = min(self._ceiling, level * self.policy.backoff)
        self._level = self._lowered_to = level * self.policy.backoff**times
        self._since, self._warm_from = updates, updates

    def disturbed(self, updates: int) -> None:
        """Note a rejected step: calm begins anew."""
        self._level, self._since = self._settled(updates), updates

    def _settled(self, updates: int) -> float:
        """The level after one `backoff` was taken back for each calm stretch."""
        calm = max(0, updates - self._since) // self.policy.recover
        if calm * -math.log(self.policy.backoff) >= math.log(self._ceiling / self._level):
            return self._ceiling
        return self._level * self.policy.backoff**-calm

    def begin(self, run: Run) -> None:
        """Copy the state that the run begins with, unless a checkpoint brought a copy along."""
        if self._kept is None:
            set_learning_rate(run.optimizer, 1.0)  # the copy is to hold the base rates, as every later one does
            self._kept = self._copy(run)

    def _copy(self, run: Run, memory: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """Return a copy of the state, in the memory of another; None if not everything in it is finite."""
        if run.ranks.any(not bool(state_is_finite([run.optimizer]))):
            return None
        state = {**learned_state(run), "updates": run.progress.updates}
        state |= {"spikes": run.guard.spikes.state_dict(), "clipping": run.guard.clipper.state_dict()}
        state |= {"schedule": run.schedule.state_dict() if isinstance(run.schedule, Stateful) else {}}
        copy_of_it: dict[str, Any] = copied({**state, "divergence": self._divergence.state_dict()}, memory)
        return copy_of_it

    def go_back(self, run: Run, why: UnstableTraining, *, blame_rate: bool = False) -> None:
        """Restore the copy, count it, and lower the rate; the data goes on where it stands.

        Args:
            run: whose state is replaced.
            why: what happened.
            blame_rate: whether the learning rate may be to blame for it.

        Raises:
            UnstableTraining: when there is no healthy state to return to, or it was returned to too often already.
        """
        if self._kept is None or self.count >= self.policy.max_rollbacks:
            tried = f"{self.count} rollbacks were tried, the learning rate is at {self._level:.3g} of its plan"
            raise UnstableTraining(f"{why} {tried if self.count else 'No healthy state was there to return to'}.")
        soon = self._warm_from is not None and (
            run.progress.updates - self._warm_from < SOON * self.policy.diverged_updates
        )
        self._in_a_row = self._in_a_row + 1 if soon and blame_rate else 1
        self.lower(run.progress.updates, times=self._in_a_row, blame_rate=blame_rate)
        self._since = self._warm_from = self._kept["updates"]
        kept = copied(self._kept)  # an optimizer keeps what it loads
        run.model.load_state_dict(kept["model"])
        run.optimizer.load_state_dict(kept["optimizer"])
        if run.ema is not None:
            run.ema.load_state_dict(kept["ema"])
        if run.objective is not None and "loss" in kept:
            run.objective.load_state_dict(kept["loss"])
        run.precision.load_state_dict(kept["precision"])
        run.progress.updates = kept["updates"]
        self._trial = None
        run.guard.ledger.forgive()
        if kept["spikes"] is not None:
            run.guard.spikes.load_state_dict(kept["spikes"])
        run.guard.clipper.load_state_dict(kept["clipping"])
        if kept["schedule"] and isinstance(run.schedule, Stateful):
            run.schedule.load_state_dict(kept["schedule"])
        self._divergence.load_state_dict(kept["divergence"])
        self._divergence.wary = self._ceiling < 1.0
        run.ramp.disturb()
        ladder.follow_rollback(run)
        self.count += 1
        run.tracker.warning(
            f"rolled back to update {kept['updates']} (rollback {self.count} of {self.policy.max_rollbacks}): "
            f"{why.message} "
            f"The learning rate is now at {self._level:.3g} of its plan."
        )

    def kept(self) -> dict[str, Any] | None:
        """Return the copy to return to; None while there is none."""
        return self._kept

    def forget_losses(self) -> None:
        """Let what is known of losses begin anew, also after a rollback: they can't be compared any more."""
        self._divergence = self._detector()
        for one in (self._kept, self._trial):
            if one is not None:
                one |= {"divergence": self._divergence.state_dict(), "spikes": None}

    def state_dict(self, updates: int = -1) -> dict[str, Any]:
        """Return counts, level, and the copy on trial; the one to return to is a file of its own in a checkpoint.

        Args:
            updates: of the checkpoint. A copy of that very state holds only what the checkpoint doesn't.
        """
        trial = self._trial
        if trial is not None and trial["updates"] == updates:
            trial = {name: value for name, value in trial.items() if name not in ("model", "optimizer", "ema", "loss")}
        return {
            "count": self.count,
            "in_a_row": self._in_a_row,
            "trial": trial,
            "level": self._level,
            "lowered_to": self._lowered_to,
            "ceiling": self._ceiling,
            "since": self._since,
            "warm_from": self._warm_from,
            "divergence": self._divergence.state_dict(),
        }

    def load_state_dict(
        self, state: dict[str, Any], kept: dict[str, Any] | None = None, trial: dict[str, Any] | None = None
    ) -> None:
        """Take over counts and level.

        Args:
            state: what `state_dict` returned.
            kept: the copy to return to; None: there was none.
            trial: the copy on trial, whole; None: there was none.
        """
        state = {**Rollback(self.policy).state_dict(), **state}  # from an older version, some of it is missing
        self.count, self._in_a_row = int(state["count"]), int(state["in_a_row"])
        self._level, self._lowered_to = float(state["level"]), float(state["lowered_to"])
        self._ceiling = float(state["ceiling"])
        self._since, self._warm_from = int(state["since"]), state["warm_from"]
        self._divergence.load_state_dict(state["divergence"])
        since = {"updates": state.get("kept_updates", 0), "divergence": self._detector().state_dict(), "spikes": None}
        since |= {"clipping": {}, "schedule": {}}
        self._kept = copied({**since, **kept}) if kept is not None else None
        self._trial = copied({**since, **trial}) if trial is not None else None


def learned_state(run: Run) -> dict[str, Any]:
    """Return what updates change: model, optimizer, average of the weights, loss scaler, and the loss's own state."""
    loss = {"loss": run.objective.state_dict()} if run.objective is not None else {}
    return {
        **loss,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "ema": run.ema.state_dict() if run.ema is not None else {},
        "precision": run.precision.state_dict(),
    }


def copied(tree: Any, memory: Any = None) -> Any:
    """Copy a state to host memory, so that nothing in it is shared.

    Args:
        tree: the state.
        memory: a copy made before and not needed any more; where its tensors fit, they are written over.

    Example:
        >>> weight = torch.ones(2)
        >>> first = copied({"weight": weight, "step": 3})
        >>> second = copied({"weight": weight + 1, "step": 4}, first)
        >>> second, second["weight"] is first["weight"], second["weight"] is weight
        ({'weight': tensor([2., 2.]), 'step': 4}, True, False)
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    result = _copied(tree, memory, pairs)
    if pairs:
        torch._foreach_copy_([to for to, _ in pairs], [source for _, source in pairs])
    return result


def _copied(tree: Any, memory: Any, pairs: list[tuple[Tensor, Tensor]]) -> Any:
    """Return the copy, in which the tensors of `pairs` are still to be filled: (to, from)."""
    if isinstance(tree, Tensor):
        source = tree.detach()
        fits = isinstance(memory, Tensor) and memory.shape == source.shape and memory.dtype == source.dtype
        if not fits or source.is_sparse or is_distributed(source):
            return source.to("cpu", copy=True)
        pairs.append((memory, source))
        return memory
    if isinstance(tree, dict):
        known = memory if isinstance(memory, dict) else {}
        return {name: _copied(value, known.get(name), pairs) for name, value in tree.items()}
    if isinstance(tree, list):
        places = memory if isinstance(memory, list) and len(memory) == len(tree) else [None] * len(tree)
        return [_copied(value, place, pairs) for value, place in zip(tree, places, strict=True)]
    return copy.deepcopy(tree)
