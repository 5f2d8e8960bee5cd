"""Where the items held out for a user stand among all items, and what Recall, NDCG and others make of it.

Ties count by their mean over all orders of the tied items: a model that scores all items alike does as well as chance,
whatever the order in which the items are numbered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ranks:
    """Where some items stand in each user's ranking.

    Attributes:
        better: how many items have a larger score, int64 [B, H].
        alike: how many items have the same score, the item itself among them, int64 [B, H].
        counts: which entries are items, bool [B, H]; the others are filling.
        broken: users of whom a score is NaN, bool [B]; their measures are NaN.
    """

    better: torch.Tensor
    alike: torch.Tensor
    counts: torch.Tensor
    broken: torch.Tensor

    @staticmethod
    def among_all(
        scores: torch.Tensor, wanted: torch.Tensor, known: torch.Tensor | None = None, chunk: int = 256
    ) -> Ranks:
        """Return where the wanted items stand among all those that aren't known.

        Args:
            scores: of all items for each user, [B, items].
            wanted: numbers of items, int64 [B, H], filled up with -1.
            known: items that are left out of the ranking, int64 [B, K], filled up with -1; None = none.
            chunk: users ranked at a time; it bounds the memory.

        Example:
            >>> scores = torch.tensor([[0.5, 0.9, 0.1, 0.5]])
            >>> ranks = Ranks.among_all(scores, torch.tensor([[0, 2]]), known=torch.tensor([[1]]))
            >>> ranks.better.tolist(), ranks.alike.tolist()
            ([[0, 2]], [[2, 1]])
        """
        better, alike = [], []
        for start in range(0, len(scores), chunk):
            rows, own = scores[start : start + chunk], wanted[start : start + chunk]
            hidden = without(rows, known[start : start + chunk]) if known is not None else rows
            # Larger ones first in negated order, so that what is left out, and NaN, come last.
            rising = (-hidden).sort(1).values
            own_scores = -hidden.gather(1, own.clamp_min(0))
            first = torch.searchsorted(rising, own_scores)
            better.append(first)
            alike.append(torch.searchsorted(rising, own_scores, right=True) - first)
        empty = torch.zeros_like(wanted)
        return Ranks(
            torch.cat(better) if better else empty,
            torch.cat(alike).clamp_min(1) if alike else empty,
            wanted >= 0,
            scores.isnan().any(1),
        )

    def hits(self, top: int) -> torch.Tensor:
        """Return the probability that each item is among the first `top`, float64 [B, H]; 0 for filling."""
        return ((top - self.better).clamp_min(0).minimum(self.alike) / self.alike.double()) * self.counts

    def recall(self, top: int, of: torch.Tensor | None = None) -> torch.Tensor:
        """Return the share of each user's items that are among the first `top`, float64 [B]; 0 of nothing.

        Args:
            top: number of items that are shown to the user.
            of: the items that count, bool [B, H]; None = all.
        """
        counts = self.counts if of is None else self.counts & of
        found = (self.hits(top) * counts).sum(1) / counts.sum(1).clamp_min(1)
        return self._seen(found)

    def ndcg(self, top: int) -> torch.Tensor:
        """Return each user's normalised discounted cumulative gain among the first `top`, float64 [B]; 0 of nothing.

        An item at place r (from 1) gains 1 / log2(r + 1); the sum is divided by the largest one possible.

        References:
            K. Järvelin, J. Kekäläinen: Cumulated gain-based evaluation of IR techniques, ACM TOIS 20, 2002.
            F. McSherry, M. Najork: Computing information retrieval performance measures efficiently in the presence of
            tied scores, ECIR 2008.
        """
        places = torch.arange(1, top + 1, dtype=torch.float64, device=self.better.device)
        gains = torch.cat([places.new_zeros(1), (1 / (places + 1).log2()).cumsum(0)])  # of the first 0, 1, ... places
        gained = gains[(self.better + self.alike).clamp_max(top)] - gains[self.better.clamp_max(top)]
        best = gains[self.counts.sum(1).clamp_max(top)]
        found = (gained / self.alike * self.counts).sum(1) / torch.where(best > 0, best, 1.0)
        return self._seen(found)

    def _seen(self, measure: torch.Tensor) -> torch.Tensor:
        return measure.masked_fill(self.broken, float("nan"))


def without(scores: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Return the scores with -Inf for what is known, a copy.

    Args:
        scores: [B, items].
        known: int64 [B, K], filled up with -1.

    Example:
        >>> without(torch.ones(2, 3), torch.tensor([[1, -1], [-1, -1]]))
        tensor([[1., -inf, 1.],
                [1., 1., 1.]])
    """
    padded = torch.cat([scores, scores[:, :1]], 1)  # a column for the filling
    places = torch.where(known < 0, scores.shape[1], known)
    return padded.scatter(1, places, -torch.inf)[:, :-1]
