"""Windows of a multivariate series: cut when they are read, divided by time, scaled by the training rows alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from stabletrain.checks import whole
from stabletrain.data.arrays import Integers
from stabletrain.data.splits import Splits, check_shares
from stabletrain.data.table import Booleans, Floats, did_you_mean
from stabletrain.errors import ConfigurationError

CONSTANTS = ("drop", "zero", "raise")
GAPS = ("forward", "median", "drop", "raise")
INFINITIES = ("gap", "clip", "raise")
CHANGES = ("difference", "relative")
DIRECTIONS = ("down", "flat", "up")
UNKNOWN = -1  # label of a row that has none
LARGEST = float(np.finfo(np.float32).max)


class Windows(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Windows over one array, which is not copied: a sample is `length` rows from its start on.

    Args:
        series: rows in the order of time, float32 [T, F].
        starts: first row of each window, int64 [N].
        length: rows in a window.
        targets: class number of each window, int64 [N].

    Example:
        >>> windows = Windows(torch.arange(5.0).unsqueeze(1), torch.tensor([0, 2]), 3, torch.tensor([1, 0]))
        >>> windows.gather(torch.tensor([1, 0]))[0].squeeze(2)
        tensor([[2., 3., 4.],
                [0., 1., 2.]])
    """

    def __init__(self, series: torch.Tensor, starts: torch.Tensor, length: int, targets: torch.Tensor) -> None:
        self.series = series
        self.starts = starts
        self.length = length
        self.targets = targets
        self._offsets = torch.arange(length)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = int(self.starts[index])
        return self.series[start : start + self.length], self.targets[index]

    def gather(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return these windows [n, length, F] and their class numbers [n].

        Args:
            indices: positions, int64 [n], on the CPU.
        """
        rows = self.starts[indices].unsqueeze(1) + self._offsets
        windows = self.series.index_select(0, rows.flatten())
        return windows.view(len(indices), self.length, -1), self.targets[indices]


def row_parts(count: int, *, validation: float, test: float, gap: int) -> list[range]:
    """Divide rows by time: training, validation, test, with unused rows between two parts.

    Args:
        count: number of rows.
        validation: share of the validation part, from 0 (no such part) to below 1.
        test: share of the test part, likewise.
        gap: unused rows before the validation and before the test part.

    Raises:
        ConfigurationError: for shares and gaps that leave nothing.

    Example:
        >>> row_parts(100, validation=0.2, test=0.2, gap=5)
        [range(0, 60), range(65, 80), range(85, 100)]
    """
    check_shares(validation, test)
    cuts = [count - round(count * (validation + test)), count - round(count * test), count]
    parts = [range(cuts[0])]
    for begin, end, share in ((cuts[0], cuts[1], validation), (cuts[1], cuts[2], test)):
        parts.append(range(min(begin + gap, end), end) if share > 0 else range(end, end))
    return parts


@dataclass
class Series:
    """Rows in the order of time, as they were read.

    Attributes:
        values: float64 [T, F].
        labels: class number of a window that ends with this row, int64 [T]; UNKNOWN = no window ends there.
        columns: name of each feature.
        classes: names of the classes.
        source: where it comes from, for messages.
        reach: how many rows after a window's last one its label was made from.
    """

    values: Floats
    labels: Integers
    columns: Sequence[str]
    classes: Sequence[str]
    source: str
    reach: int = 0

    def splits(
        self,
        *,
        sequence: int = 60,
        stride: int = 1,
        constant: str = "drop",
        gaps: str = "forward",
        infinities: str = "gap",
        standardize: bool = True,
        limit: float | None = None,
        validation: float = 0.15,
        test: float = 0.15,
        gap: int | None = None,
        name: str = "windows",
    ) -> Splits:
        """Clean and scale the columns by what the training rows tell, and cut windows that lie within one part.

        A window belongs to a part if all its rows do, and those that its label was made from.

        Args:
            sequence: rows in a window.
            stride: rows from one window's start to the next one's, in the training part; windows of the other parts
                start at each `stride` too.
            constant: columns that don't change over the training rows, or are unknown there: `drop` leaves them out,
                `zero` makes them 0, `raise` stops.
            gaps: NaN: `forward` takes the last known value of the column (before there is one, the training rows'
                median), `median` that median, `drop` leaves out windows with a gap in them, `raise` stops.
            infinities: infinities, and what float32 can't hold: `gap` treats them as NaN, `clip` sets them to the
                largest or smallest finite value of the column's training rows, `raise` stops.
            standardize: subtract the training rows' mean and divide by their standard deviation.
            limit: standardised values are kept from -limit to limit; None = no limit.
            validation: share of the rows that are for validation, after the training rows.
            test: share of the rows that are for the test, at the end.
            gap: unused rows between two parts; None = as many as a window has.
            name: name for records.

        Raises:
            ConfigurationError: for what a rule refuses, and for a series that is too short.
        """
        for option, given, allowed in (
            ("constant", constant, CONSTANTS),
            ("gaps", gaps, GAPS),
            ("infinities", infinities, INFINITIES),
        ):
            if given not in allowed:
                raise ConfigurationError(
                    f"{option} is {given!r}; allowed: {', '.join(allowed)}.{did_you_mean(str(given), allowed)}"
                )
        gap = sequence if gap is None else gap
        for option, number, least in (("sequence", sequence, 1), ("stride", stride, 1), ("gap", gap, 0)):
            whole(option, number, least)
        if limit is not None and (isinstance(limit, bool) or not 0 < limit < math.inf):
            raise ConfigurationError(f"limit is {limit!r}; a finite number above 0 is allowed, or null for none.")
        parts = row_parts(len(self.values), validation=validation, test=test, gap=gap)
        notes: list[str] = []
        values = self.values.copy()
        missing = self._without_infinities(values, parts[0], infinities, notes)
        values, missing, names = self._without_constants(values, missing, parts[0], constant, notes)
        if missing.any():
            self._fill(values, missing, names, parts[0], gaps, notes)
        usable = np.ones(len(values), dtype=bool)
        if gaps == "drop":
            usable &= ~missing.any(axis=1)
        if standardize:
            values = _standardized(values, parts[0], limit)
        with np.errstate(over="ignore"):
            series = torch.from_numpy(values.astype(np.float32))
        cut = [self._windows(series, part, usable, sequence, stride) for part in parts]
        for part, rows, share, what in zip(
            cut, parts, (1, validation, test), ("training", "validation", "test"), strict=True
        ):
            if share > 0 and len(part) == 0:
                raise ConfigurationError(
                    f"{self.source}: no window fits into the {what} part: it has {len(rows)} rows, a window takes "
                    f"{sequence} and its label {self.reach} more. Choose a smaller `sequence` or `gap`, or another "
                    "share."
                )
        facts = {"num_classes": len(self.classes)}
        train, validation_part, test_part = (part if len(part) > 0 else None for part in cut)
        return Splits(train, validation_part, test_part, facts, name, notes, tuple(self.classes))

    def _windows(self, series: torch.Tensor, part: range, usable: Booleans, sequence: int, stride: int) -> Windows:
        starts = np.arange(part.start, part.stop - sequence - self.reach + 1, stride, dtype=np.int64)
        bad_before = np.concatenate([[0], np.cumsum(~usable)])
        labels = self.labels[starts + sequence - 1]
        whole = (bad_before[starts + sequence] == bad_before[starts]) & (labels != UNKNOWN)
        return Windows(series, torch.from_numpy(starts[whole]), sequence, torch.from_numpy(labels[whole]))

    def _without_infinities(self, values: Floats, train: range, rule: str, notes: list[str]) -> Booleans:
        """Deal with infinities in place, and return where values are missing, bool [T, F]."""
        infinite: Booleans = np.abs(values) > LARGEST  # false for NaN
        if infinite.any():
            self._refuse_if(rule, "infinities", infinite, self.columns, "choose infinities=gap or infinities=clip")
            notes.append(f"{self._found(infinite, 'infinities', self.columns)} (infinities={rule}).")
            if rule == "clip":
                known = np.where(infinite | np.isnan(values), np.nan, values)[train.start : train.stop]
                for column in np.flatnonzero(infinite.any(axis=0)).tolist():
                    finite = known[:, column][~np.isnan(known[:, column])]
                    low, high = (finite.min(), finite.max()) if len(finite) > 0 else (0.0, 0.0)
                    rows = infinite[:, column]
                    values[rows, column] = np.where(values[rows, column] > 0, high, low)
            else:
                values[infinite] = np.nan
        return np.isnan(values)

    def _without_constants(
        self, values: Floats, missing: Booleans, train: range, rule: str, notes: list[str]
    ) -> tuple[Floats, Booleans, Sequence[str]]:
        rows = slice(train.start, train.stop)
        known = np.where(missing, np.nan, values)[rows]
        constant = np.array([_constant(known[:, column]) for column in range(values.shape[1])], dtype=bool)
        if not constant.any():
            return values, missing, self.columns
        names = [self.columns[column] for column in np.flatnonzero(constant).tolist()]
        if rule == "raise":
            raise ConfigurationError(
                f"{self.source}: over the {len(train)} training rows nothing changes in {_listed(names)}. Leave them "
                "out by `exclude`, or choose constant=drop or constant=zero."
            )
        notes.append(
            f"{self.source}: {len(names)} of {values.shape[1]} columns don't change over the training rows: "
            f"{_listed(names)} (constant={rule})."
        )
        if rule == "zero":
            values[:, constant] = 0.0
            return values, missing & ~constant, self.columns
        if constant.all():
            raise ConfigurationError(
                f"{self.source}: no column changes over the training rows, so there is nothing to learn from. Choose "
                "other columns by `features`, or more rows."
            )
        left = [self.columns[column] for column in np.flatnonzero(~constant).tolist()]
        return values[:, ~constant], missing[:, ~constant], left

    def _fill(
        self, values: Floats, missing: Booleans, names: Sequence[str], train: range, rule: str, notes: list[str]
    ) -> None:
        self._refuse_if(rule, "gaps", missing, names, "choose gaps=forward, gaps=median or gaps=drop")
        notes.append(f"{self._found(missing, 'gaps', names)} (gaps={rule}).")
        for column in np.flatnonzero(missing.any(axis=0)).tolist():
            gaps = missing[:, column]
            known = values[train.start : train.stop, column]
            values[gaps, column] = float(np.median(known[~np.isnan(known)]))
            if rule == "forward":
                last = np.maximum.accumulate(np.where(gaps, 0, np.arange(len(gaps))))
                values[:, column] = values[last, column]

    def _found(self, where: Booleans, what: str, names: Sequence[str]) -> str:
        columns = [names[column] for column in np.flatnonzero(where.any(axis=0)).tolist()]
        return f"{self.source}: {int(where.sum())} {what} were found in {_listed(columns)}"

    def _refuse_if(self, rule: str, what: str, where: Booleans, names: Sequence[str], remedy: str) -> None:
        if rule != "raise":
            return
        row, column = (int(place) for place in np.argwhere(where)[0])
        raise ConfigurationError(
            f"{self.source}: {int(where.sum())} {what}, the first one in row {row} (from 0), column {names[column]!r}. "
            f"Correct the data, or {remedy}."
        )


def change_labels(values: Floats, horizon: int, threshold: float | None, change: str, train: range) -> Integers:
    """Return where a column goes within `horizon` rows: 0 down, 1 flat, 2 up, UNKNOWN where a value is missing.

    Args:
        values: the column, float64 [T].
        horizon: rows to look ahead.
        threshold: a change of at most this size is flat; None = so that a third of the training rows is flat.
        change: `difference`, or `relative` to the size of the earlier value.
        train: the training rows: the threshold is taken from changes within them alone.

    Raises:
        ConfigurationError: for numbers that make no sense, and no known change among the training rows.

    Example:
        >>> change_labels(np.array([1.0, 3.0, 3.1, 0.0]), 1, 0.5, "difference", range(4))
        array([ 2,  1,  0, -1])
    """
    if isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 1:
        raise ConfigurationError(
            f"horizon is {horizon!r}; a whole number from 1 is allowed, or null for a class column."
        )
    if threshold is not None and (isinstance(threshold, bool) or not 0 <= threshold < math.inf):
        raise ConfigurationError(f"threshold is {threshold!r}; a finite number from 0 is allowed, or null for a third.")
    if change not in CHANGES:
        raise ConfigurationError(
            f"change is {change!r}; allowed: {', '.join(CHANGES)}.{did_you_mean(str(change), CHANGES)}"
        )
    moved = np.full(len(values), np.nan)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        moved[:-horizon] = values[horizon:] - values[:-horizon]
        if change == "relative":
            moved = moved / np.abs(values)
    known = np.isfinite(moved)
    if threshold is None:
        training = moved[train.start : max(train.start, train.stop - horizon)]
        training = np.abs(training[np.isfinite(training)])
        if len(training) == 0:
            raise ConfigurationError(
                f"among the {len(train)} training rows no change of the target over {horizon} rows is known: choose a "
                "shorter `horizon`, more rows, or another target."
            )
        threshold = float(np.quantile(training, 1 / 3))
    labels = np.full(len(values), UNKNOWN, dtype=np.int64)
    labels[known] = 1 + (moved[known] > threshold).astype(np.int64) - (moved[known] < -threshold).astype(np.int64)
    return labels


def _constant(column: Floats) -> bool:
    known = column[~np.isnan(column)]
    if len(known) == 0:
        return True
    # A constant's deviation is a rounding error, not always 0.
    return bool(np.ptp(known) <= 1e-12 * np.abs(known).max())


def _standardized(values: Floats, train: range, limit: float | None) -> Floats:
    known = values[train.start : train.stop]
    # In units of the largest value, so that squares don't overflow.
    unit = np.maximum(np.abs(known).max(axis=0), 1e-300)
    mean, deviation = (known / unit).mean(axis=0), (known / unit).std(axis=0)
    constant = deviation <= 1e-12
    scaled: Floats = np.where(constant, 0.0, (values / unit - mean) / np.where(constant, 1.0, deviation))
    return scaled if limit is None else scaled.clip(-limit, limit)


def _listed(names: Sequence[Any]) -> str:
    return ", ".join(repr(str(name)) for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
