"""Augmentations: callables from a microbatch's data to other data of the same kind.

They draw from torch's default generators, which the trainer seeds by position, so that a step can be run again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from stabletrain.errors import ConfigurationError
from stabletrain.tree import map_tensors


class Unchanged:
    """The data as it is.

    Example:
        >>> Unchanged()(("inputs", "targets"))
        ('inputs', 'targets')
    """

    def __call__(self, data: Any) -> Any:
        """Return what was given."""
        return data


class Noise:
    """Add normal noise to the inputs.

    Args:
        std: standard deviation of the noise, in the unit of the inputs; 0 or more.

    Raises:
        ConfigurationError: for a negative or non-finite `std`.

    Example:
        >>> inputs, targets = Noise(0.1)((torch.zeros(2, 3), torch.tensor([0, 1])))
        >>> inputs.shape, bool((inputs != 0).all()), targets
        (torch.Size([2, 3]), True, tensor([0, 1]))
    """

    def __init__(self, std: float) -> None:
        if isinstance(std, bool) or not isinstance(std, (int, float)) or not 0 <= std < math.inf:
            raise ConfigurationError(f"std of the noise is {std!r}; a finite number from 0 is allowed.")
        self.std = float(std)

    def __call__(self, data: tuple[Any, Any]) -> tuple[Any, Any]:
        """Return the data with noise on each floating tensor of the inputs (others are left as they are).

        Args:
            data: the pair (inputs, targets).
        """
        inputs, targets = data
        return map_tensors(self._disturbed, inputs), targets

    def _disturbed(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + self.std * torch.randn_like(tensor) if tensor.is_floating_point() else tensor


class Mixup:
    """Mix each sample with another one of the microbatch, inputs and targets in the same proportion.

    One proportion is drawn for the microbatch from Beta(alpha, alpha).

    Args:
        alpha: both parameters of the beta distribution, above 0; small = mostly one of the two samples.
        num_classes: number of classes; class numbers become probabilities.

    Raises:
        ConfigurationError: for an `alpha` that is not above 0, and less than 2 classes.

    References:
        H. Zhang et al.: mixup: Beyond Empirical Risk Minimization, 2018.

    Example:
        >>> inputs, targets = Mixup(0.2, 3)((torch.rand(4, 2), torch.tensor([0, 1, 2, 0])))
        >>> inputs.shape, targets.shape, bool(((targets.sum(1) - 1).abs() < 1e-6).all())
        (torch.Size([4, 2]), torch.Size([4, 3]), True)
    """

    def __init__(self, alpha: float, num_classes: int) -> None:
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
            raise ConfigurationError(f"alpha of mixup is {alpha!r}; a finite number above 0 is allowed.")
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
            raise ConfigurationError(f"num_classes of mixup is {num_classes!r}; a whole number from 2 is allowed.")
        self.num_classes = num_classes
        self.proportion = torch.distributions.Beta(float(alpha), float(alpha))

    def __call__(self, data: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mixed inputs, and the targets as mixed probabilities, float32 [B, C].

        Args:
            data: inputs [B, ...] of a floating type; targets int64 [B] or probabilities [B, C].

        Raises:
            ConfigurationError: for inputs that can't be mixed, such as lists of sequences.
        """
        inputs, targets = data
        if not isinstance(inputs, torch.Tensor) or not inputs.is_floating_point():
            what = f"a {inputs.dtype} tensor" if isinstance(inputs, torch.Tensor) else f"a {type(inputs).__name__}"
            raise ConfigurationError(
                f"mixup was given {what} of inputs; only a floating tensor [B, ...], with samples of one shape, can be "
                "mixed. Choose augmentation=noise or augmentation=none."
            )
        # Drawn on the CPU: no wait for the device.
        share = float(self.proportion.sample())
        partner = torch.randperm(len(targets), device=inputs.device)
        if not targets.is_floating_point():
            targets = F.one_hot(targets, self.num_classes).float()
        return torch.lerp(inputs[partner], inputs, share), torch.lerp(targets[partner], targets, share)
