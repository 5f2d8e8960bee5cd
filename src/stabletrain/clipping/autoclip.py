"""AutoClip: limit the gradient norm to a percentile of the norms seen so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from stabletrain.clipping.base import as_statistic, check_count, gradients_of, limit_to, worth_knowing
from stabletrain.clipping.memory import Memory, applied
from stabletrain.errors import ConfigurationError


class AutoClip:
    """Scales all gradients together so that their norm is at most the p-th percentile of the norms so far.

    The norm at hand is one of them, and the percentile is interpolated between the two nearest norms. The method keeps
    every norm of the run; here the latest `history` of them are kept (8 bytes each, saved with the guard), which is the
    same until there are more.

    Norms that are 0, not finite, or too large to be squared in float32 are never kept, and neither are those of
    rejected steps.

    Args:
        percentile: p, from 0 to 100. Small values clip most steps: what the rate means depends on it.
        history: norms to keep.

    Raises:
        ConfigurationError: for a number outside its range.

    Source:
        Seetharaman, Wichern, Pardo, Le Roux 2020, "AutoClip: Adaptive Gradient Clipping for Source Separation
        Networks" (arXiv 2007.14469).

    Example:
        >>> weight = Parameter(torch.zeros(1))
        >>> clip = AutoClip(percentile=50.0)
        >>> for norm in (1.0, 3.0, 8.0):
        ...     weight.grad = torch.tensor([norm])
        ...     clip.clip([weight], norm)
        >>> round(weight.grad.item(), 3)
        3.0
    """

    limits: ClassVar[bool] = False  # a norm whose square overflows is no news about the gradients: it is rejected

    def __init__(self, percentile: float = 10.0, history: int = 4096) -> None:
        number = isinstance(percentile, (int, float)) and not isinstance(percentile, bool)
        if not (number and 0 <= percentile <= 100):
            raise ConfigurationError(f"clipping.percentile is {percentile!r}; it must be a number from 0 to 100.")
        check_count("clipping.history", history)
        self.percentile, self.history = percentile, history
        self.begin([])

    def begin(self, models: Sequence[nn.Module], /) -> None:
        """Forget everything; nothing of the models matters."""
        self._memory = Memory(
            norms=torch.full((self.history,), math.inf, dtype=torch.float64),  # a ring; unused places sort last
            seen=torch.zeros((), dtype=torch.int64),
        )

    @torch.no_grad()
    def clip(self, parameters: Sequence[Parameter], norm: float | Tensor, /, rejected: Tensor | None = None) -> None:
        """Limit the gradients, and keep the norm; arguments as for `ParameterClipping.clip`."""
        measured = as_statistic(norm)
        memory = self._memory.on(measured.device)
        place = torch.arange(self.history, device=measured.device) == memory["seen"] % self.history
        counts = worth_knowing(measured)
        norms = torch.where(place & counts, measured, memory["norms"])
        seen = memory["seen"] + counts
        limit = self._percentile(norms, seen.clamp(max=self.history))
        limit_to(gradients_of(parameters), measured, limit, on_host=not isinstance(norm, Tensor))
        memory.take(applied(rejected, measured), norms=norms, seen=seen)

    def _percentile(self, norms: Tensor, count: Tensor) -> Tensor:
        """Return the percentile of the finite norms, of which there are `count`; infinity without any."""
        ordered = norms.sort().values
        last = (count - 1).clamp(min=0)
        position = last.double() * (self.percentile / 100.0)
        below = position.floor().long()
        low, high = ordered.gather(0, torch.stack([below, torch.minimum(below + 1, last)]))  # reads nothing back
        return torch.where(low == high, low, low + (high - low) * (position - below))

    def state_dict(self) -> dict[str, Any]:
        """Return the norms and how many there were."""
        return self._memory.state_dict()

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Take over what `state_dict` returned; with another length of the history it begins anew."""
        if len(state["norms"]) == self.history:
            self._memory.load_state_dict(state)
