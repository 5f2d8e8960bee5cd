"""One step's forward and backward passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stabletrain.finite import scale_all
from stabletrain.guard.measure import gradients
from stabletrain.randomness import key, keyed
from stabletrain.trainer.run import Run, Step


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
        if len(microbatch.indices) == 0:
            continue  # nothing of it is left
        with keyed(key(run.seed, "step", step.epoch, step.index, number), run.device):
            data = run.augmentation(microbatch.data)
            with run.precision.autocast():
                output = run.task.step(run.model, data)
            loss_sum = run.fault.loss(step.number, output.loss_sum)
            weight = _at_least_something(output.weight)
            if not losses:
                expected = weight * len(step.microbatches)
            run.precision.scale(loss_sum / expected).backward()  # type: ignore[no-untyped-call]
        losses.append((loss_sum / weight).detach())
        total = total + output.weight
    known_equal = not isinstance(total, Tensor) and not isinstance(expected, Tensor) and total == expected
    if len(step.microbatches) > 1 and not known_equal:
        scale_all(gradients([run.optimizer]), expected / _at_least_something(total))
    run.fault.after_backward(step.number, run.model)
    return losses


def _at_least_something(weight: float | Tensor) -> Any:
    """Return the weight, or 1 where it is 0: an empty sum has loss 0 and gradient 0."""
    if isinstance(weight, Tensor):
        return torch.where(weight > 0, weight, 1.0)
    return weight if weight > 0 else 1.0
