"""What a clipping remembers: a few tensors that change together, or not at all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Memory:
    """Named tensors on one device, replaced only where a step is taken in; by selection, never by multiplication.

    Args:
        tensors: their first values.

    Example:
        >>> memory = Memory(mean=torch.tensor(1.0))
        >>> memory.take(torch.tensor(False), mean=torch.tensor(float("nan")))
        >>> memory.take(torch.tensor(True), mean=torch.tensor(2.0))
        >>> memory["mean"]
        tensor(2.)
    """

    def __init__(self, **tensors: Tensor) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor; don't change it in place."""
        return self._tensors[name]

    def on(self, device: torch.device) -> Memory:
        """Move to a device, if it isn't there yet; return itself."""
        if any(tensor.device != device for tensor in self._tensors.values()):
            self._tensors = {name: tensor.to(device) for name, tensor in self._tensors.items()}
        return self

    def take(self, admitted: Tensor, **tensors: Tensor) -> None:
        """Replace tensors where `admitted`, a bool that broadcasts to them."""
        for name, tensor in tensors.items():
            self._tensors[name] = torch.where(admitted, tensor, self._tensors[name])

    def state_dict(self) -> dict[str, Any]:
        """Return copies on the host, so that a state is the same wherever it came from."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in self._tensors.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        for name, tensor in self._tensors.items():
            self._tensors[name] = state[name].to(tensor.dtype, copy=True)


def applied(rejected: Tensor | None, like: Tensor) -> Tensor:
    """Return whether the step is applied, as a bool of shape [] on the device of `like`."""
    if rejected is None:
        return torch.ones((), dtype=torch.bool, device=like.device)
    return ~rejected.to(like.device)
