"""How strongly a weight makes a signal grow."""

from __future__ import annotations

import math

from torch import Tensor


def gain(weight: Tensor) -> float:
    """Return a weight's root mean square times the root of its inputs: 0.5 to 1.5 keeps a signal's size.

    It is 0.58 in torch's linear layers and 1.4 in He's scheme.

    Args:
        weight: shape [outputs, ...], where all but the first dimension are inputs.

    Source:
        He et al. 2015, "Delving Deep into Rectifiers".

    Example:
        >>> import torch
        >>> round(gain(torch.full((3, 4), 0.5)), 6)
        1.0
    """
    return float(weight.detach().double().square().mean().sqrt()) * math.sqrt(weight[0].numel())
