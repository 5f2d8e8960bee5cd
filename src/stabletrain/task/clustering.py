"""Clusters that several heads find without labels, judged by how well they agree with labels where there are some."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from stabletrain.checks import whole
from stabletrain.errors import ConfigurationError
from stabletrain.task.base import AdditiveTask


class Clustering(AdditiveTask):
    """Clusters by several heads; reports the loss, and how one head's clusters agree with the labels.

    That head is the one with the lowest loss on the samples that are measured, which needs no label. A sample belongs
    to the cluster that the head's teacher finds most probable for its first view. All follows from each head's losses
    and from how often each cluster met each class, which add up over processes. A head that isn't finite isn't chosen.

    Reported besides `loss`: `evenness`, the entropy of the clusters' sizes over its largest value (1: all of one size),
    `clusters`, how many of them hold a sample, and `heads_left_out`; with labels `nmi`, `ari` and
    `hungarian_accuracy`, see `agreement`. Labels are looked at nowhere else.

    Args:
        loss: with `heads`, `num_classes`, `per_head` and `assignments`, as `stabletrain.loss.TEMI` has them.
        classes: number of classes among the labels, K; 0 = there are none.

    Raises:
        ConfigurationError: for another loss, and for less than 0 classes.

    Example:
        >>> from stabletrain.data import ArrayDataset, OrderedLoader
        >>> from stabletrain.loss import TEMI
        >>> views = torch.tensor([[[9.0, 0.0]] * 2, [[9.0, 0.0]] * 2, [[0.0, 9.0]] * 2])
        >>> class Both(nn.Module):
        ...     def forward(self, views):
        ...         return views, views
        >>> loader = OrderedLoader(ArrayDataset(views, torch.tensor([1, 1, 0])), batch_size=2)
        >>> Clustering(TEMI(2), classes=2).evaluate(Both(), loader)["hungarian_accuracy"]
        1.0
    """

    name = "clustering"

    def __init__(self, loss: nn.Module, classes: int = 0) -> None:
        super().__init__(loss)
        needed = ("heads", "num_classes", "per_head", "assignments")
        if not all(hasattr(loss, part) for part in needed):
            raise ConfigurationError(
                f"task=clustering was given the loss {type(loss).__name__}, which has no {', '.join(needed)}; choose "
                "loss=temi or loss=temi_heads, or task=supervised."
            )
        whole("classes of the task", classes, 0)
        self.heads, self.clusters, self.classes = int(loss.heads), int(loss.num_classes), classes  # type: ignore[arg-type]
        self.counts = self.heads * (1 + self.clusters * (classes + 1))

    def _counted(self, outputs: Any, targets: Any) -> Sequence[torch.Tensor]:
        losses: torch.Tensor = self.loss.per_head(outputs)  # type: ignore[operator]
        assigned: torch.Tensor = self.loss.assignments(outputs)  # type: ignore[operator]
        count, none = len(assigned), self.classes  # the last column is for samples without a label
        labels = torch.full((count,), none, device=assigned.device) if targets is None else targets
        labels = torch.where((labels >= 0) & (labels < none), labels, none)
        heads = torch.arange(self.heads, device=assigned.device)
        places = (heads * self.clusters + assigned) * (none + 1) + labels[:, None]
        table = torch.zeros(self.heads * self.clusters * (none + 1), dtype=torch.float64, device=assigned.device)
        return losses.sum(0), table.index_add_(0, places.flatten(), torch.ones_like(places.flatten()).double())

    def _metrics(self, counted: Sequence[float], samples: float) -> dict[str, float]:
        losses = torch.tensor(counted[: self.heads], dtype=torch.float64)
        tables = torch.tensor(counted[self.heads :], dtype=torch.float64).view(self.heads, self.clusters, -1)
        finite = torch.isfinite(losses)
        table = tables[int(torch.where(finite, losses, math.inf).argmin())]
        sizes = table.sum(1)
        found = {
            "evenness": _entropy(sizes) / math.log(self.clusters),
            "clusters": float((sizes > 0).sum()),
            "heads_left_out": float((~finite).sum()),
        }
        return {**agreement(table[:, :-1]), **found} if self.classes > 0 else found


def agreement(table: torch.Tensor) -> dict[str, float]:
    """Return how well clusters agree with classes, whatever their numbers.

    Args:
        table: how many samples of each cluster (row) are of each class (column), [C, K].

    Returns:
        `nmi`, mutual information over the mean of both entropies; `ari`, the share of pairs of samples on which both
        agree, adjusted so that chance has 0; `hungarian_accuracy`, the share of samples that are right once each
        cluster has been given a class of its own in the best way. All 0 where nothing was counted.

    References:
        A. Strehl, J. Ghosh: Cluster Ensembles, 2002; L. Hubert, P. Arabie: Comparing Partitions, 1985; H. W. Kuhn: The
        Hungarian method for the assignment problem, 1955. The first two equal scikit-learn's
        `normalized_mutual_info_score` and `adjusted_rand_score`.

    Example:
        >>> agreement(torch.tensor([[0.0, 4.0], [3.0, 1.0]]))["hungarian_accuracy"]
        0.875
    """
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped, unused-ignore]

    table = table.double()
    whole = float(table.sum())
    if whole == 0:
        return {"nmi": 0.0, "ari": 0.0, "hungarian_accuracy": 0.0}
    rows, columns = table.sum(1), table.sum(0)
    of_rows, of_columns = _entropy(rows), _entropy(columns)
    shared = of_rows + of_columns - _entropy(table.flatten())
    nmi = 1.0 if of_rows == of_columns == 0 else max(0.0, shared) / (0.5 * (of_rows + of_columns))
    together, in_rows, in_columns = (float((part * (part - 1) / 2).sum()) for part in (table, rows, columns))
    chance = in_rows * in_columns / max(1.0, whole * (whole - 1) / 2)
    most = 0.5 * (in_rows + in_columns)
    cluster, kind = linear_sum_assignment(-table.cpu().numpy())
    return {
        "nmi": nmi,
        "ari": 1.0 if most == chance else (together - chance) / (most - chance),
        "hungarian_accuracy": float(table[cluster, kind].sum()) / whole,
    }


def _entropy(counts: torch.Tensor) -> float:
    """Return the entropy, in nats, of a distribution given by counts; 0 of nothing."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum()) + 0.0
