"""One item out of many that comes next, judged by the place that it gets among all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from stabletrain.checks import whole
from stabletrain.errors import ConfigurationError
from stabletrain.task.base import counting, share
from stabletrain.task.classification import Classification


class NextItem(Classification):
    """The next item of each history; reports loss, HitRate@k and MRR over all items.

    The model's logits have one column for each item and none for padding, so that padding is never recommended. All
    items are ranked, none is sampled. Items with the same logit share their places: each has the mean of them, so that
    a model that scores all items alike is in the middle, not at the top.

    Where the data tells how often each item was a target in training, the same two numbers are reported for the cold
    items alone, those that never were one, if there are such targets.

    Args:
        loss: as for `Classification`.
        k: how many places count as a hit, 1 or more.
        class_counts: how often each item was a target in training, C numbers; None = not known.

    Raises:
        ConfigurationError: for a k below 1.

    References:
        E. M. Voorhees: The TREC-8 Question Answering Track Report, 1999 (mean reciprocal rank); W. Krichene, S. Rendle:
        On Sampled Metrics for Item Recommendation, KDD 2020 (why all items are ranked).

    Example:
        >>> from stabletrain.data import ArrayDataset, OrderedLoader
        >>> from stabletrain.loss import CrossEntropy
        >>> data = ArrayDataset(torch.tensor([[3.0, 2.0, 1.0], [0.0, 5.0, 0.0]]), torch.tensor([1, 1]))
        >>> found = NextItem(CrossEntropy(), k=1).evaluate(nn.Identity(), OrderedLoader(data, batch_size=2))
        >>> found["hit_rate_at_1"], found["mrr"]
        (0.5, 0.75)
    """

    name = "next_item"
    counts = 6

    def __init__(self, loss: nn.Module, k: int = 10, class_counts: Sequence[int] | None = None) -> None:
        super().__init__(loss)
        whole("k of the task", k)
        self.k = k
        self.cold = None if class_counts is None else torch.tensor(list(class_counts)) == 0

    def _counted(self, outputs: Any, targets: torch.Tensor) -> Sequence[torch.Tensor]:
        items = targets.argmax(1) if targets.is_floating_point() else targets
        counts = counting(self.loss, items).double()
        items = items.clamp(0, outputs.shape[1] - 1)
        ranks = mean_ranks(outputs, items)
        hits = torch.where(ranks.isnan(), ranks, (ranks <= self.k).double())
        cold = counts * self._is_cold(items, outputs.shape[1])
        return tuple((part * which).sum() for which in (counts, cold) for part in (hits, 1 / ranks, counts))

    def _is_cold(self, items: torch.Tensor, count: int) -> torch.Tensor:
        if self.cold is None:
            return torch.zeros_like(items, dtype=torch.float64)
        if len(self.cold) != count:
            raise ConfigurationError(
                f"the model scores {count} items, but the task was told how often each of {len(self.cold)} was a "
                "target: they must be the same (model.num_items, task.class_counts)."
            )
        self.cold = self.cold.to(items.device)
        return self.cold[items].double()

    def _metrics(self, counted: Sequence[float], samples: float) -> dict[str, float]:
        hits, reciprocals, count, *cold = counted
        hit_rate = f"hit_rate_at_{self.k}"
        found = {hit_rate: share(hits, count), "mrr": share(reciprocals, count)}
        if cold[2] > 0:
            found |= {f"cold_{hit_rate}": cold[0] / cold[2], "cold_mrr": cold[1] / cold[2]}
        return found


def mean_ranks(logits: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """Return the place of one item among all, 1 for the highest logit.

    Args:
        logits: [B, C].
        items: whose place is asked for, int64 [B].

    Returns:
        float64 [B]; the mean of the places that items of the same logit share; NaN where one of the logits is NaN.

    Example:
        >>> mean_ranks(torch.tensor([[3.0, 1.0, 1.0], [2.0, 2.0, 2.0]]), torch.tensor([1, 0])).tolist()
        [2.5, 2.0]
    """
    own = logits.gather(1, items.unsqueeze(1))
    ranks = (logits > own).sum(1) + ((logits == own).sum(1) + 1) / 2
    return ranks.double().masked_fill(logits.isnan().any(1), torch.nan)
