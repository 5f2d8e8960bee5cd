"""ZClip: clip a gradient norm that is far above the recent ones, by how many standard deviations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from stabletrain.clipping.base import (
    as_statistic,
    check_count,
    check_positive,
    check_share,
    gradients_of,
    limit_to,
    worth_knowing,
)
from stabletrain.clipping.memory import Memory, applied

EPS = 1e-6  # added to the deviation


class ZClip:
    """Limits the norm of all gradients by the mean m and the variance v of recent norms, and by `max_norm`.

    With z = (norm - m) / (sqrt(v) + 1e-6), a norm with z > z_limit counts as m + z_limit * sqrt(v) / (z / z_limit):
    the further out, the nearer to the mean. What counts then enters m <- alpha m + (1 - alpha) norm and
    v <- alpha v + (1 - alpha) (norm - m)^2 (with the new m). The first `warmup` norms give the first mean and
    variance; until then `max_norm` alone limits.

    Norms that are 0, not finite, or too large to be squared in float32 change no statistics, and neither do rejected
    steps. Its memory is a few hundred bytes, saved with the guard.

    Args:
        alpha: decay of mean and variance, at least 0 and below 1.
        z_limit: standard deviations above the mean beyond which a norm is limited.
        warmup: updates that the first mean and variance are taken from.
        max_norm: largest norm in any case, in the loss's unit per parameter's unit; None: no such limit.

    Raises:
        ConfigurationError: for a number outside its range.

    Source:
        Kumar, Owen, Chowdhury, Guera 2025, "ZClip: Adaptive Spike Mitigation for LLM Pre-Training" (arXiv 2504.02507),
        with adaptive scaling.

    Example:
        >>> weight = Parameter(torch.zeros(1))
        >>> clip = ZClip(warmup=2, max_norm=None)
        >>> for norm in (1.0, 3.0, 30.0):
        ...     weight.grad = torch.tensor([norm])
        ...     clip.clip([weight], norm)
        >>> round(weight.grad.item(), 3)  # 2 + 2.5 * 1 / (28 / 2.5)
        2.223
    """

    limits: ClassVar[bool] = False  # a norm whose square overflows is no news about the gradients: it is rejected

    def __init__(
        self, alpha: float = 0.97, z_limit: float = 2.5, warmup: int = 25, max_norm: float | None = 1.0
    ) -> None:
        check_share("clipping.alpha", alpha)
        check_positive("clipping.z_limit", z_limit)
        check_count("clipping.warmup", warmup, least=2)
        if max_norm is not None:
            check_positive("clipping.max_norm", max_norm)
        self.alpha, self.z_limit, self.warmup, self.max_norm = alpha, z_limit, warmup, max_norm
        self.begin([])

    def begin(self, models: Sequence[nn.Module], /) -> None:
        """Forget everything; nothing of the models matters."""
        self._memory = Memory(
            mean=torch.zeros((), dtype=torch.float64),
            variance=torch.zeros((), dtype=torch.float64),
            first=torch.zeros(self.warmup, dtype=torch.float64),  # norms of the warm-up
            seen=torch.zeros((), dtype=torch.int64),
        )

    @torch.no_grad()
    def clip(self, parameters: Sequence[Parameter], norm: float | Tensor, /, rejected: Tensor | None = None) -> None:
        """Limit the gradients, and take in the norm; arguments as for `ParameterClipping.clip`."""
        measured = as_statistic(norm)
        memory = self._memory.on(measured.device)
        mean, variance, seen = memory["mean"], memory["variance"], memory["seen"]
        deviation = variance.sqrt()
        z = (measured - mean) / (deviation + EPS)
        is_spike = (seen >= self.warmup) & (z > self.z_limit)
        counted = torch.where(is_spike, mean + self.z_limit * deviation / (z / self.z_limit), measured)
        limit = counted if self.max_norm is None else counted.clamp(max=self.max_norm)
        limit_to(gradients_of(parameters), measured, limit, on_host=not isinstance(norm, Tensor))
        self._take_in(measured, counted, worth_knowing(measured) & applied(rejected, measured))

    def _take_in(self, measured: Tensor, counted: Tensor, admitted: Tensor) -> None:
        memory = self._memory
        seen = memory["seen"]
        first = torch.where(torch.arange(self.warmup, device=seen.device) == seen, measured, memory["first"])
        ends = seen + 1 == self.warmup
        mean = torch.lerp(counted, memory["mean"], self.alpha)
        variance = torch.lerp((counted - mean).square(), memory["variance"], self.alpha)
        warm = seen >= self.warmup
        memory.take(
            admitted,
            mean=torch.where(warm, mean, torch.where(ends, first.mean(), memory["mean"])),
            variance=torch.where(warm, variance, torch.where(ends, first.var(correction=0), memory["variance"])),
            first=first,
            seen=(seen + 1).clamp(max=self.warmup),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return mean, variance, and the norms of the warm-up."""
        return self._memory.state_dict()

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Take over what `state_dict` returned; with another length of the warm-up it begins anew."""
        if len(state["first"]) == self.warmup:
            self._memory.load_state_dict(state)
