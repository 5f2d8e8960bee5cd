"""One step's forward and backward passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stabletrain.collectives import Ranks
from stabletrain.finite import scale_all
from stabletrain.guard.measure import gradients
from stabletrain.parallel import gradients_wait
from stabletrain.randomness import key, keyed
from stabletrain.trainer.run import Run, Step


def forward_backward(run: Run, step: Step, *, alone: bool = False) -> list[Tensor]:
    """Run the step's microbatches forward and backward, and return their mean losses.

    The gradient becomes that of sum(loss_sum) / sum(weight) over the microbatches of all ranks: each is divided by the
    weight that is expected, and once the true sum is known the gradients are corrected if it differs.

    Args:
        run: its model's gradients are added to.
        step: where it stands decides what is drawn at random.
        alone: run the model by itself, with no other rank taking part.

    Returns:
        One loss for each microbatch, shape [], without history.
    """
    ranks = Ranks() if alone else run.ranks
    network = run.model if alone else run.network
    left = [pair for pair in enumerate(step.microbatches) if len(pair[1].indices) > 0]
    losses: list[Tensor] = []
    # Ranks can't know each other's weights before, so they expect 1 for each sample; gradients are averaged over ranks.
    expected: float | Tensor = run.loader.batch_size / ranks.size if ranks.together else 0.0
    total: float | Tensor = 0.0
    with run.precision.lowered(run.model):
        for number, microbatch in left:
            place = number * step.ranks + step.rank  # among the microbatches of all ranks
            with (
                keyed(key(run.seed, "step", step.epoch, step.index, place), run.device),
                gradients_wait(network, last=number == left[-1][0]),
            ):
                data = run.augmentation(microbatch.data)
                with run.precision.autocast():
                    output = run.task.step(network, data)
                loss_sum = run.fault.loss(step.number, output.loss_sum)
                weight = _at_least_something(output.weight)
                if not losses and not ranks.together:
                    expected = weight * len(step.microbatches)
                run.precision.scale(loss_sum / expected).backward()  # type: ignore[no-untyped-call]
            losses.append((loss_sum / weight).detach())
            total = total + output.weight
    _correct(run, expected, total, ranks, only=len(step.microbatches) == 1)
    run.fault.after_backward(step.number, run.model)
    return losses


def begin_step(run: Run) -> None:
    """Let all ranks begin a step with the same buffers, and the guard keep what it may change."""
    run.parallel.begin_step(run.model)
    if run.objective is not None:
        run.ranks.same_buffers(run.objective)
    run.guard.begin()


def _correct(run: Run, expected: float | Tensor, total: float | Tensor, ranks: Ranks, *, only: bool) -> None:
    """Scale the gradients by what was expected over what came, where that may differ."""
    if ranks.together:
        on_device = torch.as_tensor(total, dtype=torch.float64, device=run.device)
        total, expected = ranks.total(on_device), expected * ranks.size
        total = total.item() if run.device.type == "cpu" else total.float()
    elif only:
        return  # what was expected is its own weight
    known_equal = not isinstance(total, Tensor) and not isinstance(expected, Tensor) and total == expected
    if not known_equal:
        scale_all(gradients([run.optimizer]), expected / _at_least_something(total))


def _at_least_something(weight: float | Tensor) -> Any:
    """Return the weight, or 1 where it is 0: an empty sum has loss 0 and gradient 0."""
    if isinstance(weight, Tensor):
        return torch.where(weight > 0, weight, 1.0)
    return weight if weight > 0 else 1.0
