"""Pairs of a sample and one of its nearest neighbours: the two views that clustering of embeddings compares."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from stabletrain.data.arrays import Integers
from stabletrain.data.table import Floats
from stabletrain.errors import ConfigurationError
from stabletrain.randomness import uniform


class Pairs(Dataset[Any]):
    """Samples as pairs of views [2, D]: an embedding, and that of one of its neighbours.

    A sample is the pair of views alone, or that with its label.

    Args:
        embeddings: float32 [N, D].
        pool: where neighbours are looked up, float32 [M, D].
        neighbours: positions in the pool, the nearest one first, int64 [N, k].
        targets: labels, int64 [N]; None = there are none.
        random: True: one of the neighbours is drawn whenever a sample is read by `gather`; False: it is the nearest.

    Example:
        >>> points = torch.tensor([[0.0], [1.0], [5.0]])
        >>> Pairs(points, points, torch.tensor([[1], [0], [1]])).gather(torch.tensor([2]))
        tensor([[[5.],
                 [1.]]])
    """

    def __init__(
        self,
        embeddings: torch.Tensor,
        pool: torch.Tensor,
        neighbours: torch.Tensor,
        targets: torch.Tensor | None = None,
        *,
        random: bool = False,
    ) -> None:
        self.embeddings = embeddings
        self.pool = pool
        self.neighbours = neighbours
        self.targets = targets
        self.random = random

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, index: int) -> Any:
        views = self._views(torch.tensor([index]), self.neighbours[index, :1])[0]
        return views if self.targets is None else (views, self.targets[index])

    def gather(self, indices: torch.Tensor, *, seed: int | None = None) -> Any:
        """Return the views of these samples, float32 [n, 2, D], alone or with their labels, int64 [n].

        Args:
            indices: positions, int64 [n], on the CPU.
            seed: which neighbour is drawn is a function of this and the sample's index; None: the nearest one.
        """
        chosen = torch.zeros(len(indices), dtype=torch.int64)
        if seed is not None:
            chosen = (uniform(seed, indices, 1)[:, 0] * self.neighbours.shape[1]).long()
        views = self._views(indices, self.neighbours[indices, chosen])
        return views if self.targets is None else (views, self.targets[indices])

    def _views(self, indices: torch.Tensor, neighbours: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.embeddings[indices], self.pool[neighbours]], 1)


def nearest(pool: Floats, count: int, queries: Floats | None = None) -> Integers:
    """Return the positions of the nearest points of a pool, by the cosine of the angle.

    Args:
        pool: float64 [M, D].
        count: how many, the nearest one first.
        queries: float64 [N, D]; None = the pool's own points, none of which is its own neighbour.

    Returns:
        int64 [N, count].

    Raises:
        ConfigurationError: for a count that is no whole number from 1, or more than there are.

    Example:
        >>> nearest(np.array([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0]]), 1).tolist()
        [[1], [0], [1]]
    """
    from sklearn.neighbors import NearestNeighbors  # type: ignore[import-untyped, unused-ignore]

    most = len(pool) - (queries is None)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= most:
        raise ConfigurationError(
            f"neighbours is {count!r}; a whole number from 1 to {most} is allowed, as the training part has "
            f"{len(pool)} samples. About a third of the smallest cluster's size is a good choice."
        )
    found = NearestNeighbors(n_neighbors=count, metric="cosine").fit(pool).kneighbors(queries, return_distance=False)
    positions: Integers = np.asarray(found, dtype=np.int64)
    return positions
