"""Statistics of a data set's columns, gathered chunk by chunk: range, typical spread, and what lies far outside."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

FAR = 20.0  # spreads from the median: 66 standard deviations of a normal distribution
KEPT_NUMBERS = 4_000_000  # of a data set, for its quantiles


def by_column(leaf: Tensor | list[Tensor]) -> Tensor:
    """Return a chunk's values as [values, columns].

    A column is a feature of a table [n, features], a feature of each time step [n, steps, features], a channel of
    images [n, channels, height, width]; anything else is one column.

    Example:
        >>> by_column(torch.zeros(2, 3)).shape, by_column(torch.zeros(2, 3, 4, 4)).shape
        (torch.Size([2, 3]), torch.Size([32, 3]))
        >>> by_column([torch.zeros(5, 2), torch.zeros(7, 2)]).shape
        torch.Size([12, 2])
    """
    if isinstance(leaf, list):
        samples = [_sample_by_column(sample) for sample in leaf]
        one_width = len({sample.shape[1] for sample in samples}) == 1
        return torch.cat(samples if one_width else [_one(sample) for sample in samples])
    if leaf.dim() == 2:
        return leaf
    return (
        leaf.flatten(0, 1) if leaf.dim() == 3 else leaf.movedim(1, -1).flatten(0, 2) if leaf.dim() == 4 else _one(leaf)
    )


def _sample_by_column(sample: Tensor) -> Tensor:
    return sample if sample.dim() == 2 else sample.movedim(0, -1).flatten(0, 1) if sample.dim() == 3 else _one(sample)


def _one(values: Tensor) -> Tensor:
    return values.reshape(-1, 1)


@dataclass
class Columns:
    """Range and quantiles of each column over the finite values that were added.

    Args:
        chunks: how many chunks will be added.

    Example:
        >>> columns = Columns(chunks=1)
        >>> columns.add(torch.tensor([[0.0, 5.0], [1.0, 5.0], [2.0, 5.0]]))
        >>> columns.constant(), [round(spread, 1) for spread in columns.spread().tolist()]
        ([1], [1.8, 0.0])
    """

    chunks: int
    count: Tensor = field(default_factory=lambda: torch.zeros(0))
    least: Tensor = field(default_factory=lambda: torch.zeros(0))
    largest: Tensor = field(default_factory=lambda: torch.zeros(0))
    kept: list[Tensor] = field(default_factory=list)

    def add(self, values: Tensor) -> None:
        """Add values [n, columns]; those of another number of columns than before are passed over."""
        if len(self.count) not in (0, values.shape[1]):
            return
        values = values.double()
        finite = torch.isfinite(values)
        count, infinity = finite.sum(0), float("inf")
        if len(values) == 0:
            return
        least = torch.where(finite, values, infinity).amin(0)
        largest = torch.where(finite, values, -infinity).amax(0)
        if len(self.count) == 0:
            self.count, self.least, self.largest = count, least, largest
        else:
            self.count = self.count + count
            self.least, self.largest = torch.minimum(self.least, least), torch.maximum(self.largest, largest)
        rows = max(8, KEPT_NUMBERS // (values.shape[1] * self.chunks))
        self.kept.append(values[:: -(-len(values) // rows)])

    def constant(self) -> list[int]:
        """Return the columns in which at least two finite values are all the same."""
        return torch.nonzero((self.count > 1) & (self.least == self.largest)).flatten().tolist()

    def median(self) -> Tensor:
        """Return the median of each column, NaN where nothing is finite."""
        return torch.nanmedian(self._values(), 0).values if self.kept else torch.zeros(0)

    def spread(self) -> Tensor:
        """Return the distance from the 5th to the 95th percentile of each column, which few values can't change.

        Where these are equal, as in a column of mostly zeros, it is the median distance of the others from the median.
        """
        values = self._values()
        wide = torch.nanquantile(values, 0.95, 0) - torch.nanquantile(values, 0.05, 0)
        distance = (values - self.median()).abs()
        others = torch.nanmedian(torch.where(distance > 0, distance, float("nan")), 0).values.nan_to_num(0.0)
        return torch.where(wide > 0, wide, others)

    def far(self) -> Tensor:
        """Return for each column the distance from the median beyond which a value is an outlier; Inf: none is."""
        spread = self.spread()
        return torch.where(spread > 0, FAR * spread, float("inf"))

    def with_outliers(self) -> list[int]:
        """Return the columns that hold values far outside."""
        median, far = self.median(), self.far()
        beyond = (self.largest - median > far) | (median - self.least > far)
        return torch.nonzero(beyond & (self.count > 0)).flatten().tolist()

    def _values(self) -> Tensor:
        values = torch.cat(self.kept)
        # torch's quantile takes at most 2^24 numbers of a column.
        values = values[:: -(-len(values) // 100_000)]
        return torch.where(torch.isfinite(values), values, float("nan"))
