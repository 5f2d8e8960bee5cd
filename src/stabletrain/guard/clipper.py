"""The guard's way to any clipping: a function of gradients and their norm, or an object that remembers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from stabletrain.guard import measure

# Either `(gradients, norm) -> None`, or an object with the methods of `stabletrain.clipping.ParameterClipping`.
Clip = Any


class Clipper:
    """Clips what the optimizers are about to apply, and saves what the clipping remembers.

    Args:
        clip: what clips; None: nothing does.
        models: whose parameters are clipped.
        optimizers: which train them.

    Example:
        >>> import torch
        >>> layer = nn.Linear(1, 1)
        >>> clipper = Clipper(None, [layer], [torch.optim.SGD(layer.parameters())])
        >>> clipper.limits, clipper.state_dict()
        (False, {})
    """

    def __init__(self, clip: Clip, models: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> None:
        self._clip = clip
        self._optimizers = optimizers
        self._by_parameter = hasattr(clip, "clip") and hasattr(clip, "begin")
        self._kind = type(clip).__qualname__
        # Whether gradients of any finite size become small; else those whose squares overflow are rejected.
        self.limits: bool = clip is not None and getattr(clip, "limits", True)
        if clip is not None and self._by_parameter:
            clip.begin(models)

    def __call__(self, norm: float | Tensor, rejected: Tensor | None = None) -> None:
        """Clip the gradients at hand.

        Args:
            norm: measured before; a tensor where nothing may wait for it.
            rejected: bool, shape [], where the step will be undone on the device; None: it is applied.
        """
        if self._clip is None:
            return
        if self._by_parameter:
            self._clip.clip(measure.parameters(self._optimizers), norm, rejected=rejected)
        else:
            self._clip(measure.gradients(self._optimizers), norm)

    def state_dict(self) -> dict[str, Any]:
        """Return what the clipping remembers, and which it is; empty if it has no memory."""
        state = self._clip.state_dict() if self._by_parameter else {}
        return {"kind": self._kind, "memory": state} if state else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; another clipping's memory means nothing here."""
        if state and state["kind"] == self._kind:
            self._clip.load_state_dict(state["memory"])
