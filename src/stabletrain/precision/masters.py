"""Parameters in a reduced format for the forward and backward passes; the model itself is their float32 masters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Their parameters are few, and reduced they would round what they normalise.
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@contextmanager
def in_masters_place(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let parameters be rounded copies of themselves inside the block; gradients that arise there have that format.

    After the block the parameters are the float32 masters again, bit for bit, and the gradients are widened to
    float32. So outside of it there is nothing but the masters: whoever steps, averages, judges, saves, restores or
    exports the model does it with them, and an update too small for the reduced format adds up in them.

    Float32 stay the parameters of normalisations (their statistics are buffers, and buffers aren't touched) and those
    that a forward changes, as `Embedding(max_norm=...)` does.

    Args:
        model: with float32 parameters; those of another format are left as they are.
        dtype: the reduced format.

    Source:
        Micikevicius et al. 2018, "Mixed Precision Training", section 3.1: a master copy of the weights.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> with in_masters_place(layer, torch.bfloat16):
        ...     layer(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
        ...     layer.weight.dtype, layer.weight.grad.dtype
        (torch.bfloat16, torch.bfloat16)
        >>> layer.weight.dtype, layer.weight.grad.dtype
        (torch.float32, torch.float32)
    """
    parameters = _lowered(model)
    masters = [parameter.data for parameter in parameters]
    for parameter, master in zip(parameters, masters, strict=True):
        _put(parameter, master.to(dtype))
    versions = [parameter._version for parameter in parameters]
    try:
        yield
    finally:
        for parameter, master, version in zip(parameters, masters, versions, strict=True):
            changed = parameter.detach().clone() if parameter._version != version else None
            _put(parameter, master)
            if changed is not None:  # by a forward: what it wrote is what it meant
                with torch.no_grad():
                    parameter.copy_(changed)


def _put(parameter: nn.Parameter, data: Tensor) -> None:
    """Exchange a parameter's data, and bring a gradient that it has to the same format."""
    gradient, parameter.grad = parameter.grad, None
    parameter.data = data
    if gradient is not None:
        parameter.grad = gradient.to(data.dtype)


def _lowered(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that may be reduced, each once."""
    kept = {
        parameter
        for module in model.modules()
        if isinstance(module, _NORMS) or getattr(module, "max_norm", None) is not None
        for parameter in module.parameters(recurse=False)
    }
    return [p for p in model.parameters() if p.dtype == torch.float32 and p not in kept]
