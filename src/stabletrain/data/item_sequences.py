"""Users' own histories: a table of who had what when, and the items' texts or embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stabletrain.data.array_files import read_arrays
from stabletrain.data.files import read_columns
from stabletrain.data.histories import histories_of, scaled_columns, text_embeddings
from stabletrain.data.splits import Splits, check_shares, split_indices
from stabletrain.data.table import Booleans, Floats, did_you_mean
from stabletrain.errors import ConfigurationError

POLICIES = ("raise", "zero", "drop")
DIVISIONS = ("last", "user")
Where = Callable[[int], str]


def item_sequences(
    path: str | Path,
    user: str = "user",
    item: str = "item",
    order: str | None = None,
    *,
    items: str | Path | None = None,
    text: str | None = "text",
    embeddings: str | Path | None = None,
    array: str | None = None,
    text_features: int = 32,
    nonfinite: str = "raise",
    standardize: bool = True,
    split: str = "last",
    min_interactions: int = 4,
    max_length: int = 20,
    validation: float = 0.15,
    test: float = 0.15,
    seed: int = 0,
) -> Splits:
    """Read histories from a table, CSV or Parquet, whose rows name a user and an item; and what the items' texts say.

    Texts come from a column, of a table of the items or of the same table (then an item's first row counts), and become
    embeddings by `text_embeddings`; or embeddings come from a file. Its rows belong to the rows of the table of the
    items; without one, items are whole numbers, which say the row, from 0.

    Args:
        path: the table of interactions; relative to the current folder.
        user: name of the column that says whose a row is.
        item: name of the column that says which item it is, in the table of the items, too.
        order: name of a column by which a user's rows are ordered: numbers, or dates (as 2026-11-30 12:00); None = rows
            are in order. Rows of the same order keep their places.
        items: a table with a row for each item, CSV or Parquet; None = there is none.
        text: name of the column with the texts, where there are no `embeddings`.
        embeddings: a file with embeddings [items, D]: .npy, .npz, .pt or .safetensors.
        array: name of the array in a file of several; None = it holds one.
        text_features: numbers in an embedding that is made of a text.
        nonfinite: what to do with an item whose row in the file of embeddings has NaN or Inf: `raise`, set the row to
            `zero`, or `drop` the item's interactions.
        standardize: bring each column of the file's embeddings to mean 0 and deviation 1.
        split: `last`: of each user the last item is for the test, the one before it for validation; `user`: users are
            divided by the shares.
        min_interactions: users with fewer rows are left out; 4 or more with split `last`, 2 or more with `user`.
        max_length: items of a history at most, the latest ones.
        validation: share of the validation part, of the users, with split `user`.
        test: share of the test part, likewise.
        seed: number that decides which user goes where.

    Returns:
        Inputs: histories, to be padded by `collate_histories`; targets: numbers of items.

    Raises:
        ConfigurationError: for anything in the files that can't be used, with the row.
    """
    _check(nonfinite, split, min_interactions, max_length, validation, test)
    columns, source, where = read_columns(path)
    for name in (user, item, *([order] if order is not None else [])):
        _check_column(name, columns, source)
    users = _words(columns[user], user, source, where)
    ids = _words(columns[item], item, source, where)
    names, texts, given = _items(ids, columns, source, where, items, item, text, embeddings)
    number = {name: place for place, name in enumerate(names)}
    for row, name in enumerate(ids):
        if name not in number:
            raise ConfigurationError(
                f"{source}, {where(row)}: the item {name!r} is not among the {len(names)} items of {given}. Add it "
                f"there, or leave the row out.{did_you_mean(name, names)}"
            )
    notes: list[str] = []
    if embeddings is not None:
        found, usable = _read_embeddings(Path(embeddings), array, names, nonfinite, standardize, notes)
    else:
        assert texts is not None
        found, usable = text_embeddings(texts, text_features, seed), np.ones(len(names), dtype=np.bool_)
    times = _times(columns[order], order, source, where) if order is not None else np.zeros(len(ids))
    rows_of: dict[str, list[int]] = {}
    for row in range(len(ids)):
        if usable[number[ids[row]]]:
            rows_of.setdefault(users[row], []).append(row)
    sequences = [
        np.array([number[ids[row]] for row in sorted(rows, key=lambda row: times[row])], dtype=np.int64)
        for rows in rows_of.values()
    ]
    kept = [sequence for sequence in sequences if len(sequence) >= min_interactions]
    if len(kept) == 0:
        raise ConfigurationError(
            f"{source}: none of {len(sequences)} users has {min_interactions} rows or more (min_interactions), so "
            "there is no history to learn from. Give more rows, or check the column of the users."
        )
    if len(kept) < len(sequences):
        notes.append(
            f"{source}: {len(sequences) - len(kept)} of {len(sequences)} users with fewer than "
            f"{min_interactions} rows are left out."
        )
    parts = split_indices(len(kept), validation=validation, test=test, seed=seed) if split == "user" else None
    made = torch.from_numpy(found.astype(np.float32))
    return histories_of(kept, made, parts=parts, max_length=max_length, name=Path(path).stem, notes=notes, names=names)


def _check(nonfinite: str, split: str, min_interactions: int, max_length: int, validation: float, test: float) -> None:
    for name, value, allowed in (("nonfinite", nonfinite, POLICIES), ("split", split, DIVISIONS)):
        if value not in allowed:
            raise ConfigurationError(
                f"{name} is {value!r}; allowed: {', '.join(allowed)}.{did_you_mean(str(value), allowed)}"
            )
    least = 4 if split == "last" else 2
    for name, number, smallest in (("min_interactions", min_interactions, least), ("max_length", max_length, 1)):
        if isinstance(number, bool) or not isinstance(number, int) or number < smallest:
            raise ConfigurationError(
                f"{name} is {number!r}; a whole number from {smallest} is allowed with split={split}."
            )
    check_shares(validation, test)


def _check_column(name: str, columns: dict[str, list[Any]], source: str) -> None:
    if name not in columns:
        raise ConfigurationError(
            f"{source} has no column {name!r}; it has: {', '.join(list(columns)[:20])}."
            f"{did_you_mean(name, list(columns))}"
        )


def _words(values: Sequence[Any], column: str, source: str, where: Where) -> list[str]:
    """Return users or items as words; a number without a fraction reads the same as a whole one."""
    words = []
    for row, value in enumerate(values):
        whole = isinstance(value, float) and value.is_integer()
        word = "" if value is None or value != value else str(int(value) if whole else value).strip()
        if word == "":
            raise ConfigurationError(
                f"{source}, {where(row)}: the column {column!r} is empty. Fill it, or leave the row out."
            )
        words.append(word)
    if not words:
        raise ConfigurationError(f"{source} is empty: it has no row of data.")
    return words


def _times(values: Sequence[Any], column: str, source: str, where: Where) -> list[Any]:
    """Return what the rows are ordered by: all numbers, or all words, such as dates in the way of ISO 8601."""
    times: list[Any] = []
    for row, value in enumerate(values):
        try:
            time: Any = float(value)
        except (TypeError, ValueError):
            time = "" if value is None else str(value).strip()
        if time == "" or (isinstance(time, float) and math.isnan(time)):
            raise ConfigurationError(
                f"{source}, {where(row)}: the column {column!r} is {value!r}. Fill it, or leave the row out."
            )
        if times and isinstance(time, str) != isinstance(times[0], str):
            raise ConfigurationError(
                f"{source}, {where(row)}: the column {column!r} is {value!r}, but {values[0]!r} in {where(0)}: all "
                "have to be numbers, or all dates as 2026-11-30."
            )
        times.append(time)
    return times


def _items(
    ids: list[str],
    columns: dict[str, list[Any]],
    source: str,
    where: Where,
    items: str | Path | None,
    item: str,
    text: str | None,
    embeddings: str | Path | None,
) -> tuple[list[str], list[str] | None, str]:
    """Return the items' names in the order of their numbers, their texts if these are wanted, and who says so."""
    if items is not None:
        columns, source, where = read_columns(items)
        _check_column(item, columns, source)
        names = _words(columns[item], item, source, where)
        rows = {name: row for row, name in reversed(list(enumerate(names)))}
        twice = next((row for row, name in enumerate(names) if rows[name] != row), None)
        if twice is not None:
            raise ConfigurationError(
                f"{source}, {where(twice)}: the item {names[twice]!r} stands in {where(rows[names[twice]])}, too. Each "
                "item has one row."
            )
    elif embeddings is not None:
        for row, name in enumerate(ids):
            if not name.isdecimal():
                raise ConfigurationError(
                    f"{source}, {where(row)}: the item is {name!r}. Without a table of the items (`items`), an item is "
                    "the row of the embeddings that belongs to it, a whole number from 0."
                )
        return [str(row) for row in range(max(int(name) for name in ids) + 1)], None, f"the file {str(embeddings)!r}"
    else:
        rows = {name: row for row, name in reversed(list(enumerate(ids)))}
        names = sorted(rows)
    if embeddings is not None:
        return names, None, source
    if text is None:
        raise ConfigurationError(
            "nothing tells what the items are: name a column by `text`, or a file by `embeddings`."
        )
    _check_column(text, columns, source)
    texts = ["" if columns[text][rows[name]] is None else str(columns[text][rows[name]]) for name in names]
    for name, words in zip(names, texts, strict=True):
        if words.strip() == "":
            raise ConfigurationError(
                f"{source}, {where(rows[name])}: the item {name!r} has no text in the column {text!r}. Give it one."
            )
    return names, texts, source


def _read_embeddings(
    file: Path, array: str | None, names: list[str], nonfinite: str, standardize: bool, notes: list[str]
) -> tuple[Floats, Booleans]:
    """Return embeddings [items, D] and which items can be used."""
    source = f"the file of embeddings {str(file)!r}"
    try:
        held = read_arrays(file.expanduser())
    except ValueError as error:
        raise ConfigurationError(
            f"{source} can't be read: {error}. Give a .npy, .npz, .pt or .safetensors file."
        ) from error
    if array is None and len(held) == 1:
        array = next(iter(held))
    if array not in held:
        raise ConfigurationError(
            f"{source} has {', '.join(map(repr, held)) or 'nothing in it'}; `array` is {array!r}. Name the one that "
            "holds the embeddings."
        )
    found = held[array]
    if found.ndim != 2 or found.dtype.kind not in "fiu" or found.shape[1] == 0:
        raise ConfigurationError(
            f"{source} holds {found.dtype} of the shape {list(found.shape)}; real numbers [items, features] are needed."
        )
    if len(found) < len(names):
        raise ConfigurationError(
            f"{source} has {len(found)} rows, but there are {len(names)} items: {names[len(found)]!r} and "
            f"{len(names) - len(found) - 1} more have none. Give each item a row, in the items' order."
        )
    found = found[: len(names)].astype(np.float64)
    with np.errstate(over="ignore"):
        bad: Booleans = ~np.asarray(np.isfinite(found.astype(np.float32)).all(1))
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        if nonfinite == "raise":
            raise ConfigurationError(
                f"{source}, row {first} (from 0), of the item {names[first]!r}: it holds NaN or Inf, as "
                f"{int(bad.sum())} of {len(bad)} rows do. Correct them, or choose nonfinite=zero or nonfinite=drop."
            )
        done = "set to zero" if nonfinite == "zero" else "left out with their items"
        notes.append(f"{source}: {int(bad.sum())} of {len(bad)} rows, which hold NaN or Inf, are {done}.")
    if bad.all():
        raise ConfigurationError(f"{source}: each row holds NaN or Inf. Make the embeddings again.")
    made: Floats = np.zeros_like(found)
    made[~bad] = scaled_columns(found[~bad]) if standardize else found[~bad]
    return made, ~bad if nonfinite == "drop" else np.ones(len(bad), dtype=np.bool_)
