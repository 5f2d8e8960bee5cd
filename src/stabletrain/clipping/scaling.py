"""Scaling each gradient by a factor of its own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stabletrain.tree import local


def scale_each(gradients: Sequence[Tensor], factors: Tensor, *, on_host: bool) -> None:
    """Multiply each gradient by its factor in place.

    Args:
        gradients: dense, sparse COO or sharded, on any devices.
        factors: shape [len(gradients)].
        on_host: whether the factors may be read, so that gradients with a factor of 1 need not be touched.

    Example:
        >>> import torch
        >>> gradients = [torch.ones(2), torch.ones(1)]
        >>> scale_each(gradients, torch.tensor([0.5, 1.0]), on_host=True)
        >>> gradients
        [tensor([0.5000, 0.5000]), tensor([1.])]
    """
    if on_host:
        for gradient, factor in zip(gradients, factors.tolist(), strict=True):
            if factor != 1.0:
                (gradient if gradient.is_sparse else local(gradient)).mul_(factor)
        return
    for gradient, one in zip(gradients, factors, strict=True):
        (gradient if gradient.is_sparse else local(gradient)).mul_(one.to(gradient.device))
