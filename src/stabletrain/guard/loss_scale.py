"""The tensors in which a loss scaler remembers, to put them back when a step is to leave no trace."""

from __future__ import annotations

from torch import Tensor
from torch.amp.grad_scaler import GradScaler


def tensors(scaler: GradScaler) -> list[Tensor]:
    """Return scale, growth counter and, where the scaler has hysteresis, its patience; each of shape [].

    Example:
        >>> import torch
        >>> scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        >>> _ = scaler.scale(torch.ones(1))
        >>> [tensor.item() for tensor in tensors(scaler)]
        [4.0, 0]
    """
    assert scaler._scale is not None and scaler._growth_tracker is not None
    patience = getattr(scaler, "patience", None)
    return [scaler._scale, scaler._growth_tracker, *([patience] if isinstance(patience, Tensor) else [])]


def copies(scaler: GradScaler) -> list[Tensor]:
    """Return copies of them."""
    return [tensor.clone() for tensor in tensors(scaler)]


def put_back(scaler: GradScaler, before: list[Tensor]) -> None:
    """Let the scaler be as it was when the copies were made."""
    for tensor, copied in zip(tensors(scaler), before, strict=True):
        tensor.copy_(copied)
