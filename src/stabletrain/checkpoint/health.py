"""What must be finite for a state to be published."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

_HEALTHY_SECTIONS = ("model", "optimizer", "ema", "loss")


def unhealthy_names(files: Mapping[str, Any], exempt: Collection[str]) -> list[str]:
    """Return the names of the tensors of model, optimizer, EMA and loss in these files that hold NaN or an infinity.

    Args:
        files: what each file of a checkpoint is to hold.
        exempt: names within a model of tensors that may.
    """
    found = [name for tree in files.values() for section in _HEALTHY_SECTIONS
             for name in nonfinite_names(tree.get(section), section)]  # fmt: skip
    return [name for name in found if not any(name == other or name.endswith(f".{other}") for other in exempt)]


def nonfinite_names(tree: Any, prefix: str = "") -> list[str]:
    """Return the dotted names of the floating tensors in `tree` that hold NaN or an infinity.

    Example:
        >>> nonfinite_names({"weight": torch.ones(2), "mask": torch.tensor([0.0, float("-inf")])})
        ['mask']
    """
    if isinstance(tree, torch.Tensor):
        return [] if _is_finite(tree) else [prefix]
    items: Iterable[tuple[Any, Any]]
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, (list, tuple)):
        items = enumerate(tree)
    else:
        return []
    dot = f"{prefix}." if prefix else ""
    return [found for name, item in items for found in nonfinite_names(item, f"{dot}{name}")]


def _is_finite(tensor: torch.Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    if tensor.element_size() == 1:
        tensor = tensor.float()  # 8 bits: what follows isn't written for them
    if tensor.is_complex() or tensor.layout != torch.strided:
        return bool(torch.isfinite(tensor).all())
    # One pass that makes no second tensor of that size; NaN is passed on as the least and the largest.
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())
