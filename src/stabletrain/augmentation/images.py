"""Augmentations of images."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from stabletrain.augmentation.features import described
from stabletrain.checks import number, whole
from stabletrain.errors import ConfigurationError


class RandomCropFlip:
    """Move each image by up to `padding` pixels in each direction, and mirror some of them left to right.

    As cutting the image out again at a random place after a margin of 0 was put around it. Each image has its own place
    and its own mirror.

    Args:
        padding: width of the margin, pixels; 0 or more.
        flip: probability of the mirror, from 0 to 1; 0 for what has a left and a right, such as letters and digits.

    Raises:
        ConfigurationError: for a number outside its range.

    References:
        K. He et al.: Deep Residual Learning for Image Recognition, 2016 (a margin of 4 for 32 x 32 pixels).

    Example:
        >>> images, _ = RandomCropFlip(padding=2)((torch.rand(3, 1, 8, 8), None))
        >>> images.shape
        torch.Size([3, 1, 8, 8])
    """

    def __init__(self, padding: int = 4, flip: float = 0.5) -> None:
        self.padding = whole("padding of random_crop_flip", padding, 0)
        self.flip = number("flip of random_crop_flip", flip, most=1.0)

    def __call__(self, data: tuple[Any, Any]) -> tuple[Any, Any]:
        """Return the data with moved and mirrored images.

        Args:
            data: the pair (inputs, targets); inputs [B, C, H, W] of any type.

        Raises:
            ConfigurationError: for inputs that are no such images.
        """
        images, targets = data
        check_images(images, "random_crop_flip")
        count, channels, height, width = images.shape
        padded = F.pad(images, [self.padding] * 4)
        device = images.device
        top, left = torch.randint(2 * self.padding + 1, (2, count, 1), device=device)
        rows = top + torch.arange(height, device=device)
        columns = left + torch.arange(width, device=device)
        mirrored = torch.rand(count, 1, device=device) < self.flip
        columns = torch.where(mirrored, columns.flip(1), columns)
        every = torch.arange(count, device=device)[:, None, None, None]
        channel = torch.arange(channels, device=device)[:, None, None]
        return padded[every, channel, rows[:, None, :, None], columns[:, None, None, :]], targets


def check_images(images: Any, option: str) -> None:
    """Raise ConfigurationError unless `images` is a tensor [B, C, H, W]; `option` is who asks."""
    if not isinstance(images, torch.Tensor) or images.dim() != 4:
        raise ConfigurationError(
            f"augmentation={option} was given {described(images)} as inputs; images of one size are needed, a tensor "
            "[B, C, H, W]. Choose augmentation=noise or augmentation=none."
        )
