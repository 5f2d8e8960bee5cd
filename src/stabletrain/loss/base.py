"""What every loss offers: its value a sample, its modes, the tasks that it fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from stabletrain.errors import ConfigurationError

MODES = ("as_is", "smoothed", "plain")
SMOOTHING = 0.1  # label smoothing of the mode `smoothed`

Values = tuple[torch.Tensor, torch.Tensor | None]
Modes = Mapping[str, str]


class Loss(nn.Module):
    """A loss of the group `loss`.

    Called with a model's outputs, of any floating type, and the targets, it returns the loss of each sample, float32
    [B] (float64 for outputs in float64), and their weights [B], or None where all are 1.

    Attributes:
        modes: in words, what `smoothed` and `plain` make of it; a mode that isn't named changes nothing.
        tasks: options of the group `task` that it goes with; None: any.
        ignore_index: label of samples, or of places in them, that don't count; None: every label counts.
    """

    modes: ClassVar[Modes] = {}
    tasks: ClassVar[tuple[str, ...] | None] = None
    ignore_index: int | None = None

    def forward(self, outputs: Any, targets: Any) -> Values:
        """Return the loss and the weight of each sample."""
        raise NotImplementedError

    def simplified(self, mode: str) -> Loss:
        """Return the loss as simple as `mode` asks.

        Args:
            mode: `as_is`; `smoothed` (label smoothing of 0.1, focal gamma of at most 1); `plain` (nothing but the loss
                itself). What the two mean for a loss stand in its `modes`; one without them stays as it is.

        Raises:
            ConfigurationError: for any other mode.
        """
        if mode not in MODES:
            raise ConfigurationError(f"loss_mode is {mode!r}; allowed: {', '.join(MODES)}.")
        return self if mode == "as_is" else self.smoothed() if mode == "smoothed" else self.plain()

    def smoothed(self) -> Loss:
        """Return this loss with label smoothing and nothing steep in it."""
        return self

    def plain(self) -> Loss:
        """Return nothing but the loss itself."""
        return self

    def prediction(self, outputs: Any) -> Any:
        """Return the part of a model's outputs that is compared with the targets."""
        return outputs


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in float32; float64 stays.

    Example:
        >>> wide(torch.ones(1, dtype=torch.bfloat16)).dtype, wide(torch.ones(1, dtype=torch.float64)).dtype
        (torch.float32, torch.float64)
    """
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def aligned(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both in one wide format and one shape; [B, 1] and [B] are the same, and nothing is broadcast.

    Raises:
        ConfigurationError: for shapes that differ in more than dimensions of size 1.

    Example:
        >>> [part.shape for part in aligned(torch.zeros(3, 1), torch.ones(3))]
        [torch.Size([3]), torch.Size([3])]
    """
    if not isinstance(outputs, torch.Tensor) or not isinstance(targets, torch.Tensor):
        raise ConfigurationError(
            f"the loss compares one tensor with another, but was given a {type(outputs).__name__} of outputs and a "
            f"{type(targets).__name__} of targets: let model and data give tensors of one shape."
        )
    outputs = wide(outputs)
    same = [size for size in outputs.shape if size != 1] == [size for size in targets.shape if size != 1]
    if not same or outputs.shape[:1] != targets.shape[:1]:
        raise ConfigurationError(
            f"the model returned {list(outputs.shape)} for targets of the shape {list(targets.shape)}; this loss "
            "compares element with element, so let the model have as many outputs as a sample has targets "
            "(model.num_classes)."
        )
    return outputs.reshape(targets.shape), targets.to(outputs.dtype)


def pair_of(outputs: Any, what: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both tensors of a pair, or both halves of a tensor whose second dimension has the size 2, made wide.

    Args:
        outputs: a tuple or list of two tensors, or a tensor [B, 2, ...].
        what: the pair is, for the message.

    Raises:
        ConfigurationError: for anything else.

    Example:
        >>> pair_of(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "two scores")
        (tensor([1., 3.]), tensor([2., 4.]))
    """
    if isinstance(outputs, torch.Tensor) and outputs.dim() >= 2 and outputs.shape[1] == 2:
        outputs = outputs.unbind(1)
    is_pair = isinstance(outputs, (tuple, list)) and len(outputs) == 2
    if not is_pair or not all(isinstance(part, torch.Tensor) for part in outputs):
        given = list(outputs.shape) if isinstance(outputs, torch.Tensor) else f"a {type(outputs).__name__}"
        raise ConfigurationError(
            f"the model returned {given}; this loss needs {what}: a pair of tensors, or [B, 2, ...]."
        )
    return wide(outputs[0]), wide(outputs[1])
