"""Batches are any tree of tensors: dictionaries, lists, tuples and named tuples, with anything else left as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from typing import TypeGuard

    from torch.distributed.tensor import DTensor


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], tree: Any) -> Any:
    """Return the same tree with `function` applied to each tensor.

    Example:
        >>> map_tensors(lambda tensor: tensor + 1, {"a": [torch.tensor(1)], "b": "text"})
        {'a': [tensor(2)], 'b': 'text'}
    """
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {name: map_tensors(function, item) for name, item in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(function, item) for item in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_tensors(function, item) for item in tree)
    return tree


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    """Visit the tensors of a tree from left to right.

    Example:
        >>> [int(tensor) for tensor in tensors({"a": [torch.tensor(1), torch.tensor(2)], "b": None})]
        [1, 2]
    """
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from tensors(item)
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from tensors(item)


def to_device(tree: Any, device: torch.device | str) -> Any:
    """Return the tree with its tensors on `device`; tensors in pinned memory are copied without waiting.

    Example:
        >>> to_device([torch.ones(2)], "cpu")
        [tensor([1., 1.])]
    """
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), tree)


def is_distributed(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Return whether the tensor is one rank's part of a larger one (torch's DTensor, as `fully_shard` makes them).

    Example:
        >>> is_distributed(torch.ones(2))
        False
    """
    return type(tensor) is not torch.Tensor and hasattr(tensor, "device_mesh")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank holds of a tensor, sharing its memory: all of it, unless it is sharded.

    Example:
        >>> local(torch.ones(2))
        tensor([1., 1.])
    """
    part: torch.Tensor = tensor.to_local() if is_distributed(tensor) else tensor
    return part
