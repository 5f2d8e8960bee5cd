"""What the guard found, in words: which parameter, which buffer, which microbatch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from stabletrain.finite import first_nonfinite


def named_parameters(models: Sequence[nn.Module]) -> list[tuple[str, Tensor]]:
    """Return the parameters of all models by name; of several models, each name begins with the model's number.

    Example:
        >>> [name for name, _ in named_parameters([nn.Linear(1, 1), nn.Linear(1, 1, bias=False)])]
        ['0.weight', '0.bias', '1.weight']
    """
    many = len(models) > 1
    return [
        (f"{index}.{name}" if many else name, parameter)
        for index, model in enumerate(models)
        for name, parameter in model.named_parameters()
    ]


def buffer_name(models: Sequence[nn.Module], tensor: Tensor) -> str:
    """Return the name of a buffer.

    Example:
        >>> layer = nn.BatchNorm1d(2)
        >>> buffer_name([layer], layer.running_var)
        'running_var'
    """
    names = [name for model in models for name, buffer in model.named_buffers() if buffer is tensor]
    return names[0] if names else "of an extra module"


def about_loss(models: Sequence[nn.Module], loss: Tensor | Sequence[Tensor], value: float) -> str:
    """Say what is wrong with a loss that isn't finite: the parameters before it, or one of the microbatches.

    Args:
        models: in the state in which the loss was computed.
        loss: one, or one for each microbatch.
        value: their mean.

    Example:
        >>> import torch
        >>> about_loss([nn.Linear(1, 1)], [torch.tensor(1.0), torch.tensor(float("nan"))], float("nan"))
        'the loss is nan, in microbatch 1 of 2 (counted from 0)'
    """
    found = first_nonfinite(named_parameters(models))
    if found is not None:
        return f"the loss is {value}, and before this step parameter {found}"
    if isinstance(loss, Tensor) or len(loss) == 1:
        return f"the loss is {value}"
    bad = [index for index, item in enumerate(loss) if not math.isfinite(item.item())]
    return f"the loss is {value}, in microbatch {', '.join(map(str, bad))} of {len(loss)} (counted from 0)"


def about_gradients(models: Sequence[nn.Module], norm: float) -> str:
    """Say what is wrong with gradients whose norm isn't finite or whose square isn't.

    Example:
        >>> about_gradients([nn.Linear(1, 1)], 1e30)
        'the gradient norm is 1e+30, whose square overflows float32; clipping=norm would allow it'
    """
    found = first_nonfinite((name, p.grad) for name, p in named_parameters(models) if p.grad is not None)
    if found is not None:
        return f"gradient of {found}"
    return f"the gradient norm is {norm:.3g}, whose square overflows float32; clipping=norm would allow it"
