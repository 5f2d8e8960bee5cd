"""Statistics of an incident's tensors, for people who read `verdict.json`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


def statistics(batches: list[Any], state: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Describe every tensor of the batches, the model and the optimizer, by name."""
    parts: dict[str, Any] = {"batch": batches, **(state or {})}
    return {part: {name: describe(tensor) for name, tensor in named_tensors(tree)} for part, tree in parts.items()}


def describe(tensor: Tensor) -> dict[str, Any]:
    """Return shape, dtype, counts of NaN and Inf, and least, largest and mean value of the finite elements.

    Example:
        >>> describe(torch.tensor([1.0, float("nan"), 3.0]))
        {'shape': [3], 'dtype': 'float32', 'nan': 1, 'inf': 0, 'min': 1.0, 'max': 3.0, 'mean': 2.0}
    """
    values = tensor.coalesce().values() if tensor.is_sparse else tensor
    facts: dict[str, Any] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
    if values.is_complex():
        values = torch.view_as_real(values)
    values = values.double()
    finite = values[torch.isfinite(values)]
    facts |= {"nan": int(torch.isnan(values).sum()), "inf": int(torch.isinf(values).sum())}
    known = finite.numel() > 0
    return facts | {
        "min": float(finite.min()) if known else None,
        "max": float(finite.max()) if known else None,
        "mean": float(finite.mean()) if known else None,
    }


def named_tensors(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Visit the tensors of a tree from left to right, each with its dotted place."""
    if isinstance(tree, Tensor):
        yield name, tree
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, (list, tuple)):
        items = enumerate(tree)
    for key, item in items:
        yield from named_tensors(item, f"{name}.{key}" if name else str(key))
