"""The loop: what a training step is made of, in the order in which it happens."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict

from torch import Tensor

from stabletrain.errors import Interrupted, UnstableTraining
from stabletrain.guard import Verdict
from stabletrain.optimizer import set_learning_rate
from stabletrain.signals import Signals
from stabletrain.state import EpochTotals
from stabletrain.trainer.evaluation import measure_test
from stabletrain.trainer.mend import keep_incident, mend, roll_back, scan
from stabletrain.trainer.record import located, record, say_quarantine, summarise
from stabletrain.trainer.resume import resume, save
from stabletrain.trainer.run import Run, Status, Step, Summary
from stabletrain.trainer.step import forward_backward
from stabletrain.trainer.validation import validate


def train(run: Run) -> Summary:
    """Train until the planned epochs are done, continuing from a checkpoint if there is one.

    Args:
        run: the finished parts; its model, optimizer and progress are changed in place.

    Returns:
        How it ended, also written to the run's folder.

    Raises:
        UnstableTraining: when the guard's policy says so; the summary says `stopped_unstable` then.
        Interrupted: after a signal, with a checkpoint saved.
        ConfigurationError: when the checkpoint doesn't fit the run.
    """
    start = time.monotonic()
    with ExitStack() as stack:
        if run.folder is not None:
            stack.enter_context(run.folder)
        stack.callback(run.tracker.close)
        stack.callback(run.fault.close)
        stack.enter_context(run.precision.active())
        signals = stack.enter_context(Signals())
        resume(run)
        environment = {"device": str(run.device), "seed": run.seed}
        run.tracker.begin(run.settings, environment, run.total_steps, run.progress, overrides=run.overrides)
        for note in run.notes:
            run.tracker.warning(note)
        samples_before = run.progress.samples
        try:
            if run.guard.policy.scan and run.progress.steps == 0:
                scan(run)
            if run.rollback is not None:
                run.rollback.begin(run)
            while run.progress.epoch < run.epochs:
                if run.progress.step == 0:
                    run.quarantine.begin_epoch()
                train_epoch(run, signals)
                _end_epoch(run, start, samples_before)
            measure_test(run)
        except Exception as error:
            summary = summarise(run, _status_of(error), start, samples_before, str(error))
            say_quarantine(run)
            run.tracker.finish(asdict(summary))
            raise
        summary = summarise(run, "completed", start, samples_before)
        say_quarantine(run)
        run.tracker.finish(asdict(summary))
        return summary


def train_epoch(run: Run, signals: Signals) -> None:
    """Train the rest of the current epoch, step by step."""
    run.model.train()
    epoch, first = run.progress.epoch, run.progress.step
    waiting: Step | None = None  # its verdict may still be on the device
    steps = run.loader.epoch(epoch, first, run.quarantine.frozen)
    for index, microbatches in enumerate(steps, start=first):  # draw
        number = run.progress.steps + (waiting is not None)
        step = Step(epoch=epoch, index=index, number=number, microbatches=run.fault.before_step(number, microbatches))
        losses = _begin(run, step)
        if waiting is not None and finish_step(run, waiting):
            losses = _begin(run, step)  # the state it began from was mended
        step.rate = set_learning_rate(run.optimizer, _rate_factor(run))
        step.verdict = decide(run, losses, step)  # unscale, measure, judge, clip, commit or undo
        waiting = step
        if not step.verdict.pending or signals.received or _may_be_due(run):
            finish_step(run, step)
            waiting = None
            _save_if_due(run, signals)
    if waiting is not None:
        finish_step(run, waiting)


def _begin(run: Run, step: Step) -> list[Tensor]:
    run.guard.begin()
    return forward_backward(run, step)


def _rate_factor(run: Run) -> float:
    lowered = run.rollback.factor(run.progress.updates) if run.rollback is not None else 1.0
    return run.schedule(run.progress.updates) * run.ramp.factor * lowered


def _save_if_due(run: Run, signals: Signals) -> None:
    if signals.received:
        _interrupt(run, signals)
    store = run.checkpoint
    if store is not None and store.due(updates=run.progress.updates, epoch_ended=False, epoch=run.progress.epoch):
        save(run)


def decide(run: Run, losses: list[Tensor], step: Step) -> Verdict:
    """Let the guard decide about the step; if that ends the training, say where it was."""
    try:
        return run.guard.step(losses)
    except UnstableTraining as error:
        step.verdict = error.verdict
        keep_incident(run, step)
        raise located(run, error, step) from None


def finish_step(run: Run, step: Step) -> bool:
    """Deal with a step whose verdict is known by now: mend it if it was rejected, count it, write it down.

    Returns:
        Whether the state is another one than that from which a following step may have begun.
    """
    assert step.verdict is not None
    try:
        run.guard.settle()
    except UnstableTraining as error:
        step.verdict = error.verdict
        keep_incident(run, step)
        raise located(run, error, step) from None
    progress = run.progress
    progress.step, progress.steps = step.index + 1, progress.steps + 1
    mended = not step.verdict.applied and mend(run, step)
    verdict = step.verdict
    if verdict.applied:
        progress.updates += 1
        run.last_good = [microbatch.indices for microbatch in step.microbatches]
        progress.samples += sum(map(len, run.last_good))
        run.totals.add(loss=verdict.loss, grad_norm=verdict.grad_norm)
        run.totals.salvaged += step.rejected_for is not None
        if run.ema is not None:
            run.ema.update(run.model)
        run.fault.after_update(step.number, run.model, run.optimizer)
    record(run, step)
    if verdict.applied and run.rollback is not None:
        diverged = run.rollback.observe(run, verdict.loss)
        if diverged is not None:
            begun = run.guard.begun
            if begun:
                run.guard.discard()
            roll_back(run, UnstableTraining(f"{diverged}.", verdict), step, blame_rate=True)
            return True
    return mended


def _end_epoch(run: Run, start: float, samples_before: int) -> None:
    """Validate, write the epoch down, and save."""
    epoch = run.progress.epoch
    metrics = validate(run)
    measured = {name: value for name, value in metrics.items() if value is not None}
    loss, grad_norm = run.totals.means()
    run.tracker.epoch(
        {
            "epoch": epoch,
            "train_loss": loss,
            **{f"val_{name}": value for name, value in metrics.items()},
            "lr": float(run.optimizer.param_groups[0]["lr"]),
            "grad_norm": grad_norm,
            "applied": run.totals.applied,
            "rejected": run.totals.rejected,
            "salvaged": run.totals.salvaged,
            **({"batch_size": run.loader.batch_size} if run.ramp.stages else {}),
        }
    )
    _climb(run)
    run.progress.epoch, run.progress.step, run.totals = epoch + 1, 0, EpochTotals()
    run.metrics["final"] = measured
    store = run.checkpoint
    if store is not None and (store.due(updates=run.progress.updates, epoch_ended=True, epoch=epoch) or _last(run)):
        save(run, measured)
    if store is not None and (best := store.best()) is not None:
        run.metrics["best"] = {name: value for name, value in best.metrics.items() if value is not None}
    run.tracker.summary(asdict(summarise(run, "running", start, samples_before)))


def _climb(run: Run) -> None:
    """Enter the next stage of the ramp, if it is its turn."""
    reached = run.ramp.reached
    line = run.ramp.enter(run.progress.epoch + 1)
    if line is not None:
        say = run.tracker.note if run.ramp.reached > reached else run.tracker.warning
        say(line)
    if run.ramp.batch_size is not None:
        run.loader.resize(run.ramp.batch_size)


def _last(run: Run) -> bool:
    return run.progress.epoch == run.epochs and run.checkpoint is not None and run.checkpoint.enabled


def _may_be_due(run: Run) -> bool:
    """Whether the step just decided, if it was applied, calls for a checkpoint."""
    store = run.checkpoint
    return store is not None and store.due(updates=run.progress.updates + 1, epoch_ended=False, epoch=0)


def _interrupt(run: Run, signals: Signals) -> None:
    """Save and leave; the same command continues."""
    if run.checkpoint is None or not run.checkpoint.enabled:
        raise Interrupted(f"{signals.name} at epoch {run.progress.epoch}; nothing was saved, checkpoints are off")
    save(run)
    raise Interrupted(
        f"{signals.name} at epoch {run.progress.epoch}, step {run.progress.step}; a checkpoint was saved, and the "
        "same command continues"
    )


def _status_of(error: BaseException) -> Status:
    if isinstance(error, UnstableTraining):
        return "stopped_unstable"
    return "interrupted" if isinstance(error, Interrupted) else "failed"
