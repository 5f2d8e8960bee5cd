"""Faults in the data: samples that are bad whenever they come."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stabletrain.checks import whole
from stabletrain.errors import ConfigurationError
from stabletrain.fault.base import M, Planned, Surroundings
from stabletrain.tree import tensors


class BadSamples(Planned):
    """Some samples of the data set are bad from one step on: the first of that step's batch. They stay bad.

    Args:
        at: the step, counted over the run from 0; None: step 100, or never in a run that is shorter.
        times: how many steps, from there on, choose samples of their own.
        samples: how many samples in each of these steps.

    Raises:
        ConfigurationError: for numbers that make no sense, and for data without anything that could be NaN or Inf.
    """

    value = math.nan
    effect = "put {value} into the inputs"  # for messages
    needed = "floating tensor with one entry for each sample"

    def __init__(self, at: int | None = None, times: int = 1, samples: int = 1) -> None:
        super().__init__(at, times)
        whole("fault.samples", samples, 1)
        self.samples = samples
        self.indices: list[int] = []  # the bad samples: positions in the training data

    def _check_possible(self, run: Surroundings) -> None:
        if self.samples > run.batch_size:
            raise ConfigurationError(
                f"fault.samples is {self.samples}, but a step has {run.batch_size} samples (batch_size); choose at "
                "most as many."
            )

    def before_step(self, steps: int, microbatches: list[M]) -> list[M]:
        """Choose the bad samples when it is time, and return the microbatches with all bad samples in them bad."""
        if self._happens(steps):
            shown = [index for microbatch in microbatches for index in microbatch.indices.tolist()]
            self.indices = sorted({*self.indices, *shown[: self.samples]})
        return [self._poisoned(microbatch) for microbatch in microbatches]

    def _poisoned(self, microbatch: M) -> M:
        chosen = set(self.indices)
        rows = [row for row, index in enumerate(microbatch.indices.tolist()) if index in chosen] if chosen else []
        if not rows:
            return microbatch
        data = self._spoil(microbatch.data, rows, len(microbatch.indices))
        return replace(microbatch, data=data)  # type: ignore[type-var]

    def _spoil(self, data: Any, rows: list[int], count: int) -> Any:
        inputs = data[0] if is_pair(data) else data
        spoilt = _changed(inputs, rows, count, self.spoilt)
        if all(new is old for new, old in zip(tensors(spoilt), tensors(inputs), strict=True)):
            raise ConfigurationError(
                f"the fault can't {self.effect.format(value=self.value)}: they hold no {self.needed}. Choose another "
                "fault."
            )
        return rebuilt(data, [spoilt, data[1]]) if is_pair(data) else spoilt

    def spoilt(self, sample: Tensor) -> Tensor:
        """Return what becomes of a sample's floating tensor."""
        return torch.full_like(sample, self.value)

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the last time it happened, and the bad samples."""
        return {**super().state_dict(), "indices": list(self.indices)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what a fault of the same kind remembered; of another kind, nothing."""
        super().load_state_dict(state)
        if state.get("kind") == type(self).__name__:
            self.indices = [int(index) for index in state["indices"]]


class NanInput(BadSamples):
    """The inputs of some samples are NaN: a failed measurement, a division by 0 in the preprocessing.

    Every element of every floating tensor of the sample's inputs is NaN.
    """


class InfInput(BadSamples):
    """The inputs of some samples are Inf: an overflow in the preprocessing.

    Every element of every floating tensor of the sample's inputs is +Inf.
    """

    value = math.inf


class NanLabel(BadSamples):
    """The labels of some samples are NaN.

    Labels that are floating numbers (regression, probabilities) become NaN. Class numbers know no NaN, and one that
    doesn't exist is an error that training refuses; so the labels of a microbatch with a bad sample become
    probabilities [n, num_classes]: NaN for the bad samples, 1 for their class and 0 else for the others, which leaves
    the loss of these as it was.

    Args:
        at: the step, counted over the run from 0; None: step 100, or never in a run that is shorter.
        times: how many steps, from there on, choose samples of their own.
        samples: how many samples in each of these steps.
        num_classes: number of classes, where the labels are class numbers; None where they are not.
    """

    def __init__(self, at: int | None = None, times: int = 1, samples: int = 1, num_classes: int | None = None) -> None:
        super().__init__(at, times, samples)
        if num_classes is not None:
            whole("fault.num_classes", num_classes, 2)
        self.num_classes = num_classes

    def _spoil(self, data: Any, rows: list[int], count: int) -> Any:
        if not is_pair(data):
            raise ConfigurationError(
                "the fault can't make a label NaN: a batch is not the pair (inputs, targets). Choose another fault."
            )
        targets = data[1]
        if isinstance(targets, Tensor) and not targets.is_floating_point() and self.num_classes is not None:
            targets = F.one_hot(targets.long(), self.num_classes).float()
        spoilt = _changed(targets, rows, count, self.spoilt)
        if all(new is old for new, old in zip(tensors(spoilt), tensors(targets), strict=True)):
            raise ConfigurationError(
                "the fault can't make a label NaN: the targets are no floating tensor with one entry for each sample. "
                "For class numbers say how many classes there are: fault.num_classes=<number>."
            )
        return rebuilt(data, [data[0], spoilt])


def is_pair(data: Any) -> bool:
    """Return whether a batch is the pair (inputs, targets)."""
    return isinstance(data, (tuple, list)) and len(data) == 2


def rebuilt(old: Any, parts: Sequence[Any]) -> Any:
    """Return the parts in a list, tuple or named tuple like the old one."""
    return type(old)(*parts) if hasattr(old, "_fields") else type(old)(parts)


def _changed(tree: Any, rows: list[int], count: int, change: Callable[[Tensor], Tensor]) -> Any:
    """Return the tree with some of its samples changed; whatever changes is a copy.

    Args:
        tree: tensors [count, ...], lists of one tensor for each sample, and containers of these.
        rows: which of the samples.
        count: how many samples there are.
        change: what becomes of a sample; tensors that aren't floating stay as they are, and so do those with `count`
            entries where the shape would change.
    """
    if isinstance(tree, Tensor):
        if not tree.is_floating_point() or tree.dim() == 0 or len(tree) != count:
            return tree
        samples = [change(tree[row]) for row in rows]
        if any(sample.shape != tree.shape[1:] for sample in samples):
            return tree
        return tree.index_copy(0, torch.tensor(rows, device=tree.device), torch.stack(samples))
    if isinstance(tree, dict):
        return {name: _changed(item, rows, count, change) for name, item in tree.items()}
    if isinstance(tree, list) and len(tree) == count and all(isinstance(item, Tensor) for item in tree):
        spoilt = {row for row in rows if tree[row].is_floating_point()}
        return [change(item) if row in spoilt else item for row, item in enumerate(tree)]
    if isinstance(tree, (list, tuple)):
        return rebuilt(tree, [_changed(item, rows, count, change) for item in tree])
    return tree
