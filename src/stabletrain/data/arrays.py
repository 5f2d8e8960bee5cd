"""Batches, and data sets in memory, from which a batch is taken by one index operation for each tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from stabletrain.errors import ConfigurationError

Integers = np.ndarray[Any, np.dtype[np.int64]]
Inputs = torch.Tensor | list[torch.Tensor] | dict[str, Any]


@dataclass(frozen=True, slots=True)
class Microbatch:
    """What one forward and backward sees: some samples, and which ones they are.

    Attributes:
        data: a tree of tensors and lists; in supervised tasks the pair (inputs, targets).
        indices: positions in the data set, int64 [n], on the CPU.
    """

    data: Any
    indices: torch.Tensor


def _take(inputs: Inputs, indices: torch.Tensor, on_device: torch.Tensor) -> Inputs:
    if isinstance(inputs, torch.Tensor):
        return inputs.index_select(0, on_device)
    if isinstance(inputs, dict):
        return {name: _take(item, indices, on_device) for name, item in inputs.items()}
    return [inputs[index] for index in indices.tolist()]


def _item(inputs: Inputs, index: int) -> Any:
    if isinstance(inputs, dict):
        return {name: _item(item, index) for name, item in inputs.items()}
    return inputs[index]


def _to(inputs: Inputs, device: torch.device) -> Inputs:
    if isinstance(inputs, torch.Tensor):
        return inputs.to(device)
    if isinstance(inputs, dict):
        return {name: _to(item, device) for name, item in inputs.items()}
    return [item.to(device) for item in inputs]


def _lengths(inputs: Inputs) -> list[int]:
    if isinstance(inputs, dict):
        return [length for item in inputs.values() for length in _lengths(item)]
    return [len(inputs)]


class ArrayDataset(Dataset[tuple[Any, torch.Tensor]]):
    """Inputs and targets that lie in memory.

    Args:
        inputs: a tensor [N, ...], or a list of N tensors of any shapes, or a dictionary of these.
        targets: a tensor [N] of class numbers (int64), or [N, ...] of anything else.

    Raises:
        ConfigurationError: when inputs and targets differ in length.

    Example:
        >>> data = ArrayDataset(torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 0]))
        >>> data.gather(torch.tensor([2, 0]))
        (tensor([[4., 5.],
                [0., 1.]]), tensor([0, 0]))
    """

    def __init__(self, inputs: Inputs, targets: torch.Tensor) -> None:
        for length in _lengths(inputs):
            if length != len(targets):
                raise ConfigurationError(
                    f"{length} inputs were given with {len(targets)} targets: each sample needs one of each."
                )
        self.inputs = inputs
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, torch.Tensor]:
        return _item(self.inputs, index), self.targets[index]

    def gather(self, indices: torch.Tensor) -> tuple[Inputs, torch.Tensor]:
        """Return the batch of these samples.

        Args:
            indices: positions, int64 [n], on the CPU.

        Returns:
            Inputs (tensor [n, ...], or a list of n tensors) and targets (tensor [n, ...]), on the data's device.
        """
        on_device = indices.to(self.targets.device, non_blocking=True)
        return _take(self.inputs, indices, on_device), self.targets.index_select(0, on_device)

    def part(self, indices: torch.Tensor) -> ArrayDataset:
        """Return a data set of its own that holds these samples, in this order."""
        return ArrayDataset(*self.gather(indices))

    def to(self, device: torch.device | str) -> ArrayDataset:
        """Return the same data on another device."""
        device = torch.device(device)
        return ArrayDataset(_to(self.inputs, device), self.targets.to(device))


class Part(Dataset[Any]):
    """Some samples of a map-style data set, with what loaders ask of it: `random`, `gather`, `collate`, `targets`.

    Args:
        dataset: any object with `__len__` and `__getitem__`.
        indices: positions in it, int64 [n].
    """

    def __init__(self, dataset: Any, indices: torch.Tensor) -> None:
        self.dataset = dataset
        self.indices = indices
        self.random = bool(getattr(dataset, "random", False))
        if hasattr(dataset, "gather"):
            self.gather = self._gather
        if hasattr(dataset, "collate"):
            self.collate = dataset.collate

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[int(self.indices[index])]

    def _gather(self, indices: torch.Tensor, **draw: int) -> Any:
        return self.dataset.gather(self.indices.index_select(0, indices), **draw)


def class_targets(dataset: Any) -> Integers | None:
    """Return a data set's class numbers without reading its samples, or None where it doesn't tell them.

    Looks at `targets`, then `labels` (one whole number for each sample), and into `TensorDataset`, `Subset` and `Part`.

    Args:
        dataset: any map-style data set.

    Returns:
        Class numbers, int64 [N], or None.

    Example:
        >>> class_targets(TensorDataset(torch.zeros(3, 2), torch.tensor([0, 1, 1])))
        array([0, 1, 1])
    """
    if isinstance(dataset, (Subset, Part)):
        whole = class_targets(dataset.dataset)
        return None if whole is None else whole[np.asarray(dataset.indices)]
    if isinstance(dataset, TensorDataset):
        return _whole_numbers(dataset.tensors[-1], len(dataset))
    for name in ("targets", "labels"):
        found = _whole_numbers(getattr(dataset, name, None), len(dataset))
        if found is not None:
            return found
    return None


def _whole_numbers(values: Any, count: int) -> Integers | None:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    if not isinstance(values, np.ndarray):
        if not isinstance(values, Sequence) or len(values) == 0 or not isinstance(values[0], (int, np.integer)):
            return None
        values = np.asarray(values)
    if values.shape != (count,) or values.dtype.kind not in "iub":
        return None
    numbers: Integers = values.astype(np.int64)
    return numbers
