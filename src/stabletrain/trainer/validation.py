"""Validation, looked at as critically as a training step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice

from torch import nn

from stabletrain.errors import UnstableTraining
from stabletrain.finite import first_nonfinite
from stabletrain.precision import Precision
from stabletrain.quarantine import what_is_odd
from stabletrain.trainer.evaluation import evaluate, evaluate_all
from stabletrain.trainer.replay import incident_of_validation
from stabletrain.trainer.run import Run


def validate(run: Run) -> Mapping[str, float | None]:
    """Measure the validation data; when that isn't finite although training is, say so and follow the policy.

    Returns:
        What was measured; nothing where it is too early for a validation, or None for each metric in the first epoch.

    Raises:
        UnstableTraining: under `on_bad_validation=stop`, or when a rollback isn't possible.
    """
    if run.validation is None:
        return {}
    if run.progress.updates < run.validate_from:
        # The table of epochs begins with their names, which one batch tells.
        return dict.fromkeys(evaluate(run, islice(run.validation, 1))) if run.progress.epoch == 0 else {}
    metrics = run.fault.validation(run.progress.steps, evaluate_all(run, run.validation))
    bad = [f"{name} {value}" for name, value in metrics.items() if not math.isfinite(value)]
    if not bad:
        return metrics
    where = f"epoch {run.progress.epoch}: validation is not finite ({', '.join(bad)})"
    run.tracker.warning(f"{where}; {_state_of(run.model)}; {_look_closer(run, metrics)}")
    reaction = run.guard.policy.on_bad_validation
    if reaction == "rollback" and run.rollback is not None:
        run.rollback.go_back(run, UnstableTraining(f"{where}."))
    elif reaction != "warn":
        raise UnstableTraining(f"{where}. guard.on_bad_validation={reaction} stops the run.")
    return metrics


def _state_of(model: nn.Module) -> str:
    """Describe parameters and buffers, where a fault that training doesn't show may hide."""
    found = first_nonfinite([*model.named_parameters(), *model.named_buffers()])
    state = f"not finite: {found}" if found is not None else "all parameters and buffers are finite"
    variances = [(float(buffer.max()), name) for name, buffer in model.named_buffers() if name.endswith("running_var")]
    return state + ("; the largest running variance is {:.3g} in {}".format(*max(variances)) if variances else "")


def _look_closer(run: Run, metrics: dict[str, float]) -> str:
    """Name the samples that are not finite by themselves, measure again in float32, and keep what was found."""
    assert run.validation is not None
    suspects = [batch for batch in run.validation if not _is_finite(evaluate(run, [batch]))]
    samples = [
        index
        for batch in suspects
        for index in batch.indices.tolist()
        if not _is_finite(evaluate(run, [run.validation.read([index])]))
    ]
    if run.incidents is not None and run.ranks.first:
        odd = [{"index": i, "odd": what_is_odd(run.validation.read([i]).data)} for i in samples]
        # Where it is finite this time, one batch is enough for the doctor to say so.
        seen = suspects or [next(iter(run.validation))]
        run.incidents.record(incident_of_validation(run, metrics, seen, odd))
    if not suspects:
        return "measured again, it is finite"
    reduced, run.precision = run.precision, Precision("float32", device=run.device)
    try:
        if all(_is_finite(evaluate(run, [batch])) for batch in suspects):
            return "in float32 it is finite"
    finally:
        run.precision = reduced
    shown = ", ".join(map(str, samples[:20])) + (f" and {len(samples) - 20} more" if len(samples) > 20 else "")
    return f"in float32 too; validation samples that are not finite on their own: {shown or 'none'}"


def _is_finite(metrics: dict[str, float]) -> bool:
    return all(math.isfinite(value) for value in metrics.values())
