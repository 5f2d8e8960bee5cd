"""Several augmentations, one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch  # noqa: F401 (for the example)

from stabletrain.errors import ConfigurationError


class Composition:
    """Apply augmentations in their order, each to what the one before returned.

    Those that mix samples (mixup, cutmix) turn class numbers into probabilities, which the ones after them take.

    Args:
        parts: augmentations; none = the data as it is.

    Raises:
        ConfigurationError: for a part that can't be called.

    Example:
        >>> from stabletrain.augmentation import FeatureDropout, Mixup
        >>> both = Composition([FeatureDropout(0.2), Mixup(0.4, 2)])
        >>> inputs, targets = both((torch.rand(4, 3), torch.tensor([0, 1, 1, 0])))
        >>> targets.shape
        torch.Size([4, 2])
    """

    def __init__(self, parts: Sequence[Callable[[Any], Any]]) -> None:
        for position, part in enumerate(parts):
            if not callable(part):
                raise ConfigurationError(
                    f"augmentation.parts[{position}] is {part!r}; an augmentation is needed, such as noise, "
                    "{noise: {std: 0.1}}, or a dictionary with a _target_."
                )
        self.parts = list(parts)

    def __call__(self, data: Any) -> Any:
        """Return what the last part returned."""
        for part in self.parts:
            data = part(data)
        return data
