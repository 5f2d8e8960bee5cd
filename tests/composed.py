"""What several tests need: composing a config without running anything, and a data set of somebody's own."""

from __future__ import annotations

from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch.utils.data import Dataset

from stabletrain.config import conf_folder, settings


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        return compose("config", overrides=list(overrides))


def checked(*overrides: str) -> dict[str, Any]:
    return settings(composed(*overrides))


class Points(Dataset[tuple[torch.Tensor, int]]):
    """A map-style data set as somebody would write it: two clouds of points, without any of our classes."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = [index % 2 for index in range(count)]
        self.points = torch.randn(count, 4, generator=generator) + torch.tensor(self.labels).float()[:, None]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.points[index], self.labels[index]
