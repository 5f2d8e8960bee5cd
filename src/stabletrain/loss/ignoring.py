"""The one rule for what doesn't count: loss 0 and weight 0 by selection, and no gradient.

Nothing is multiplied by 0, since 0 * NaN is NaN. What is ignored is replaced before anything is computed of it, so not
even its NaN can come back through a gradient. A batch in which everything is ignored, and an empty batch, have a weight
of 0; the trainer divides by 1 then, so their loss is 0, with a gradient of 0.
"""

from __future__ import annotations

import torch

from stabletrain.errors import ConfigurationError


def checked_index(ignore_index: int | None) -> int | None:
    """Return the label to ignore.

    Raises:
        ConfigurationError: it is no whole number.
    """
    if ignore_index is not None and (isinstance(ignore_index, bool) or not isinstance(ignore_index, int)):
        raise ConfigurationError(
            f"ignore_index is {ignore_index!r}; a whole number is allowed, the label that doesn't count, or null."
        )
    return ignore_index


def apart(
    outputs: torch.Tensor, targets: torch.Tensor, ignore_index: int | None, *, classes: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Replace what is ignored by zeros.

    Args:
        outputs: [B, C, ...] with classes in the second dimension, or the targets' shape.
        targets: labels [B, ...]; probabilities of classes, where nothing is ignored.
        ignore_index: the label to ignore, or None.
        classes: whether outputs have a dimension of classes that the targets lack.

    Returns:
        Outputs, targets, and which targets were ignored, bool [B, ...]; None where nothing can be.

    Example:
        >>> apart(torch.tensor([[1.0, 2.0], [3.0, float("nan")]]), torch.tensor([1, -1]), ignore_index=-1)
        (tensor([[1., 2.],
                [0., 0.]]), tensor([1, 0]), tensor([False,  True]))
    """
    if ignore_index is None or (classes and targets.is_floating_point()):
        return outputs, targets, None
    ignored = targets == ignore_index
    hidden = ignored.unsqueeze(1) if classes else ignored
    return torch.where(hidden, 0.0, outputs), torch.where(ignored, 0, targets), ignored


def by_sample(
    values: torch.Tensor, weights: torch.Tensor | None = None, ignored: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the loss and the weight of each sample, from those of its places (pixels, time steps, labels).

    A sample's loss is the weighted mean over its places that count; its weight is the mean of its places' weights,
    where an ignored place has the weight 0. So the weighted mean over samples of one size is that over all places.

    Args:
        values: [B, ...].
        weights: of the values, in the same shape; None: all 1.
        ignored: which don't count, bool in the same shape; None: none.

    Example:
        >>> by_sample(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), ignored=torch.tensor([[False, True], [True, True]]))
        (tensor([1., 0.]), tensor([0.5000, 0.0000]))
    """
    if weights is None and ignored is None:
        return (values if values.dim() == 1 else values.flatten(1).sum(1) / _places(values)), None
    weights = torch.ones_like(values) if weights is None else weights
    if ignored is not None:
        values, weights = torch.where(ignored, 0.0, values), torch.where(ignored, 0.0, weights)
    if values.dim() == 1:
        return values, weights
    weight = weights.flatten(1).sum(1)
    per_sample = (values * weights).flatten(1).sum(1) / torch.where(weight > 0, weight, 1.0)
    return per_sample, weight / _places(values)


def _places(values: torch.Tensor) -> int:
    return max(1, values[:1].numel()) if len(values) > 0 else 1
