"""Augmentations that mix each sample with another one of the microbatch, targets included."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from stabletrain.augmentation.features import described
from stabletrain.augmentation.images import check_images
from stabletrain.checks import whole
from stabletrain.errors import ConfigurationError


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
        self.num_classes = whole("num_classes of mixup", num_classes, 2)
        self.proportion = _beta("mixup", alpha)

    def __call__(self, data: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mixed inputs, and the targets as mixed probabilities, float32 [B, C].

        Args:
            data: inputs [B, ...] of a floating type; targets int64 [B] or probabilities [B, C].

        Raises:
            ConfigurationError: for inputs that can't be mixed, such as lists of sequences.
        """
        inputs, targets = data
        if not isinstance(inputs, torch.Tensor) or not inputs.is_floating_point():
            raise ConfigurationError(
                f"mixup was given {described(inputs)} as inputs; only a floating tensor [B, ...], with "
                "samples of one shape, can be mixed. Choose augmentation=noise or augmentation=none."
            )
        # Drawn on the CPU: no wait for the device.
        share = float(self.proportion.sample())
        partner = torch.randperm(len(targets), device=inputs.device)
        targets = _probabilities(targets, self.num_classes)
        return torch.lerp(inputs[partner], inputs, share), torch.lerp(targets[partner], targets, share)


class CutMix:
    """Replace a box of each image by that of another one; the targets are mixed by area.

    One box for the microbatch: its share of the area is 1 - lambda with lambda from Beta(alpha, alpha), its centre is
    uniform, and what reaches beyond the image is cut off. The targets follow the area that was really replaced.

    Args:
        alpha: both parameters of the beta distribution, above 0; 1 = each area is as likely.
        num_classes: number of classes; class numbers become probabilities.

    Raises:
        ConfigurationError: for an `alpha` that is not above 0, and less than 2 classes.

    References:
        S. Yun et al.: CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features, 2019.

    Example:
        >>> inputs, targets = CutMix(1.0, 3)((torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])))
        >>> inputs.shape, targets.shape, bool(((targets.sum(1) - 1).abs() < 1e-6).all())
        (torch.Size([4, 1, 8, 8]), torch.Size([4, 3]), True)
    """

    def __init__(self, alpha: float, num_classes: int) -> None:
        self.proportion = _beta("cutmix", alpha)
        self.num_classes = whole("num_classes of cutmix", num_classes, 2)

    def __call__(self, data: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images with a box of another one, and the targets as mixed probabilities, float32 [B, C].

        Args:
            data: inputs [B, channels, H, W]; targets int64 [B] or probabilities [B, C].

        Raises:
            ConfigurationError: for inputs that are no such images.
        """
        images, targets = data
        check_images(images, "cutmix")
        height, width = images.shape[2:]
        # Drawn on the CPU: no wait for the device.
        side = math.sqrt(1.0 - float(self.proportion.sample()))
        across, down = torch.rand(2).tolist()
        (top, bottom), (left, right) = _cut(down, side, height), _cut(across, side, width)
        partner = torch.randperm(len(targets), device=images.device)
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
        share = (bottom - top) * (right - left) / (height * width)
        targets = _probabilities(targets, self.num_classes)
        return mixed, torch.lerp(targets, targets[partner], share)


def _beta(what: str, alpha: float) -> torch.distributions.Beta:
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise ConfigurationError(f"alpha of {what} is {alpha!r}; a finite number above 0 is allowed.")
    return torch.distributions.Beta(float(alpha), float(alpha))


def _probabilities(targets: torch.Tensor, num_classes: int) -> torch.Tensor:
    return targets if targets.is_floating_point() else F.one_hot(targets, num_classes).float()


def _cut(centre: float, side: float, length: int) -> tuple[int, int]:
    """Return where a span begins and ends, pixels, that has a share `side` of `length` around a share `centre`."""
    middle, half = int(centre * length), round(side * length) / 2
    return max(0, math.ceil(middle - half)), min(length, math.ceil(middle + half))
