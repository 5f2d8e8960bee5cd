"""Following a precision that changes in the course of the run: it is told what happens, and its moves are said."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from stabletrain.trainer.run import Run, Step


def follow_step(run: Run, step: Step) -> bool:
    """Let the ladder take note of a decided step.

    Returns:
        Whether the format or the loss scale is another one now, so that what was begun since has to begin anew.
    """
    if run.ladder is None:
        return False
    assert step.verdict is not None
    rejected = step.rejected_for if step.rejected_for is not None and run.ladder.plan.rung > 0 else step.verdict
    trouble = None if rejected.applied else f"a step was rejected for its {rejected.reason}"
    move = run.ladder.end_step(trouble, update=run.progress.updates, epoch=step.epoch)
    _say(run, move)
    return move is not None


def follow_epoch(run: Run, metrics: Mapping[str, float]) -> None:
    """Let the ladder take note of the end of an epoch.

    Args:
        run: whose epoch has ended and was validated, if it has validation data.
        metrics: what was measured.
    """
    if run.ladder is None:
        return
    plan, epoch = run.ladder.plan, run.progress.epoch
    loss = run.ranks.from_first(lambda: metrics.get("loss"))
    if loss is None and metrics:
        loss = math.nan if not all(map(math.isfinite, metrics.values())) else None
    if loss is None and not plan.said:
        plan.said = True
        run.tracker.note(f"epoch {epoch} has no validation loss; it is stable if none of its steps was rejected")
    more = epoch + 1 < run.epochs
    _say(run, run.ladder.end_epoch(loss, update=run.progress.updates, epoch=epoch, more=more))


def follow_rollback(run: Run) -> None:
    """Let the ladder take note of a rollback, after the state was restored."""
    if run.ladder is not None:
        _say(run, run.ladder.rolled_back(update=run.progress.updates, epoch=run.progress.epoch))


def _say(run: Run, move: dict[str, Any] | None) -> None:
    if move is None:
        return
    assert run.ladder is not None
    plan = run.ladder.plan
    scale = f" at loss scale {move['scale']:g}" if move["scale"] is not None else ""
    line = f"precision: {move['from']} -> {move['to']}{scale} (update {move['update']}, after {move['reason']})"
    if plan.rung > 0:
        run.tracker.note(line)
    else:
        run.tracker.warning(f"{line}; the next try waits for {plan.wait} stable epochs")
