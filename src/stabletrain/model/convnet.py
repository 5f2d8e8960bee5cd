"""A small convolutional network for images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from stabletrain.errors import ConfigurationError


class ConvNet(nn.Module):
    """Blocks of 3x3 convolution, BatchNorm and ReLU, then two linear layers with BatchNorm and dropout.

    Each block but the last is followed by a 2x2 max pooling, which halves height and width.

    Args:
        in_channels: channels of the images.
        num_classes: number of logits.
        image_size: height and width of the images, pixels.
        channels: output channels of each block.
        hidden: width of the hidden linear layer.
        dropout: share of values set to 0 before each linear layer, from 0 to below 1.

    Raises:
        ConfigurationError: for images too small for so many blocks.

    Example:
        >>> ConvNet(in_channels=3, num_classes=5, image_size=[12, 16])(torch.zeros(2, 3, 12, 16)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        image_size: Sequence[int],
        channels: Sequence[int] = (32, 64),
        hidden: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        height, width = image_size
        halvings = len(channels) - 1
        if halvings < 0 or min(height, width) >> halvings < 1:
            raise ConfigurationError(
                f"images of {height} x {width} can't be halved {halvings} times, once after each of channels="
                f"{list(channels)} but the last: give at least 1 channel number, and at most "
                f"{min(height, width).bit_length()}."
            )
        layers: list[nn.Module] = []
        for place, (before, after) in enumerate(zip((in_channels, *channels), channels, strict=False)):
            layers += [nn.MaxPool2d(2)] if place > 0 else []
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        flat = channels[-1] * (height >> halvings) * (width >> halvings)
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(flat, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits [B, num_classes] of images [B, in_channels, height, width]."""
        logits: torch.Tensor = self.classifier(self.features(images))
        return logits
