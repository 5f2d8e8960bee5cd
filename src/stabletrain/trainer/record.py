"""What is written down about steps and runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from stabletrain.errors import UnstableTraining
from stabletrain.finite import first_nonfinite
from stabletrain.guard.measure import state_tensors
from stabletrain.quarantine import FILE_NAME
from stabletrain.trainer.run import Run, Status, Step, Summary
from stabletrain.trainer.salvage import bad_inputs

LISTED = 10  # samples found bad that the last lines of a run list


def record(run: Run, step: Step) -> None:
    """Write a decided step to the log."""
    verdict = step.verdict
    assert verdict is not None
    row: dict[str, Any] = {
        "epoch": step.epoch,
        "step": step.index,
        "steps": run.progress.steps,
        "updates": run.progress.updates,
        "loss": verdict.loss,
        "grad_norm": verdict.grad_norm,
        "lr": step.rate,
        "applied": verdict.applied,
        "reason": verdict.reason if step.rejected_for is None else f"{step.rejected_for.reason} (salvaged)",
    }
    row |= {"rejected": run.guard.ledger.rejected, "salvaged": run.guard.ledger.salvaged}
    if run.precision.scales_loss:
        # Asking for it waits for the device, so only where it is written down.
        shown = not verdict.applied or run.tracker.wants(run.progress.steps)
        scaler = run.precision.scaler
        row["scale"] = scaler.get_scale() if shown and scaler is not None else None
    if run.ladder is not None:
        row["rung"] = run.ladder.plan.rung
    if not verdict.applied:
        run.totals.rejected += 1
        if verdict.reason != "overflow" or verdict.facts.scale_held:
            run.ramp.disturb()
        run.tracker.rejected(row, _seen(run, step), verdict.detail + _suspects(run, step))
    elif step.rejected_for is not None:
        run.tracker.salvaged(row, step.bad_samples, step.rejected_for.detail)
    run.tracker.step(row)


def located(run: Run, error: UnstableTraining, step: Step) -> UnstableTraining:
    """Write the last, rejected step down, and say where it was."""
    step.verdict = error.verdict
    run.progress.step, run.progress.steps = step.index + 1, step.number + 1
    record(run, step)
    shown = _listed(_seen(run, step))
    suspects = _suspects(run, step).removeprefix("; ")
    said = f"epoch {step.epoch}, step {step.index}: {error} Samples: {shown}{f'; {suspects}' if suspects else ''}."
    return UnstableTraining(said, error.verdict)


def _suspects(run: Run, step: Step) -> str:
    """Name the samples of a rejected step whose own tensors aren't finite; empty if there are none."""
    assert step.verdict is not None
    found = run.ranks.gather(bad_inputs(step.microbatches))[step.verdict.facts.rank]
    return f"; NaN or Inf in the data of {_listed(found)}" if found else ""


def _listed(indices: Sequence[int]) -> str:
    return ", ".join(map(str, indices[:20])) + (f" and {len(indices) - 20} more" if len(indices) > 20 else "")


def say_quarantine(run: Run) -> None:
    """List the samples that this run found bad, each with what is odd about it, at the end of a run."""
    found = [sample for index, sample in sorted(run.quarantine.found.items()) if sample["epoch"] is not None]
    if not found:
        return
    run.tracker.note(f"{len(found)} samples were found bad and are left out (guard.quarantine takes the list):")
    for sample in found[:LISTED]:
        run.tracker.note(f"  sample {sample['index']}, epoch {sample['epoch']}: {sample['odd']}")
    if len(found) > LISTED:
        run.tracker.note(f"  and {len(found) - LISTED} more in {FILE_NAME}")


def _seen(run: Run, step: Step) -> list[int]:
    """Return the samples that the process saw which found a rejected step bad."""
    assert step.verdict is not None
    return run.ranks.gather(step.indices())[step.verdict.facts.rank]


def summarise(run: Run, status: Status, start: float, samples_before: int, message: str = "") -> Summary:
    """Count up what the run has done so far and look at the state it is in."""
    seconds = time.monotonic() - start
    ledger = run.guard.ledger
    parameters = list(run.model.parameters())
    state = [tensor for tensor in state_tensors([run.optimizer]) if all(tensor is not p for p in parameters)]
    return Summary(
        status=status,
        updates=run.progress.updates,
        steps=run.progress.steps,
        rejected=ledger.rejected,
        reasons=dict(ledger.reasons),
        metrics=run.metrics,
        finite={
            "parameters": _finite(parameters),
            "buffers": _finite([buffer for part in run.guard.models for buffer in part.buffers()]),
            "optimizer": _finite(state),
        },
        seconds=round(seconds, 3),
        samples_per_second=round((run.progress.samples - samples_before) / max(seconds, 1e-9), 1),
        preset=run.settings.get("preset"),
        experiment=run.settings.get("experiment"),
        seed=run.seed,
        message=message,
        salvaged=ledger.salvaged,
        rolled_back=run.rollback.count if run.rollback is not None else 0,
        incidents=run.incidents.recorded if run.incidents is not None else 0,
        quarantined=sorted(run.quarantine.found),
        precision_moves=run.ladder.plan.moves if run.ladder is not None else [],
        checkpoints=run.checkpoint.summary() if run.checkpoint is not None else {},
    )


def _finite(tensors: Sequence[Tensor]) -> bool:
    return first_nonfinite((str(index), tensor.detach()) for index, tensor in enumerate(tensors)) is None
