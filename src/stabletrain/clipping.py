"""Gradient clipping with a norm that was measured before: each option takes the gradients and that norm.

The guard decides first. Clipping a gradient that holds one NaN would make all of them NaN, and one Inf would set
the healthy ones to 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from stabletrain.errors import ConfigurationError
from stabletrain.finite import limit_norm
from stabletrain.tree import local


class Clipping(Protocol):
    """Changes gradients in place so that no step is too large."""

    def __call__(self, gradients: Sequence[Tensor], norm: float | Tensor, /) -> None:
        """Clip `gradients`, whose finite Euclidean norm over all elements is `norm`."""
        ...


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
        _check_positive("clipping.max_norm", self.max_norm)

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
        _check_positive("clipping.max_value", self.max_value)

    def __call__(self, gradients: Sequence[Tensor], norm: float | Tensor, /) -> None:
        """Limit in place."""
        for gradient in gradients:
            if gradient.is_sparse:
                summed = gradient.coalesce()
                summed.values().clamp_(-self.max_value, self.max_value)
                gradient.copy_(summed)
            else:
                local(gradient).clamp_(-self.max_value, self.max_value)


def _check_positive(name: str, value: float) -> None:
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
        raise ConfigurationError(f"{name} is {value!r}; it must be a positive number. `clipping=none` switches it off.")
