"""Series to cut windows from: a generated one with regimes, and anybody's CSV or Parquet file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stabletrain.checks import whole
from stabletrain.data.files import numbers, read_columns
from stabletrain.data.splits import Splits
from stabletrain.data.table import did_you_mean, encode_labels
from stabletrain.data.windows import DIRECTIONS, UNKNOWN, Series, change_labels, row_parts
from stabletrain.errors import ConfigurationError
from stabletrain.randomness import key


def regimes(
    *,
    rows: int = 60000,
    in_features: int = 110,
    sequence: int = 60,
    stride: int = 8,
    horizon: int = 1,
    mean_duration: int = 90,
    speed: float = 0.3,
    drift: float = 0.8,
    noise: float = 1.5,
    validation: float = 0.1,
    test: float = 0.5,
    gap: int | None = None,
    seed: int = 0,
) -> Splits:
    """Generate a series that switches between the regimes down, flat and up; a window's class is the one that follows.

    Two hidden factors turn on a circle, forwards in regime up, backwards in down, to and fro at random in flat; a third
    one wanders around a level of its own in each regime. Every column is a mixture of the three with heavy-tailed
    noise, in a unit of its own. So the levels tell a little, and the order of events tells the rest. Half of the time
    is flat.

    Args:
        rows: length of the series.
        in_features: number of columns.
        sequence: rows in a window.
        stride: rows from one window's start to the next one's.
        horizon: how many rows after a window's last one the regime is asked for.
        mean_duration: rows that a regime lasts on average, at least half of it; above 1.
        speed: radian per row by which the factors turn.
        drift: how far the third factor's levels lie apart, in its standard deviations.
        noise: size of the noise in each column, where the factors have size 1.
        validation: share of the rows that are for validation, after the training rows.
        test: share of the rows that are for the test, at the end.
        gap: unused rows between two parts; None = as many as a window has.
        seed: number that decides all that is drawn.

    Returns:
        Windows float32 [sequence, in_features], standardised by the training rows, and targets int64 (0 down, 1 flat, 2
        up).

    Raises:
        ConfigurationError: for numbers that describe no series.

    References:
        J. Hamilton: A New Approach to the Economic Analysis of Nonstationary Time Series, 1989 (regime switching).

    Example:
        >>> import torch
        >>> splits = regimes(rows=800, in_features=6, sequence=20)
        >>> windows, targets = splits.train.gather(torch.arange(5))
        >>> windows.shape, splits.classes
        (torch.Size([5, 20, 6]), ('down', 'flat', 'up'))
    """
    for name, count, least in (("rows", rows, 1), ("in_features", in_features, 1), ("horizon", horizon, 1)):
        whole(f"{name} of the regimes", count, least)
    for name, number in (("speed", speed), ("drift", drift), ("noise", noise), ("mean_duration", mean_duration)):
        if isinstance(number, bool) or not 0 <= number < math.inf or (name == "mean_duration" and number <= 1):
            raise ConfigurationError(
                f"{name} of the regimes is {number!r}; a finite number from 0 (mean_duration: above 1) is allowed."
            )
    random = np.random.default_rng(key(seed, "regimes"))
    regime = np.concatenate(list(_spells(random, rows + horizon, mean_duration)))[: rows + horizon]
    turn = np.where(regime[:rows] == 1, random.choice([-speed, speed], size=rows), (regime[:rows] - 1) * speed)
    angle = np.cumsum(turn + 0.1 * random.standard_normal(rows)) + random.uniform(0, 2 * math.pi)
    level = np.empty(rows)
    now = 0.0
    for row, push in enumerate(random.standard_normal(rows) * math.sqrt(1 - 0.9**2)):
        now = 0.9 * now + push
        level[row] = now
    level += drift * (regime[:rows] - 1)
    factors = np.stack([math.sqrt(2) * np.cos(angle), math.sqrt(2) * np.sin(angle), level], axis=1)
    mixture = random.standard_normal((3, in_features))
    mixture /= np.maximum(np.linalg.norm(mixture, axis=0, keepdims=True), 1e-3)
    disturbance = noise / math.sqrt(2) * random.standard_t(4, size=(rows, in_features))  # such a t has variance 2
    unit, offset = np.exp(random.normal(0, 2, in_features)), random.normal(0, 5, in_features)
    values = (factors @ mixture + disturbance + offset) * unit
    series = Series(
        values,
        regime[horizon:].astype(np.int64),
        [f"column_{number}" for number in range(in_features)],
        DIRECTIONS,
        "the generated series",
        reach=horizon,
    )
    return series.splits(sequence=sequence, stride=stride, validation=validation, test=test, gap=gap, name="regimes")


def _spells(random: np.random.Generator, rows: int, mean_duration: int) -> Any:
    """Yield the regimes of one spell after the other, until there are `rows`; no two spells in a row are alike."""
    done, regime = 0, 1
    shortest = max(1, mean_duration // 2)
    while done < rows:
        length = shortest + int(random.geometric(1 / max(1, mean_duration - shortest)))
        yield np.full(length, regime)
        done += length
        # After flat, down or up; after these, flat: so half of the spells are flat.
        regime = int(random.choice([0, 2])) if regime == 1 else 1


def windows_of_file(
    path: str | Path,
    target: str | int,
    features: Sequence[str] | None = None,
    *,
    exclude: Sequence[str] = (),
    horizon: int | None = None,
    threshold: float | None = None,
    change: str = "difference",
    classes: Sequence[Any] | None = None,
    sequence: int = 60,
    stride: int = 1,
    constant: str = "drop",
    gaps: str = "forward",
    infinities: str = "gap",
    standardize: bool = True,
    limit: float | None = 10.0,
    header: bool = True,
    delimiter: str = ",",
    encoding: str = "utf-8-sig",
    validation: float = 0.15,
    test: float = 0.15,
    gap: int | None = None,
) -> Splits:
    """Read a series from a CSV or Parquet file, one row for each point in time in rising order, and cut windows.

    Args:
        path: the file; .parquet and .pq are Parquet, anything else is CSV.
        target: without `horizon`, the column with the class of a window that ends in that row; with it, the column of
            numbers whose direction is asked for.
        features: names of the columns to learn from; None = all, without a column of classes.
        exclude: names of columns to leave out, such as dates.
        horizon: how many rows ahead the target's change is asked for: down, flat, up; None = the target tells classes.
        threshold: with `horizon`, a change of at most this size is flat; None = a third of the training rows is flat.
        change: with `horizon`, `difference` or `relative`.
        classes: labels that are allowed, in the order of their class numbers; None = those that occur.
        sequence: rows in a window.
        stride: rows from one window's start to the next one's.
        constant: rule for columns that don't change, see `Series.splits`: `drop`, `zero` or `raise`.
        gaps: rule for missing values: `forward`, `median`, `drop` or `raise`. Empty cells and NA count as NaN.
        infinities: rule for infinities: `gap`, `clip` or `raise`.
        standardize: bring each column to mean 0 and standard deviation 1 by the training rows.
        limit: standardised values are kept from -limit to limit; None = no limit.
        header: of CSV, the first line holds the names.
        delimiter: of CSV, the character between cells.
        encoding: of CSV, of the text.
        validation: share of the rows that are for validation, after the training rows.
        test: share of the rows that are for the test, at the end.
        gap: unused rows between two parts; None = as many as a window has.

    Raises:
        ConfigurationError: for anything in the file that can't be used, with its place.
    """
    table, source, where = read_columns(path, header=header, delimiter=delimiter, encoding=encoding)
    target = str(target)
    known = list(table)
    left_out = {str(name) for name in exclude} | (set() if horizon is not None else {target})
    wanted = [name for name in known if name not in left_out] if features is None else [str(name) for name in features]
    for name in (target, *wanted, *map(str, exclude)):
        if name not in table:
            shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
            raise ConfigurationError(f"{source} has no column {name!r}; it has: {shown}.{did_you_mean(name, known)}")
    if horizon is None and target in wanted:
        raise ConfigurationError(
            f"{source}: the column {target!r} tells the classes and can't be among the features too. Leave it out, or "
            "give a `horizon` to ask for its change."
        )
    rows = len(table[target])
    if len(wanted) == 0 or rows == 0:
        what = "no row of data" if rows == 0 else "no column to learn from"
        raise ConfigurationError(f"{source} has {what}: check the file, `features` and `exclude`.")
    values = np.array([numbers(table[name], name, source, where) for name in wanted], dtype=np.float64).T
    if horizon is not None:
        column = np.array(numbers(table[target], target, source, where), dtype=np.float64)
        train = row_parts(rows, validation=validation, test=test, gap=sequence if gap is None else gap)[0]
        labels, names = change_labels(column, horizon, threshold, change, train), list(DIRECTIONS)
    else:
        told = [row for row, cell in enumerate(table[target]) if not _missing(cell)]
        labels = np.full(rows, UNKNOWN, dtype=np.int64)
        labels[told], names = encode_labels(
            [table[target][row] for row in told],
            where=lambda place: where(told[place]),
            source=f"{source}, column {target!r}",
            classes=classes,
        )
    series = Series(values, labels, wanted, names, source, reach=horizon or 0)
    splits = series.splits(
        sequence=sequence,
        stride=stride,
        constant=constant,
        gaps=gaps,
        infinities=infinities,
        standardize=standardize,
        limit=limit,
        validation=validation,
        test=test,
        gap=gap,
        name=Path(path).stem,
    )
    unknown = int((labels == UNKNOWN).sum()) - (horizon or 0)
    if unknown > 0:
        splits.notes.append(f"{source}: no window ends in the {unknown} rows for which {target!r} tells no label.")
    return splits


def _missing(cell: Any) -> bool:
    return (
        cell is None or (isinstance(cell, str) and cell.strip() == "") or (isinstance(cell, float) and math.isnan(cell))
    )
