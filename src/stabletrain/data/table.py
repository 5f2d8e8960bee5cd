"""Tables: a matrix of features with a column of labels, checked, cleaned and divided."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stabletrain.data.arrays import ArrayDataset, Integers
from stabletrain.data.splits import Splits, part_of, split_indices
from stabletrain.errors import ConfigurationError

Floats = np.ndarray[Any, np.dtype[np.float64]]
Booleans = np.ndarray[Any, np.dtype[np.bool_]]
POLICIES = ("raise", "drop", "zero", "impute")


def did_you_mean(word: str, allowed: Sequence[str]) -> str:
    """Return a hint for a misspelled word, or nothing.

    Example:
        >>> did_you_mean("agee", ["age", "height"])
        ' Did you mean age?'
    """
    close = difflib.get_close_matches(word, allowed, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def encode_labels(
    values: Sequence[Any], *, where: Callable[[int], str], source: str, classes: Sequence[Any] | None = None
) -> tuple[Integers, list[str]]:
    """Turn labels into class numbers.

    Args:
        values: one label per sample: whole numbers from 0 without gaps, or words (numbered in sorted order).
        where: names the place of a sample, for messages.
        source: names the labels, for messages.
        classes: the labels that are allowed, in the order of their class numbers; None = those that occur.

    Returns:
        Class numbers, int64 [N], and the names of the classes.

    Raises:
        ConfigurationError: for a missing label, or one that is not allowed.

    Example:
        >>> encode_labels(["b", "a", "b"], where=str, source="kind")
        (array([1, 0, 1]), ['a', 'b'])
    """
    labels = [_label(value) for value in values]
    for row, label in enumerate(labels):
        if label is None:
            raise ConfigurationError(
                f"{source}, {where(row)}: the label is missing ({values[row]!r}). Leave this sample out or label it."
            )
    words = [label for label in labels if isinstance(label, str)]
    if classes is not None:
        names = [str(_label(name)) for name in classes]
    elif len(words) == 0:
        names = _numbered(labels, where, source)
    elif len(words) == len(labels):
        names = sorted(set(words))
    else:
        row = next(row for row, label in enumerate(labels) if isinstance(label, str) != isinstance(labels[0], str))
        raise ConfigurationError(
            f"{source}, {where(row)}: the label {values[row]!r} is a "
            f"{'word' if isinstance(labels[row], str) else 'number'}, while the one in {where(0)} ({values[0]!r}) is "
            "not. Correct it, or list all labels in `classes`."
        )
    number = {name: index for index, name in enumerate(names)}
    for row, label in enumerate(labels):
        if str(label) not in number:
            shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise ConfigurationError(
                f"{source}, {where(row)}: the label {values[row]!r} is out of range; allowed: {shown}. Correct it, or "
                f"add it to `classes`.{did_you_mean(str(label), names)}"
            )
    return np.array([number[str(label)] for label in labels], dtype=np.int64), names


def _label(value: Any) -> int | float | str | None:
    """Return a label as a whole number, another number, a word, or None where it is missing."""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if value is None or (isinstance(value, str) and value.strip() == ""):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value).strip()
    if math.isnan(number):
        return None
    return int(number) if number.is_integer() else number


def _numbered(labels: Sequence[Any], where: Callable[[int], str], source: str) -> list[str]:
    """Return the classes "0" to "C - 1", or raise where the numbers are no such classes."""
    for row, label in enumerate(labels):
        if not isinstance(label, int) or label < 0:
            raise ConfigurationError(
                f"{source}, {where(row)}: the label {label} is out of range; allowed are whole numbers from 0. Number "
                "the classes from 0, or list all labels in `classes`."
            )
    found = sorted(set(labels))
    if found != list(range(len(found))):
        absent = next(number for number in range(len(found) + 1) if number not in found)
        raise ConfigurationError(
            f"{source}: no sample has the label {absent}, though labels go up to {found[-1]}. Number the classes from "
            f"0 without gaps, or list the labels in `classes` "
            f"({', '.join(map(str, found[:10]))}{', ...' if len(found) > 10 else ''})."
        )
    return [str(number) for number in found]


@dataclass
class Table:
    """Features and labels as they were read.

    Attributes:
        features: float32 or float64 [N, ...].
        labels: class numbers, int64 [N].
        columns: name of each feature, in the order of the features laid flat.
        classes: names of the classes.
        source: where they come from, for messages.
        where: names the place of a row, for messages.
    """

    features: Floats
    labels: Integers
    columns: Callable[[int], str]
    classes: list[str]
    source: str
    where: Callable[[int], str]

    def splits(
        self,
        *,
        nonfinite: str = "raise",
        standardize: bool = True,
        validation: float = 0.15,
        test: float = 0.15,
        seed: int = 0,
        name: str = "table",
    ) -> Splits:
        """Clean the features and divide the rows, stratified by the labels.

        Args:
            nonfinite: what to do with NaN and Inf (float32's range counts): `raise`, `drop` the row, set to `zero`, or
                `impute` the median of the training part's finite values in that column.
            standardize: subtract the training part's mean and divide by its standard deviation: for each column of a
                matrix, each last index of a three-dimensional array, each channel (index 1) of a four-dimensional one.
            validation: share of the validation part.
            test: share of the test part.
            seed: number that decides which row goes where.
            name: name for records.

        Raises:
            ConfigurationError: for NaN or Inf under `raise`, and for rows that can't be divided so.
        """
        if nonfinite not in POLICIES:
            raise ConfigurationError(
                f"nonfinite is {nonfinite!r}; allowed: {', '.join(POLICIES)}.{did_you_mean(str(nonfinite), POLICIES)}"
            )
        if len(self.labels) == 0:
            raise ConfigurationError(f"{self.source} is empty: it has no row of data.")
        if len(self.features) != len(self.labels):
            raise ConfigurationError(
                f"{self.source} has {len(self.features)} rows of features, but {len(self.labels)} labels: each row "
                "needs one."
            )
        notes: list[str] = []
        flat = self.features.reshape(len(self.features), -1)
        with np.errstate(over="ignore"):
            bad = ~np.isfinite(flat.astype(np.float32))
        labels = self.labels
        shape = self.features.shape[1:]
        if bad.any():
            if nonfinite == "raise":
                self._refuse(flat, bad)
            if nonfinite == "drop":
                flat, labels, bad = self._drop(flat, bad, notes)
        parts = split_indices(
            len(labels), validation=validation, test=test, seed=seed, classes=labels, names=self.classes
        )
        if bad.any():
            flat = self._fill(flat, bad, parts[0].numpy(), nonfinite, notes)
        features = flat.reshape(len(flat), *shape)
        if standardize:
            features = standardized(features, parts[0].numpy())
        with np.errstate(over="ignore"):
            whole = ArrayDataset(torch.from_numpy(features.astype(np.float32)), torch.from_numpy(labels))
        train, validation_part, test_part = (part_of(whole, chosen) for chosen in parts)
        facts = {"num_classes": len(self.classes)}
        return Splits(train, validation_part, test_part, facts, name, notes, tuple(self.classes))

    def _refuse(self, flat: Floats, bad: Booleans) -> None:
        row, column = (int(place) for place in np.argwhere(bad)[0])
        value = flat[row, column]
        what = f"is {value}" if not math.isfinite(value) else f"is {value}, beyond the range of float32"
        raise ConfigurationError(
            f"{self.source}, {self.where(row)}, column {self.columns(column)!r}: the value {what} ({int(bad.sum())} "
            f"such cells in {int(bad.any(axis=1).sum())} rows). Correct them, or choose nonfinite=drop (leave out the "
            "rows), nonfinite=zero or nonfinite=impute (the training part's median)."
        )

    def _drop(self, flat: Floats, bad: Booleans, notes: list[str]) -> tuple[Floats, Integers, Booleans]:
        keep: Booleans = ~np.asarray(bad.any(axis=1))
        notes.append(f"{self.source}: {int((~keep).sum())} of {len(keep)} rows were dropped, for a NaN or Inf in them.")
        if not keep.any():
            raise ConfigurationError(
                f"{self.source} is empty after nonfinite=drop: each of its {len(keep)} rows has a NaN or Inf. Leave "
                "out the worst columns by `features`, or choose nonfinite=impute."
            )
        return flat[keep], self.labels[keep], bad[keep]

    def _fill(self, flat: Floats, bad: Booleans, train: Integers, policy: str, notes: list[str]) -> Floats:
        flat = flat.copy()
        for column in np.flatnonzero(bad.any(axis=0)).tolist():
            fill = 0.0
            if policy == "impute":
                finite = flat[train, column][~bad[train, column]]
                if len(finite) == 0:
                    raise ConfigurationError(
                        f"{self.source}: the column {self.columns(column)!r} has no finite value in the training "
                        "part, so it has no median to impute. Leave it out by `features`, or choose nonfinite=zero."
                    )
                fill = float(np.median(finite))
            flat[bad[:, column], column] = fill
        what = "the median of their column in the training part" if policy == "impute" else "zero"
        notes.append(f"{self.source}: {int(bad.sum())} cells that held NaN or Inf were set to {what}.")
        return flat


def standardized(features: Floats, train: Integers) -> Floats:
    """Return features with mean 0 and standard deviation 1 over the training rows; a constant one becomes 0."""
    kept = {2: 1, 3: 2, 4: 1}.get(features.ndim)
    axes = tuple(axis for axis in range(features.ndim) if axis != kept)
    known = features[train].astype(np.float64)
    mean = known.mean(axis=axes, keepdims=True)
    deviation = known.std(axis=axes, keepdims=True)
    # A constant column's deviation is a rounding error, not always 0: dividing by it would make noise large.
    constant = deviation <= 1e-12 * np.abs(known).max(axis=axes, keepdims=True)
    result: Floats = np.where(constant, 0.0, (features - mean) / np.where(constant, 1.0, deviation))
    return result
