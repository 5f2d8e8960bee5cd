"""The loop: what a training step is made of, in the order in which it happens."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from stabletrain.errors import Interrupted, UnstableTraining
from stabletrain.finite import scale_all
from stabletrain.guard import Verdict
from stabletrain.guard.measure import gradients
from stabletrain.optimizer import set_learning_rate
from stabletrain.randomness import key, keyed
from stabletrain.signals import Signals
from stabletrain.state import EpochTotals
from stabletrain.trainer.evaluation import evaluate, look_at_validation, measure_test
from stabletrain.trainer.record import located, record, summarise
from stabletrain.trainer.resume import resume, save
from stabletrain.trainer.run import Run, Status, Step, Summary


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
        stack.enter_context(run.precision.active())
        signals = stack.enter_context(Signals())
        resume(run)
        environment = {"device": str(run.device), "seed": run.seed}
        run.tracker.begin(
            run.settings, environment, run.epochs * run.loader.steps_per_epoch, run.progress, overrides=run.overrides
        )
        for note in run.notes:
            run.tracker.warning(note)
        samples_before = run.progress.samples
        try:
            while run.progress.epoch < run.epochs:
                train_epoch(run, signals)
                _end_epoch(run, start, samples_before)
            measure_test(run)
        except Exception as error:
            summary = summarise(run, _status_of(error), start, samples_before, str(error))
            run.tracker.finish(asdict(summary))
            raise
        summary = summarise(run, "completed", start, samples_before)
        run.tracker.finish(asdict(summary))
        return summary


def train_epoch(run: Run, signals: Signals) -> None:
    """Train the rest of the current epoch, step by step."""
    run.model.train()
    epoch, first = run.progress.epoch, run.progress.step
    waiting: Step | None = None  # its verdict may still be on the device
    for index, microbatches in enumerate(run.loader.epoch(epoch, first), start=first):  # draw
        step = Step(epoch=epoch, index=index, rate=0.0, microbatches=microbatches)
        run.guard.begin()
        losses = forward_backward(run, step)
        if waiting is not None:
            finish_step(run, waiting)
        step.rate = set_learning_rate(run.optimizer, run.schedule(run.progress.updates))
        step.verdict = decide(run, losses, step)  # unscale, measure, judge, clip, commit or undo
        waiting = step
        if not step.verdict.pending or signals.received or _may_be_due(run):
            finish_step(run, step)
            waiting = None
            if signals.received:
                _interrupt(run, signals)
            if run.checkpoint is not None and run.checkpoint.due(
                updates=run.progress.updates, epoch_ended=False, epoch=epoch
            ):
                save(run)
    if waiting is not None:
        finish_step(run, waiting)


def forward_backward(run: Run, step: Step) -> list[Tensor]:
    """Run the step's microbatches forward and backward, and return their mean losses.

    The gradient becomes that of sum(loss_sum) / sum(weight) over the microbatches: each is divided by the weight
    that the first one lets expect, and once the true sum is known the gradients are corrected if it differs.

    Args:
        run: its model's gradients are added to.
        step: where it stands decides what is drawn at random.

    Returns:
        One loss for each microbatch, shape [], without history.
    """
    losses: list[Tensor] = []
    expected: float | Tensor = 0.0
    total: float | Tensor = 0.0
    for number, microbatch in enumerate(step.microbatches):
        with keyed(key(run.seed, "step", step.epoch, step.index, number), run.device):
            data = run.augmentation(microbatch.data)
            with run.precision.autocast():
                output = run.task.step(run.model, data)
            weight = _at_least_something(output.weight)
            if number == 0:
                expected = weight * len(step.microbatches)
            run.precision.scale(output.loss_sum / expected).backward()  # type: ignore[no-untyped-call]
        losses.append((output.loss_sum / weight).detach())
        total = total + output.weight
    known_equal = not isinstance(total, Tensor) and not isinstance(expected, Tensor) and total == expected
    if len(step.microbatches) > 1 and not known_equal:
        scale_all(gradients([run.optimizer]), expected / _at_least_something(total))
    return losses


def decide(run: Run, losses: list[Tensor], step: Step) -> Verdict:
    """Let the guard decide about the step; if that ends the training, say where it was."""
    try:
        return run.guard.step(losses)
    except UnstableTraining as error:
        raise located(run, error, step) from None


def finish_step(run: Run, step: Step) -> None:
    """Write down a step whose verdict is known by now: counts, average of the weights, log."""
    assert step.verdict is not None
    try:
        run.guard.settle()
    except UnstableTraining as error:
        raise located(run, error, step) from None
    verdict, progress = step.verdict, run.progress
    progress.step = step.index + 1
    progress.steps += 1
    if verdict.applied:
        progress.updates += 1
        progress.samples += sum(len(microbatch.indices) for microbatch in step.microbatches)
        run.totals.add(loss=verdict.loss, grad_norm=verdict.grad_norm)
        if run.ema is not None:
            run.ema.update(run.model)
    record(run, step)


def _end_epoch(run: Run, start: float, samples_before: int) -> None:
    """Validate, write the epoch down, and save."""
    epoch = run.progress.epoch
    metrics = evaluate(run, run.validation) if run.validation is not None else {}
    look_at_validation(run, metrics)
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
            "salvaged": 0,
        }
    )
    run.progress.epoch, run.progress.step, run.totals = epoch + 1, 0, EpochTotals()
    run.metrics["final"] = metrics
    store = run.checkpoint
    if store is not None and (store.due(updates=run.progress.updates, epoch_ended=True, epoch=epoch) or _last(run)):
        save(run, metrics)
    if store is not None and (best := store.best()) is not None:
        run.metrics["best"] = {name: value for name, value in best.metrics.items() if value is not None}
    run.tracker.summary(asdict(summarise(run, "running", start, samples_before)))


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


def _at_least_something(weight: float | Tensor) -> Any:
    """Return the weight, or 1 where it is 0: an empty sum has loss 0 and gradient 0."""
    if isinstance(weight, Tensor):
        return torch.where(weight > 0, weight, 1.0)
    return weight if weight > 0 else 1.0
