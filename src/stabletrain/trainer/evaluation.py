"""Validation and test: measured without changing anything, and looked at as critically as a training step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from stabletrain.data import Microbatch
from stabletrain.errors import ConfigurationError, UnstableTraining
from stabletrain.finite import first_nonfinite
from stabletrain.precision import Precision
from stabletrain.randomness import key, keyed
from stabletrain.trainer.run import Run


@torch.no_grad()
def evaluate(run: Run, batches: Iterable[Microbatch]) -> dict[str, float]:
    """Measure the model, or the average of its weights if there is one, without changing anything.

    Args:
        run: its model is left in the mode it was in.
        batches: of validation or test data.

    Returns:
        What the task measures, usually `loss` and more.
    """
    was_training = run.model.training
    averaged = run.ema.applied(run.model) if run.ema is not None else nullcontext()
    run.model.eval()
    try:
        with averaged, run.precision.autocast(), keyed(key(run.seed, "evaluate"), run.device):
            return run.task.evaluate(run.model, batches)
    finally:
        run.model.train(was_training)


def validate(run: Run) -> dict[str, float]:
    """Measure the validation data; when that isn't finite although training is, say so and follow the policy.

    Raises:
        UnstableTraining: under `on_bad_validation=stop`, or when a rollback isn't possible.
    """
    if run.validation is None:
        return {}
    metrics = run.fault.validation(run.progress.steps, evaluate(run, run.validation))
    bad = [f"{name} {value}" for name, value in metrics.items() if not math.isfinite(value)]
    if not bad:
        return metrics
    where = f"epoch {run.progress.epoch}: validation is not finite ({', '.join(bad)})"
    run.tracker.warning(f"{where}; {_state_of(run.model)}; {_look_closer(run)}")
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


def _look_closer(run: Run) -> str:
    """Measure again in float32, and name the samples that are not finite by themselves."""
    assert run.validation is not None
    reduced, run.precision = run.precision, Precision("float32", device=run.device)
    try:
        again = evaluate(run, run.validation)
        if all(math.isfinite(value) for value in again.values()):
            return "in float32 it is finite"
        suspects = [batch for batch in run.validation if not _is_finite(evaluate(run, [batch]))]
        samples = [
            index
            for batch in suspects
            for index in batch.indices.tolist()
            if not _is_finite(evaluate(run, [run.validation.read([index])]))
        ]
    finally:
        run.precision = reduced
    shown = ", ".join(map(str, samples[:20])) + (f" and {len(samples) - 20} more" if len(samples) > 20 else "")
    return f"in float32 too; validation samples that are not finite on their own: {shown or 'none'}"


def _is_finite(metrics: dict[str, float]) -> bool:
    return all(math.isfinite(value) for value in metrics.values())


def measure_test(run: Run) -> None:
    """Measure the test data with the best checkpoint's weights, or the last ones if none was saved."""
    if run.test is None:
        return
    best = run.checkpoint.best() if run.checkpoint is not None else None
    if best is None or run.checkpoint is None:
        run.metrics["test"] = evaluate(run, run.test)
        return
    last = {"model": run.model.state_dict(), "ema": run.ema.state_dict() if run.ema is not None else {}}
    last = {part: _cloned(state) for part, state in last.items()}
    try:
        saved = run.checkpoint.load(best.path)
    except ConfigurationError as error:
        run.tracker.warning(f"the best checkpoint can't be read, so the test measures the last weights: {error}")
        saved = last
    try:
        _put_weights(run, saved)
        run.metrics["test"] = evaluate(run, run.test)
    finally:
        _put_weights(run, last)


def _cloned(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.clone()
    return {name: _cloned(value) for name, value in state.items()} if isinstance(state, dict) else state


def _put_weights(run: Run, state: dict[str, Any]) -> None:
    run.model.load_state_dict(state["model"])
    if run.ema is not None and state["ema"]:
        run.ema.load_state_dict(state["ema"])
