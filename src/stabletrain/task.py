"""Tasks: how a model and a microbatch become a loss, and how a model is judged."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from stabletrain.errors import ConfigurationError


@dataclass(slots=True)
class Output:
    """What a task makes of one microbatch.

    Attributes:
        loss_sum: sum of the weighted losses, with its graph; a scalar.
        weight: what to divide by; the trainer sums both over a step's microbatches first.
        metrics: further scalars of this microbatch, for the log.
        per_sample_loss: loss of each sample [B], without a graph; None = not known.
    """

    loss_sum: torch.Tensor
    weight: float | torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)
    per_sample_loss: torch.Tensor | None = None


class Batch(Protocol):
    """What a loader yields, as far as a task looks at it."""

    @property
    def data(self) -> Any:
        """The batch itself: a tree of tensors and lists."""
        ...


class Task(Protocol):
    """What the trainer needs to know about a problem."""

    def step(self, model: nn.Module, data: Any) -> Output:
        """Return the loss of one microbatch's data."""
        ...

    def evaluate(self, model: nn.Module, loader: Iterable[Batch]) -> dict[str, float]:
        """Return numbers about the model, among them `loss`.

        With a further argument `total`, which adds a tensor up over all processes, each of them sees its share of the
        batches; without it each sees all.
        """
        ...


class Classification:
    """One class out of several for each sample.

    The data is the pair (inputs, targets); the model turns the inputs, any tree of tensors and lists, into logits [B,
    C].

    Args:
        loss: what `stabletrain.loss` offers: called with logits and targets (int64 [B] or probabilities [B, C]) it
        returns
            the loss of each sample and their weights, or None.

    Example:
        >>> from stabletrain.loss import CrossEntropy
        >>> output = Classification(CrossEntropy()).step(nn.Identity(), (torch.zeros(3, 2), torch.tensor([0, 1, 1])))
        >>> output.loss_sum, output.weight
        (tensor(2.0794), 3.0)
    """

    def __init__(self, loss: nn.Module) -> None:
        self.loss = loss
        self._checked_devices: set[torch.device] = set()

    def step(self, model: nn.Module, data: Any) -> Output:
        """Return the loss of one microbatch.

        Args:
            model: from the inputs to logits [B, C].
            data: the pair (inputs, targets).

        Raises:
            ConfigurationError: for outputs and labels that don't fit each other.
        """
        inputs, targets = data
        per_sample, weights = self._losses(model(inputs), targets)
        known = per_sample.detach()
        if weights is None:
            return Output(per_sample.sum(), float(len(targets)), per_sample_loss=known)
        return Output((per_sample * weights).sum(), weights.sum(), per_sample_loss=known)

    def evaluate(
        self,
        model: nn.Module,
        loader: Iterable[Batch],
        total: Callable[[torch.Tensor], torch.Tensor] = lambda own: own,
    ) -> dict[str, float]:
        """Return the mean loss and the share of right answers over all samples, with the model in evaluation mode.

        Waits for the device once, at the end. The model's modules are put back into the modes that they had.

        Args:
            model: from the inputs to logits [B, C].
            loader: microbatches whose data is the pair (inputs, targets).
            total: adds a tensor up over all processes, each of which sees a share of the microbatches.

        Returns:
            `loss` (weighted as in training; 0 where all weights are 0) and `accuracy`.

        Raises:
            ConfigurationError: for a loader without samples, and for outputs and labels that don't fit each other.
        """
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        sums: list[torch.Tensor] = []
        try:
            with torch.no_grad():
                for batch in loader:
                    inputs, targets = batch.data
                    logits = model(inputs)
                    per_sample, weights = self._losses(logits, targets)
                    if weights is None:
                        weights = torch.ones_like(per_sample)
                    classes = targets.argmax(1) if targets.is_floating_point() else targets
                    right = (logits.argmax(1) == classes).sum().to(per_sample.dtype)
                    count = torch.full_like(right, len(targets))
                    sums.append(torch.stack([(per_sample * weights).sum(), weights.sum(), right, count]))
        finally:
            for module, mode in modes:
                module.training = mode
        own = torch.stack(sums).double().sum(0) if sums else _nothing(model)
        loss, weight, right_answers, samples = total(own).tolist()
        if samples == 0:
            raise ConfigurationError(
                "there is nothing to evaluate: the loader gave no samples. Give it a part with samples."
            )
        # With all weights 0 there is no mean; the product keeps a NaN a NaN.
        return {"loss": loss / weight if weight != 0 else 0.0 * loss, "accuracy": right_answers / samples}

    def _losses(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if logits.dim() != 2 or len(logits) != len(targets):
            raise ConfigurationError(
                f"the model returned {list(logits.shape)} for {len(targets)} samples; logits of the shape [samples, "
                f"classes] = [{len(targets)}, C] are needed."
            )
        if logits.device.type != "cpu" and logits.device not in self._checked_devices:
            # There a bad label would end the process; looking costs a wait, so only the first microbatch is looked at.
            _check_labels(targets, logits.shape[1])
            self._checked_devices.add(logits.device)
        try:
            per_sample, weights = self.loss(logits, targets)
        except (IndexError, RuntimeError):
            _check_labels(targets, logits.shape[1])
            raise
        return per_sample, weights


def _nothing(model: nn.Module) -> torch.Tensor:
    """Return the sums of a process that had no batch, on the device on which the others have theirs."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return torch.zeros(4, dtype=torch.float64, device=device)


def _check_labels(targets: torch.Tensor, classes: int) -> None:
    """Raise ConfigurationError where a target is no class number below `classes`, or has another number of classes."""
    if targets.is_floating_point():
        if targets.dim() != 2 or targets.shape[1] != classes:
            raise ConfigurationError(
                f"the targets are probabilities of the shape {list(targets.shape)}, but the model has {classes} "
                "outputs: the number of classes must be the same (num_classes)."
            )
        return
    if targets.dtype != torch.int64 or targets.dim() != 1:
        raise ConfigurationError(
            f"the targets are {targets.dtype} of the shape {list(targets.shape)}; class numbers, int64 [B], are needed."
        )
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= classes:
        raise ConfigurationError(
            f"a target has the label {low if low < 0 else high}, but the model has {classes} outputs: labels go from "
            f"0 to {classes - 1}. Correct the label, or give the model more outputs (model.num_classes)."
        )
