"""The loop: what a training step is made of, in the order in which it happens."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial

from torch import Tensor

from stabletrain.errors import Interrupted, UnstableTraining
from stabletrain.guard import Verdict
from stabletrain.optimizer import set_learning_rate
from stabletrain.schedule import Observing
from stabletrain.state import EpochTotals
from stabletrain.trainer import ladder
from stabletrain.trainer.evaluation import measure_test
from stabletrain.trainer.interruption import Wishes, leave, obey, poll, wanted
from stabletrain.trainer.mend import keep_incident, mend, roll_back, scan
from stabletrain.trainer.record import located, record, say_quarantine, summarise
from stabletrain.trainer.resume import resume, save
from stabletrain.trainer.run import Run, Status, Step, Summary
from stabletrain.trainer.step import begin_step, forward_backward
from stabletrain.trainer.validation import validate

logger = logging.getLogger(__name__)


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
        stack.callback(run.parallel.close)
        stack.callback(run.tracker.close)
        stack.callback(run.fault.close)
        stack.enter_context(run.precision.active())
        stack.enter_context(run.signals)
        stack.push(partial(_stop_writing, run))
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
                train_epoch(run)
                _end_epoch(run, start, samples_before)
            note_best(run)
            measure_test(run)
        except Exception as error:
            said = _let_go(run, error)
            summary = summarise(run, _status_of(said), start, samples_before, str(said))
            say_quarantine(run)
            run.tracker.finish(asdict(summary))
            if said is error:
                raise
            raise said from None
        summary = summarise(run, "completed", start, samples_before)
        say_quarantine(run)
        run.tracker.finish(asdict(summary))
        return summary


def train_epoch(run: Run) -> None:
    """Train the rest of the current epoch, step by step."""
    run.model.train()
    epoch, first = run.progress.epoch, run.progress.step
    waiting: Step | None = None  # its verdict may still be on the device
    steps = run.loader.epoch(epoch, first, run.quarantine.frozen)
    for index, microbatches in enumerate(steps, start=first):  # draw
        number = run.progress.steps + (waiting is not None)
        step = run.step(epoch, index, number, run.fault.before_step(number, microbatches))
        losses = _begin(run, step)
        if waiting is not None and finish_step(run, waiting):
            losses = _begin(run, step)  # the state it began from was mended
        step.rate = set_learning_rate(run.optimizer, _rate_factor(run))
        step.verdict = decide(run, losses, step)  # unscale, measure, judge, clip, commit or undo
        waiting = step
        if not step.verdict.pending or _may_be_due(run) or wanted(run).any:
            finish_step(run, step)
            waiting, wishes = None, wanted(run)
            _save_if_due(run, step, wishes)
            obey(wishes)
    if waiting is not None:
        finish_step(run, waiting)


def _begin(run: Run, step: Step) -> list[Tensor]:
    begin_step(run)
    return forward_backward(run, step)


def _rate_factor(run: Run) -> float:
    lowered = run.rollback.factor(run.progress.updates) if run.rollback is not None else 1.0
    return run.schedule(run.progress.updates) * run.ramp.factor * lowered


def _save_if_due(run: Run, step: Step, wishes: Wishes) -> None:
    if run.checkpoint is None:
        return
    occasions, progress = run.checkpoint.occasions, run.progress
    assert step.verdict is not None
    due = occasions.due(updates=progress.updates, epoch_ended=False, epoch=progress.epoch)
    if (step.verdict.applied and due) or wishes.save:
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
        progress.samples += _samples(run, step)
        run.totals.add(loss=verdict.loss, grad_norm=verdict.grad_norm)
        run.totals.salvaged += step.rejected_for is not None
        if run.ema is not None:
            run.ema.update(run.model)
        run.fault.after_update(step.number, run.model, run.optimizer)
    record(run, step)
    if ladder.follow_step(run, step):
        mended = True
        if run.guard.begun:
            run.guard.discard()  # computed in the format before
    if verdict.applied and run.rollback is not None:
        diverged = run.rollback.observe(run, verdict.loss)
        if diverged is not None:
            begun = run.guard.begun
            if begun:
                run.guard.discard()
            roll_back(run, UnstableTraining(f"{diverged}.", verdict), step, blame_rate=True)
            return True
    return mended


def _samples(run: Run, step: Step) -> int:
    """Return how many samples all ranks together have applied."""
    own = sum(map(len, run.last_good))
    if step.rejected_for is None:
        return own * run.ranks.size
    return int(run.ranks.sums(own)[0])


def _end_epoch(run: Run, start: float, samples_before: int) -> None:
    """Validate, write the epoch down, and save."""
    epoch = run.progress.epoch
    metrics = validate(run)
    measured = {name: value for name, value in metrics.items() if value is not None}
    if isinstance(run.schedule, Observing) and (line := run.schedule.observe(metrics)) is not None:
        run.tracker.note(line)
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
    ladder.follow_epoch(run, measured)
    _climb(run)
    run.progress.epoch, run.progress.step, run.totals = epoch + 1, 0, EpochTotals()
    run.metrics["final"] = measured
    if run.checkpoint is not None:
        occasions = run.checkpoint.occasions
        last = run.progress.epoch == run.epochs and occasions.any
        if last or occasions.due(updates=run.progress.updates, epoch_ended=True, epoch=epoch):
            note_best(run)
            save(run, measured)
    run.tracker.summary(asdict(summarise(run, "running", start, samples_before)))
    poll(run)


def _climb(run: Run) -> None:
    """Enter the next stage of the ramp, if it is its turn."""
    reached = run.ramp.reached
    line = run.ramp.enter(run.progress.epoch + 1)
    if line is not None:
        say = run.tracker.note if run.ramp.reached > reached else run.tracker.warning
        say(line)
    if run.ramp.batch_size is not None:
        run.loader.resize(run.ramp.batch_size)


def note_best(run: Run) -> None:
    """Wait for the checkpoint that is being written, and note what the best one so far was measured at."""
    store = run.checkpoint
    best = run.ranks.from_first(store.best) if store is not None else None
    if best is not None:
        run.metrics["best"] = {name: value for name, value in best.metrics.items() if value is not None}


def _may_be_due(run: Run) -> bool:
    """Whether the step just decided, if it was applied, calls for a checkpoint."""
    if run.checkpoint is None:
        return False
    return run.checkpoint.occasions.due(updates=run.progress.updates + 1, epoch_ended=False, epoch=0)


def _let_go(run: Run, error: Exception) -> Exception:
    """Save if the run was asked to end, wait for the checkpoint that is being written, and return what to tell."""
    try:
        said = leave(run, error) if isinstance(error, Interrupted) else error
        note_best(run)
        return said
    except Exception as another:
        if isinstance(error, Interrupted):
            return another
        logger.exception("the last checkpoint was not written")
        return error


def _stop_writing(run: Run, kind: type[BaseException] | None, *details: object) -> None:
    """Let the checkpoint that is being written come to its end, unless somebody wants to be gone at once."""
    if run.checkpoint is not None and kind is not None and not issubclass(kind, Exception):
        run.checkpoint.give_up()


def _status_of(error: BaseException) -> Status:
    if isinstance(error, UnstableTraining):
        return "stopped_unstable"
    return "interrupted" if isinstance(error, Interrupted) else "failed"
