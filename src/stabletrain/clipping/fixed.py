"""Clipping to a limit that stays the same: none, the norm of all gradients, or each element."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from stabletrain.clipping.base import check_positive
from stabletrain.finite import limit_norm
from stabletrain.tree import local


@dataclass(frozen=True)
class NoClipping:
    """Leaves the gradients as they are; the guard then rejects gradients that are too large for any optimizer.

    Example:
        >>> import torch
        >>> NoClipping()([torch.tensor([3.0])], 3.0)
    """

    limits: ClassVar[bool] = False

    def __call__(self, gradients: Sequence[Tensor], norm: float | Tensor, /) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class Norm:
    """Scales all gradients together so that their norm is at most `max_norm`: g * min(1, max_norm / (norm + 1e-6)).

    Args:
        max_norm: largest Euclidean norm over all gradients, in the loss's unit per parameter's unit.

    Raises:
        ConfigurationError: unless `max_norm` is a positive number.

    Source:
        Pascanu, Mikolov, Bengio 2013, "On the difficulty of training recurrent neural networks"; the 1e-6 as in torch.

    Example:
        >>> import torch
        >>> gradient = torch.tensor([3.0, 4.0])
        >>> Norm(1.0)([gradient], 5.0)
        >>> gradient
        tensor([0.6000, 0.8000])
    """

    max_norm: float

    def __post_init__(self) -> None:
        check_positive("clipping.max_norm", self.max_norm)

    def __call__(self, gradients: Sequence[Tensor], norm: float | Tensor, /) -> None:
        """Scale in place; with `norm` on the host, nothing is touched when there is nothing to clip."""
        limit_norm(gradients, norm, self.max_norm)


@dataclass(frozen=True)
class Value:
    """Limits each element of each gradient to [-max_value, max_value].

    Args:
        max_value: largest magnitude of an element, in the loss's unit per parameter's unit.

    Raises:
        ConfigurationError: unless `max_value` is a positive number.

    Example:
        >>> import torch
        >>> gradient = torch.tensor([3.0, -0.5])
        >>> Value(1.0)([gradient], 3.0)
        >>> gradient
        tensor([ 1.0000, -0.5000])
    """

    max_value: float

    def __post_init__(self) -> None:
        check_positive("clipping.max_value", self.max_value)

    def __call__(self, gradients: Sequence[Tensor], norm: float | Tensor, /) -> None:
        """Limit in place."""
        for gradient in gradients:
            if gradient.is_sparse:
                summed = gradient.coalesce()
                summed.values().clamp_(-self.max_value, self.max_value)
                gradient.copy_(summed)
            else:
                local(gradient).clamp_(-self.max_value, self.max_value)
