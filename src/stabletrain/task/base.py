"""What the trainer needs of a task, and what all tasks do that have a loss of the group `loss`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

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
    """What the trainer needs to know about a problem.

    A task whose loss is a module of its own, with parameters or buffers to be trained and saved, keeps it as the
    attribute `loss`; see `memory_of`.
    """

    def step(self, model: nn.Module, data: Any) -> Output:
        """Return the loss of one microbatch's data."""
        ...

    def evaluate(self, model: nn.Module, loader: Iterable[Batch]) -> dict[str, float]:
        """Return numbers about the model, among them `loss`.

        With a further argument `total`, which adds a tensor up over all processes, each of them sees its share of the
        batches; without it each sees all.
        """
        ...


Total = Callable[[torch.Tensor], torch.Tensor]


def alone(own: torch.Tensor) -> torch.Tensor:
    """Return the total of one process: its own."""
    return own


def memory_of(task: Any) -> nn.Module | None:
    """Return a task's loss, if it has parameters or buffers that are part of the training's state.

    Example:
        >>> memory_of(object()) is None
        True
    """
    loss = getattr(task, "loss", None)
    return loss if isinstance(loss, nn.Module) and len(loss.state_dict()) > 0 else None


class LossTask:
    """A task of which the loss is what `stabletrain.loss` offers.

    Args:
        loss: called with the model's outputs and the targets it returns the loss of each sample and their weights, or
            None.

    Raises:
        ConfigurationError: for a loss that says that it goes with other tasks.
    """

    name: ClassVar[str] = "supervised"  # its option in the group `task`
    counts: int = 0  # how many sums it takes besides those of the loss

    def __init__(self, loss: nn.Module) -> None:
        fits: Sequence[str] | None = getattr(loss, "tasks", None)
        if fits is not None and self.name not in fits:
            raise ConfigurationError(
                f"task={self.name} was given the loss {type(loss).__name__}, which doesn't go with it; choose "
                f"{' or '.join(f'task={name}' for name in fits)}, or another loss."
            )
        self.loss = loss
        self._looked: set[torch.device] = set()

    def step(self, model: nn.Module, data: Any) -> Output:
        """Return the loss of one microbatch.

        Args:
            model: from the inputs to what the loss needs.
            data: the pair (inputs, targets), or inputs alone.

        Raises:
            ConfigurationError: for outputs and targets that don't fit each other.
        """
        inputs, targets = parts(data)
        if self.loss.training != model.training:
            self.loss.train(model.training)
        per_sample, weights = self._losses(model(inputs), targets)
        known = per_sample.detach()
        if weights is None:
            return Output(per_sample.sum(), float(len(per_sample)), per_sample_loss=known)
        return Output((per_sample * weights).sum(), weights.sum(), per_sample_loss=known)

    def _first_on(self, device: torch.device) -> bool:
        """Return whether this is an accelerator's first microbatch.

        There a bad label would end the process; looking costs a wait, so only the first microbatch is looked at.
        """
        first = device.type != "cpu" and device not in self._looked
        self._looked.add(device)
        return first

    def _losses(self, outputs: Any, targets: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        per_sample, weights = self.loss(outputs, targets)
        return per_sample, weights

    def _counted(self, outputs: Any, targets: Any) -> Sequence[torch.Tensor]:
        """Return the sums of one batch that the metrics are made of, tensors with `counts` numbers in all."""
        return ()

    def _metrics(self, counted: Sequence[float], samples: float) -> dict[str, float]:
        """Return the metrics besides the loss."""
        return {}

    def _measured(
        self, model: nn.Module, loader: Iterable[Batch], total: Total, see: Callable[[Any, Any], None] | None = None
    ) -> dict[str, float]:
        """Return the mean loss and the metrics over all samples, with model and loss in evaluation mode.

        Waits for the device once, at the end. The modules are put back into the modes that they had.
        """
        sums: list[torch.Tensor] = []
        with _evaluating(model, self.loss), torch.no_grad():
            for batch in loader:
                inputs, targets = parts(batch.data)
                outputs = model(inputs)
                per_sample, weights = self._losses(outputs, targets)
                if weights is None:
                    weights = torch.ones_like(per_sample)
                count = torch.full_like(weights.sum(), len(per_sample))
                own = [(per_sample * weights).sum(), weights.sum(), count, *self._counted(outputs, targets)]
                sums.append(torch.cat([value.double().reshape(-1) for value in own]))
                if see is not None:
                    see(outputs, targets)
        summed = torch.stack(sums).sum(0) if sums else _nothing(model, 3 + self.counts)
        loss, weight, samples, *counted = total(summed).tolist()
        if samples == 0:
            raise ConfigurationError(
                "there is nothing to evaluate: the loader gave no samples. Give it a part with samples."
            )
        # With all weights 0 there is no mean; the product keeps a NaN a NaN.
        return {"loss": loss / weight if weight != 0 else 0.0 * loss, **self._metrics(counted, samples)}


class AdditiveTask(LossTask):
    """A task whose metrics follow from sums over the samples, so that several processes can share the work."""

    def evaluate(self, model: nn.Module, loader: Iterable[Batch], total: Total = alone) -> dict[str, float]:
        """Return the mean loss and the task's metrics over all samples, with the model in evaluation mode.

        Waits for the device once, at the end. The model's modules are put back into the modes that they had.

        Args:
            model: from the inputs to what the loss needs.
            loader: microbatches whose data is the pair (inputs, targets), or inputs alone.
            total: adds a tensor up over all processes, each of which sees a share of the microbatches.

        Returns:
            `loss` (weighted as in training; 0 where all weights are 0), and the metrics.

        Raises:
            ConfigurationError: for a loader without samples, and for outputs and targets that don't fit each other.
        """
        return self._measured(model, loader, total)


def parts(data: Any) -> tuple[Any, Any]:
    """Return inputs and targets; targets are None where the data is no pair."""
    return (data[0], data[1]) if isinstance(data, (tuple, list)) and len(data) == 2 else (data, None)


def counting(loss: nn.Module, targets: torch.Tensor) -> torch.Tensor:
    """Return which targets count, bool in their shape: all but those that the loss ignores."""
    ignore_index = getattr(loss, "ignore_index", None)
    if ignore_index is None:
        return torch.ones_like(targets, dtype=torch.bool)
    counts: torch.Tensor = targets != ignore_index
    return counts


def share(part: float, whole: float) -> float:
    """Return the part of a whole, 0 of nothing."""
    return part / whole if whole != 0 else 0.0 * part


@contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for module in modules if isinstance(module, nn.Module) for part in module.modules()]
    for module in modules:
        if isinstance(module, nn.Module):
            module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _nothing(model: nn.Module, count: int) -> torch.Tensor:
    """Return the sums of a process that had no batch, on the device on which the others have theirs."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return torch.zeros(count, dtype=torch.float64, device=device)
