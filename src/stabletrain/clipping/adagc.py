"""AdaGC: limit each tensor's gradient by the average of its own clipped norms."""

from __future__ import annotations

import operator
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
    worth_knowing,
)
from stabletrain.clipping.memory import Memory, applied
from stabletrain.clipping.scaling import scale_each
from stabletrain.finite import whole_sizes


class AdaGC:
    """Scales each tensor's gradient g so that its norm is at most `relative` times the average y of its clipped norms.

    g <- g * min(1, relative * y / |g|), then y <- beta y + (1 - beta) |g| with the clipped g. In the first `warmup`
    updates of a tensor all gradients count together: g <- g * min(1, absolute / norm of all), and y is the smallest
    |g| after that. A tensor that gets its first gradient later has a warm-up of its own.

    Norms that are 0, not finite, or too large to be squared in float32 change no average, and neither do rejected
    steps. Its memory is 16 bytes for each tensor, saved with the guard. Norms of sharded tensors are those over all
    ranks.

    Args:
        absolute: largest norm of all gradients during the warm-up.
        relative: factor on a tensor's average from then on.
        beta: decay of the averages, at least 0 and below 1.
        warmup: updates of a tensor until its average is used; from that update on.

    Raises:
        ConfigurationError: for a number outside its range.

    Source:
        Wang et al. 2025, "AdaGC: Improving Training Stability for Large Language Model Pretraining" (arXiv 2502.11034).

    Example:
        >>> weight = Parameter(torch.zeros(1))
        >>> clip = AdaGC(warmup=2)
        >>> for norm in (0.5, 30.0):
        ...     weight.grad = torch.tensor([norm])
        ...     clip.clip([weight], norm)
        >>> round(weight.grad.item(), 4)  # 1.05 * 0.5
        0.525
    """

    limits: ClassVar[bool] = False  # a norm whose square overflows is no news about the gradients: it is rejected

    def __init__(self, absolute: float = 1.0, relative: float = 1.05, beta: float = 0.98, warmup: int = 100) -> None:
        check_positive("clipping.absolute", absolute)
        check_positive("clipping.relative", relative)
        check_share("clipping.beta", beta)
        check_count("clipping.warmup", warmup)
        self.absolute, self.relative, self.beta, self.warmup = absolute, relative, beta, warmup
        self.begin([])

    def begin(self, models: Sequence[nn.Module], /) -> None:
        """Forget everything, and learn the parameters' names, by which the averages are saved."""
        self._order: list[Parameter] = []  # of the averages
        self._memory = _nothing(0)
        self._loaded: dict[str, tuple[Tensor, Tensor]] = {}  # by name: average and count, until they are asked for
        self._names = {
            p: f"{place}.{name}" for place, model in enumerate(models) for name, p in model.named_parameters()
        }

    @torch.no_grad()
    def clip(self, parameters: Sequence[Parameter], norm: float | Tensor, /, rejected: Tensor | None = None) -> None:
        """Limit each gradient, and take in its norm; arguments as for `ParameterClipping.clip`."""
        gradients = gradients_of(parameters)
        if not gradients:
            return
        self._arrange(parameters)
        norms, places = whole_sizes(gradients), None
        if len(gradients) < len(parameters):  # those without gradient count as 0, which changes nothing
            has = torch.tensor([parameter.grad is not None for parameter in parameters])
            places = has.nonzero().flatten().to(norms.device)
            norms = norms.new_zeros(len(parameters)).index_copy(0, places, norms)
        whole = as_statistic(norm).to(norms.device, norms.dtype)
        memory = self._memory.on(norms.device)
        average, seen = memory["average"], memory["seen"]
        is_new, warms_up = seen == 0, (seen == 0) | (seen + 1 < self.warmup)
        limit = torch.where(warms_up, norms * (self.absolute / (whole + 1e-6)), self.relative * average)
        known = worth_knowing(norms) & torch.isfinite(whole)
        factor = torch.where(known & (norms > limit), limit / norms, torch.ones_like(norms))
        own = factor if places is None else factor[places]
        scale_each(gradients, own, on_host=not isinstance(norm, Tensor))
        # Beyond what float32 can square it is limited all the same, but not taken in.
        clipped = norms * factor
        smallest = torch.where(is_new, clipped, torch.minimum(average, clipped))
        admitted = known & worth_knowing(whole) & applied(rejected, norms)
        memory.take(
            admitted,
            average=torch.where(warms_up, smallest, torch.lerp(clipped, average, self.beta)),
            seen=(seen + 1).clamp(max=self.warmup),
        )

    def _arrange(self, parameters: Sequence[Parameter]) -> None:
        """Let the averages stand in the order of these parameters; those not known yet begin anew."""
        same = len(parameters) == len(self._order) and all(map(operator.is_, parameters, self._order))
        if same and not self._loaded:
            return
        pairs = self._memory.state_dict()
        kept = dict(zip(self._order, zip(pairs["average"], pairs["seen"], strict=True), strict=True))
        self._order, self._memory = list(parameters), _nothing(len(parameters))
        fresh = (torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64))
        chosen = [
            kept.get(parameter, self._loaded.get(self._name(place), fresh))
            for place, parameter in enumerate(parameters)
        ]
        self._loaded = {}
        self._memory.load_state_dict(
            {"average": torch.stack([one for one, _ in chosen]), "seen": torch.stack([one for _, one in chosen])}
        )

    def _name(self, place: int) -> str:
        return self._names.get(self._order[place], f"parameter {place}")

    def _by_name(self) -> dict[str, tuple[Tensor, Tensor]]:
        state = self._memory.state_dict()
        pairs = zip(state["average"], state["seen"], strict=True)
        return {self._name(place): pair for place, pair in enumerate(pairs)}

    def state_dict(self) -> dict[str, Any]:
        """Return averages and counts, in the order of their names."""
        known = self._loaded or self._by_name()
        pairs = list(known.values())
        return {
            "names": list(known),
            "average": torch.stack([one for one, _ in pairs]) if pairs else torch.zeros(0, dtype=torch.float64),
            "seen": torch.stack([one for _, one in pairs]) if pairs else torch.zeros(0, dtype=torch.int64),
        }

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Take over what `state_dict` returned, by the parameters' names; those it doesn't know begin anew."""
        self._order, self._memory = [], _nothing(0)
        pairs = zip(state["average"].clone(), state["seen"].clone(), strict=True)
        self._loaded = dict(zip(state["names"], pairs, strict=True))


def _nothing(count: int) -> Memory:
    return Memory(average=torch.zeros(count, dtype=torch.float64), seen=torch.zeros(count, dtype=torch.int64))
