"""What a clipping is: either a function of gradients and their norm, or one that knows parameters and remembers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from stabletrain.errors import ConfigurationError
from stabletrain.finite import LARGEST_SQUARE, scale_all


class Clipping(Protocol):
    """Changes gradients in place so that no step is too large."""

    def __call__(self, gradients: Sequence[Tensor], norm: float | Tensor, /) -> None:
        """Clip `gradients`, whose finite Euclidean norm over all elements is `norm`."""
        ...


class ParameterClipping(Protocol):
    """A clipping that looks at parameters beside their gradients, or at what recent steps were like.

    What it remembers is part of the step's transaction. It takes in only steps that are applied, and among them no
    norm that is 0, not finite, or so large that its square overflows float32: such a step leaves its memory as it is,
    bit for bit. An object with memory belongs to one guard.
    """

    limits: ClassVar[bool]  # False: gradients whose squares overflow float32 are still rejected

    def begin(self, models: Sequence[nn.Module], /) -> None:
        """Begin anew, for the parameters of these models; a guard calls it once."""
        ...

    def clip(self, parameters: Sequence[Parameter], norm: float | Tensor, /, rejected: Tensor | None = None) -> None:
        """Clip the gradients of `parameters` in place.

        Args:
            parameters: all that are trained, in the same order each time; those without gradient are passed over.
            norm: Euclidean norm over all gradients, measured before; on the device where nothing may wait for it.
            rejected: bool, shape [], on the norm's device: the step will be undone there; None: it is applied.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what it remembers; empty if nothing."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Take over what `state_dict` returned."""
        ...


def gradients_of(parameters: Sequence[Parameter]) -> list[Tensor]:
    """Return the gradients that there are."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def as_statistic(norm: float | Tensor) -> Tensor:
    """Return a norm as float64 on its own device, or on the CPU for a number."""
    return torch.as_tensor(norm, dtype=torch.float64)


def worth_knowing(norms: Tensor) -> Tensor:
    """Return which norms may enter a memory: finite, above 0, and with a square that float32 can hold.

    Example:
        >>> worth_knowing(torch.tensor([1.0, 0.0, 1e30, float("nan"), float("inf")]))
        tensor([ True, False, False, False, False])
    """
    return torch.isfinite(norms) & (norms > 0) & (norms <= LARGEST_SQUARE)


def limit_to(gradients: Sequence[Tensor], norm: Tensor, limit: Tensor, *, on_host: bool) -> None:
    """Scale all gradients together to a norm of `limit` where theirs is larger; a norm of NaN or Inf changes nothing.

    Args:
        gradients: of any shapes.
        norm: their norm, shape [].
        limit: the largest that is allowed, shape [].
        on_host: whether the norm is known on the host, so that gradients below the limit need not be touched.
    """
    over = torch.isfinite(norm) & (norm > limit)
    factor = torch.where(over, limit / (norm + 1e-6), torch.ones_like(norm))
    if not on_host:
        scale_all(gradients, factor)
    elif bool(over):
        scale_all(gradients, float(factor))


def check_positive(name: str, value: Any) -> None:
    """Refuse what isn't a positive finite number.

    Raises:
        ConfigurationError: names the key and the value.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and value > 0):
        raise ConfigurationError(f"{name} is {value!r}; it must be a positive number. `clipping=none` switches it off.")


def check_share(name: str, value: Any) -> None:
    """Refuse what isn't a number of at least 0 and below 1.

    Raises:
        ConfigurationError: names the key and the value.
    """
    if not (isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1):
        raise ConfigurationError(f"{name} is {value!r}; it must be a number of at least 0 and below 1.")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Refuse what isn't a whole number of at least `least`.

    Raises:
        ConfigurationError: names the key and the value.
    """
    if not (isinstance(value, int) and not isinstance(value, bool) and value >= least):
        raise ConfigurationError(f"{name} is {value!r}; it must be a whole number, {least} or more.")
