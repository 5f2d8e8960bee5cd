"""The loss scaler that float16 needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from stabletrain.checks import whole


class LossScaler(GradScaler):
    """Torch's loss scaler, patient with a lone overflow: one alone leaves a scale that has found its level.

    While the scale finds its level (at the start, after it was lowered and after it has grown, until the next applied
    step) each overflow lowers it at once. Later the first `hysteresis` - 1 overflows leave it, and the next one lowers
    it. The scale grows after `growth_interval` updates without overflow, as before, so that overflows further apart
    than that count as lone ones. All of it is decided on the device.

    Args:
        device: type of the device, such as `cpu` or `cuda`.
        hysteresis: overflows that it takes to lower a scale that has found its level, at least 1.
        options: as for `torch.amp.GradScaler`.

    Raises:
        ConfigurationError: for a hysteresis that is no whole number from 1.

    Source:
        `hysteresis` of Megatron-LM's `DynamicGradScaler` and `delayed_shift` of DeepSpeed's `DynamicLossScaler`, which
        forgive the first overflow of a run too. Here the scale falls without delay until it fits.

    Example:
        >>> scaler = LossScaler("cpu", init_scale=8.0)
        >>> weight = torch.ones(1, requires_grad=True)
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> scales = []
        >>> for gradient in (float("inf"), 1.0, float("inf"), 1.0, float("inf"), float("inf")):
        ...     weight.grad = scaler.scale(torch.tensor([gradient]))
        ...     scaler.unscale_(optimizer)
        ...     scaler.update()
        ...     scales.append(scaler.get_scale())
        >>> scales
        [4.0, 4.0, 4.0, 4.0, 2.0, 1.0]
    """

    def __init__(self, device: str, *, hysteresis: int = 2, **options: Any) -> None:
        whole("precision.hysteresis", hysteresis)
        super().__init__(device, **options)
        self.hysteresis = hysteresis
        self._initial_patience = -1
        self.patience: Tensor | None = None  # overflows that leave the scale; -1: it is finding its level

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Let the scale react to the gradients that were unscaled, or set it, which leaves the patience as it is."""
        if new_scale is not None or not self.is_enabled():
            super().update(new_scale)
            return
        assert self._scale is not None and self._growth_tracker is not None and self.patience is not None
        before, patience = self._scale.clone(), self.patience
        super().update()
        overflow = self._scale < before
        forgiven = overflow & (patience > 0)
        self._scale.copy_(torch.where(forgiven, before, self._scale))
        grown = ~overflow & (self._growth_tracker == 0)
        settled = torch.where(patience < 0, self.hysteresis - 1, patience)
        moved = torch.where(overflow | grown, -1, settled)
        patience.copy_(torch.where(forgiven, patience - 1, moved))

    def raise_to(self, scale: float) -> None:
        """Raise the scale, if it is lower; a level that was raised has to be found again."""
        if self.get_scale() >= scale:
            return
        if self._scale is None:
            self._init_scale = scale
            return
        self.update(scale)
        assert self.patience is not None
        self.patience.fill_(-1)

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state and the patience left; waits for the device."""
        patience = self._initial_patience if self.patience is None else int(self.patience)
        return {**super().state_dict(), "patience": patience}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; from torch's own scaler, the scale is taken to find its level."""
        super().load_state_dict(state)
        self._initial_patience = int(state.get("patience", -1))
        if self.patience is not None:
            self.patience.fill_(self._initial_patience)

    def _lazy_init_scale_growth_tracker(self, dev: torch.device) -> None:
        super()._lazy_init_scale_growth_tracker(dev)
        self.patience = torch.full((), self._initial_patience, dtype=torch.int32, device=dev)
