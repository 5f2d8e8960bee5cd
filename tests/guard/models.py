"""Small models, each with something that a forward pass changes."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

FEATURES, WIDTH, OUTPUTS, WORDS = 6, 8, 3, 5


class Network(nn.Module):
    """Linear, a middle part, linear; with an embedding where `embedding` is given."""

    def __init__(self, middle: nn.Module, embedding: nn.Embedding | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, WIDTH)
        self.middle = middle
        self.last = nn.Linear(WIDTH, OUTPUTS)
        self.embedding = embedding

    def forward(self, inputs: Tensor, words: Tensor) -> Tensor:
        hidden = self.first(inputs)
        if self.embedding is not None:
            hidden = hidden + self.embedding(words)
        return self.last(self.middle(hidden))


class OwnBuffer(nn.Module):
    """A user's own running mean, kept in one of many ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.kept: Tensor | None
        if way != "registered late":
            self.register_buffer("kept", None if way == "None, then set" else torch.zeros(WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        mean = torch.tanh(hidden.detach().float().mean(0)).nan_to_num()
        if self.way == "registered late" and not hasattr(self, "kept"):
            self.register_buffer("kept", torch.zeros(WIDTH))
        before = self.kept if self.kept is not None else torch.zeros(WIDTH)
        now = 0.5 * before + 0.5 * mean
        if self.way == "through .data":
            assert self.kept is not None
            self.kept.data = now
        elif self.way == "resized":
            assert self.kept is not None
            self.kept.data = torch.cat([before, now[:1]]) if len(before) < 2 * WIDTH else now
        elif self.way in ("reassigned", "None, then set"):
            self.kept = now
        else:
            assert self.kept is not None
            self.kept.copy_(now)
        return hidden + now[:WIDTH].to(hidden.dtype)

    def extra_repr(self) -> str:
        return self.way


class Resized(OwnBuffer):
    """A buffer that grows, as a cache does."""

    def forward(self, hidden: Tensor) -> Tensor:
        assert self.kept is not None
        self.kept.data = torch.cat([self.kept, hidden.detach().float().mean().nan_to_num().reshape(1)])
        return hidden


class Counter:
    """A state object of the user's."""

    def __init__(self) -> None:
        self.forwards = 0

    def state_dict(self) -> dict[str, Any]:
        return {"forwards": self.forwards}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.forwards = state["forwards"]


class Outside(nn.Module):
    """State that no module holds: a queue, a generator, a counter; for `extra`."""

    def __init__(self) -> None:
        super().__init__()
        self.state: list[Any] = [torch.zeros(WIDTH), torch.Generator().manual_seed(5), Counter(), nn.BatchNorm1d(WIDTH)]

    def forward(self, hidden: Tensor) -> Tensor:
        queue, generator, counter, norm = self.state
        norm(hidden.detach().float())
        queue.mul_(0.5).add_(torch.tanh(hidden.detach().float().mean(0)).nan_to_num())
        counter.forwards += 1
        return hidden + queue.to(hidden.dtype) + torch.randn(WIDTH, generator=generator).to(hidden.dtype)


class DataChange(nn.Module):
    """Changes its parameter in each forward, where autograd doesn't see it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        self.scale.data.mul_(0.99)
        return hidden * self.scale


def old_spectral_norm() -> nn.Module:
    """The hook that keeps the vectors as buffers of the layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH))


MIDDLES = {
    "batch norm": lambda: nn.Sequential(nn.BatchNorm1d(WIDTH), nn.ReLU()),
    "batch norm without momentum": lambda: nn.Sequential(nn.BatchNorm1d(WIDTH, momentum=None), nn.ReLU()),
    "dropout": lambda: nn.Dropout(0.5),
    "batch norm and dropout": lambda: nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Dropout(0.5)),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "old spectral norm": old_spectral_norm,
    "new spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "parameter changed through .data": DataChange,
    "outside state": Outside,
}
EMBEDDINGS = {
    "embedding with max_norm": lambda: nn.Embedding(WORDS, WIDTH, max_norm=0.5),
    "sparse embedding": lambda: nn.Embedding(WORDS, WIDTH, sparse=True),
}
OWN_BUFFERS = ("in place", "through .data", "reassigned", "None, then set", "registered late", "resized")
MODELS = (*MIDDLES, *EMBEDDINGS, *(f"own buffer {way}" for way in OWN_BUFFERS))


def build(name: str) -> Network:
    """Build a model of `MODELS`, the same each time."""
    torch.manual_seed(3)
    if name in EMBEDDINGS:
        return Network(nn.ReLU(), EMBEDDINGS[name]())
    if name in MIDDLES:
        return Network(MIDDLES[name]())
    way = name.removeprefix("own buffer ")
    return Network(Resized(way) if way == "resized" else OwnBuffer(way))


def outside_state(model: nn.Module) -> list[Any]:
    """Return what `extra` must name for a model."""
    return [item for module in model.modules() if isinstance(module, Outside) for item in module.state]
