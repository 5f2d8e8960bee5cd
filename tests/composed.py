"""What several tests need: composing a config without running anything, and a data set of somebody's own."""

from __future__ import annotations

from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import nn
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


class Samples(Dataset[tuple[Any, Any]]):
    """A data set in memory of somebody's own: 60 samples of each kind that a loss may need."""

    def __init__(self, kind: str, count: int = 60) -> None:
        generator = torch.Generator().manual_seed(0)
        label = torch.arange(count) % 3
        points = torch.randn(count, 4, generator=generator) + label[:, None]
        self.inputs, self.answers = points, points.sum(1)
        if kind == "places":
            self.inputs = torch.randn(count, 1, 6, 6, generator=generator)
            self.answers = (self.inputs[:, 0] > 0).long()
        elif kind == "views":
            self.inputs = torch.stack([points, points + 0.1 * torch.randn(count, 4, generator=generator)], 1)
            self.answers = label
        elif kind == "steps":
            self.inputs = torch.randn(count, 8, 4, generator=generator)
            self.answers = torch.stack([1 + label, 1 + (label + 1) % 2, torch.full_like(label, -1)], 1)

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.inputs[index], self.answers[index]


class Pixels(nn.Module):
    """A class for each pixel."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs)


class EachStep(nn.Module):
    """Four numbers for each step, or for each view: logits, or an embedding."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs)


class Clusters(nn.Module):
    """Two heads of three clusters, and a teacher that follows them slowly: logits [B, V, 2, 3] of each."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(4, 6), nn.Linear(4, 6).requires_grad_(False)

    def forward(self, views: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.training:
            with torch.no_grad():
                self.teacher.weight.lerp_(self.student.weight, 0.1)
        return {
            "student": self.student(views).unflatten(2, (2, 3)),
            "teacher": self.teacher(views).unflatten(2, (2, 3)),
        }
