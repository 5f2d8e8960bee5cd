"""Who chose what, and what the items are like, from somebody's own files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stabletrain.checks import number
from stabletrain.data.array_files import read_arrays
from stabletrain.data.arrays import Integers
from stabletrain.data.files import numbers, read_columns
from stabletrain.data.interactions import divided, interaction_splits
from stabletrain.data.splits import Splits
from stabletrain.data.table import Floats, did_you_mean
from stabletrain.errors import ConfigurationError
from stabletrain.randomness import key

NONFINITE = ("raise", "zero", "median")
KINDS = ("token", "token_seq", "float", "float_seq")  # what a header may say of a column, as in `user_id:token`


def from_interaction_table(
    path: str | Path,
    features: Mapping[str, str | Path],
    *,
    items_file: str | Path | None = None,
    user: str = "user_id",
    item: str = "item_id",
    rating: str | None = None,
    timestamp: str | None = None,
    min_rating: float | None = None,
    weighted: bool = False,
    delimiter: str | None = None,
    nonfinite: str = "raise",
    limit: float | None = 10.0,
    new_items: float = 0.0,
    negatives: int = 1,
    cold: int = 0,
    validation: float = 0.15,
    test: float = 0.15,
    seed: int = 0,
) -> Splits:
    """Read a table of interactions, and arrays with the items' features.

    Args:
        path: the table, a row for each interaction: .inter or .tsv (tabs), .csv or .txt (commas), or .parquet. Names of
            columns may be followed by their kind, as in `user_id:token`.
        features: files of the items' features by modality, [items, F]: .npy, or .npz with one array, or with several of
            which one has the modality's name. At least one.
        items_file: text file with the item of each row of the features, one a line; None = the items in the table are
            numbers of rows, from 0.
        user: name of the column of users.
        item: name of the column of items.
        rating: name of a column of numbers; None = all interactions count alike.
        timestamp: name of a column of numbers that rise with time: then each user's last interactions are for the test,
            those before for validation. None = the seed decides.
        min_rating: rows with a smaller rating are left out; None = none is.
        weighted: multiply each sample's loss with its rating, which has to be above 0.
        delimiter: character between cells; None = by the file's name.
        nonfinite: NaN and Inf among the features: `raise` (stop, naming the place), `zero`, or `median` (of the
            column's finite values).
        limit: standardised features are kept from -limit to limit; None = no limit.
        new_items: share of the items that nobody trains with, so that the recall of new items can be measured.
        negatives: items drawn for each training sample.
        cold: an item that was chosen at most so often in training counts as cold.
        validation: share of each user's interactions in the validation part.
        test: share of each user's interactions in the test part.
        seed: number that decides what isn't decided by time.

    Returns:
        As `interaction_splits`.

    Raises:
        ConfigurationError: for anything in the files that can't be used, with its place.
    """
    if nonfinite not in NONFINITE:
        raise ConfigurationError(
            f"nonfinite is {nonfinite!r}; allowed: {', '.join(NONFINITE)}.{did_you_mean(str(nonfinite), NONFINITE)}"
        )
    number("new_items", new_items, below=1)
    if rating is None and (weighted or min_rating is not None):
        raise ConfigurationError("min_rating and weighted need the name of the column of ratings: give `rating`.")
    notes: list[str] = []
    tables = _read_features(features, nonfinite, notes)
    rows = len(next(iter(tables.values())))
    by_tabs = Path(path).suffix.lower() in (".inter", ".tsv")
    cells, source, where = read_columns(path, delimiter=delimiter or ("\t" if by_tabs else ","))
    columns = {_without_kind(name): values for name, values in cells.items()}
    for name in (user, item, rating, timestamp):
        if name is not None and name not in columns:
            raise ConfigurationError(
                f"{source} has no column {name!r}; it has: {', '.join(columns)}.{did_you_mean(name, list(columns))}"
            )
    if len(columns[user]) == 0:
        raise ConfigurationError(f"{source} is empty: it has column names, but no row of data.")
    owners = [_name(cell, user, source, where(row)) for row, cell in enumerate(columns[user])]
    users = np.unique(owners, return_inverse=True)[1]
    words = [_name(cell, item, source, where(row)) for row, cell in enumerate(columns[item])]
    items = _item_numbers(words, item, rows, items_file, source, where)
    ratings = _finite(columns[rating], rating, source, where) if rating is not None else None
    time = _finite(columns[timestamp], timestamp, source, where) if timestamp is not None else None
    if weighted and ratings is not None and (ratings <= 0).any():
        row = int(np.flatnonzero(ratings <= 0)[0])
        raise ConfigurationError(
            f"{source}, {where(row)}: the rating is {ratings[row]}; weights of the loss have to be above 0. Leave such "
            "rows out, or weigh all alike with weighted=false."
        )
    keep = _kept(users, items, ratings, min_rating, source, notes)
    parts_of, users = np.unique(users[keep], return_inverse=True)
    items = items[keep]
    random = np.random.default_rng(key(seed, "new items"))
    new: Integers = random.permutation(rows)[: round(new_items * rows)].astype(np.int64)
    parts = divided(
        users,
        items,
        validation=validation,
        test=test,
        seed=seed,
        cold_items=new,
        time=None if time is None else time[keep],
    )
    unused = rows - len(np.unique(items))
    if unused > 0:
        notes.append(f"{source}: {unused} of {rows} items were chosen by nobody; they are ranked by their features.")
    return interaction_splits(
        users.astype(np.int64),
        items,
        parts,
        user_count=len(parts_of),
        features=tables,
        weights=ratings[keep] if weighted and ratings is not None else None,
        negatives=negatives,
        cold=cold,
        limit=limit,
        name=Path(path).stem,
        notes=notes,
    )


def _without_kind(name: str) -> str:
    word, _, kind = name.rpartition(":")
    return word if word and kind in KINDS else name


def _name(cell: Any, column: str, source: str, place: str) -> str:
    if cell is None or str(cell).strip() == "":
        raise ConfigurationError(f"{source}, {place}: the column {column!r} is empty. Name the {column} of each row.")
    return str(cell).strip()


def _finite(cells: Sequence[Any], column: str, source: str, where: Callable[[int], str]) -> Floats:
    values = np.array(numbers(list(cells), column, source, where), dtype=np.float64)
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ConfigurationError(
            f"{source}, {where(row)}: the column {column!r} holds {cells[row]!r}; each row needs a finite number."
        )
    return values


def _kept(
    users: Integers, items: Integers, ratings: Floats | None, least: float | None, source: str, notes: list[str]
) -> Integers:
    """Return the rows that stay, in their order: rated well enough, and of each pair the last one."""
    keep = np.arange(len(users))
    if least is not None and ratings is not None:
        keep = keep[ratings >= least]
        if len(keep) < len(users):
            notes.append(f"{source}: {len(users) - len(keep)} rows were left out, for a rating below {least}.")
        if len(keep) == 0:
            raise ConfigurationError(f"{source}: no row has a rating of {least} or more; choose a smaller min_rating.")
    pairs = np.stack([users[keep], items[keep]])[:, ::-1]
    _, last = np.unique(pairs, axis=1, return_index=True)
    once = np.sort(len(keep) - 1 - last)
    if len(once) < len(keep):
        notes.append(f"{source}: {len(keep) - len(once)} rows repeat a user with an item; the last one of each stays.")
    return keep[once]


def _item_numbers(
    words: Sequence[str],
    column: str,
    rows: int,
    items_file: str | Path | None,
    source: str,
    where: Callable[[int], str],
) -> Integers:
    """Return the row of the features that belongs to the item of each interaction."""
    if items_file is None:
        known = {str(row): row for row in range(rows)}
        allowed = f"without items_file, items are numbers of the features' rows, from 0 to {rows - 1}"
    else:
        try:
            lines = Path(items_file).expanduser().read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(
                f"the list of items {str(items_file)!r} can't be read: {error}. Give a text file with an item a line."
            ) from error
        listed = [line.strip() for line in lines]
        while listed and listed[-1] == "":
            listed.pop()
        known = {word: row for row, word in enumerate(listed)}
        if len(known) < len(listed):
            twice = next(word for row, word in enumerate(listed) if known[word] != row)
            raise ConfigurationError(f"the list of items {str(items_file)!r} names {twice!r} more than once.")
        if len(listed) != rows:
            raise ConfigurationError(
                f"the list of items {str(items_file)!r} names {len(listed)} items, but the features have {rows} rows: "
                "each row needs its item, in the same order."
            )
        allowed = f"it isn't in the list of items {str(items_file)!r}"
    for row, word in enumerate(words):
        if word not in known:
            raise ConfigurationError(
                f"{source}, {where(row)}: the column {column!r} names {word!r}, for which there are no features: "
                f"{allowed}. Give its features, or leave its rows out."
            )
    return np.array([known[word] for word in words], dtype=np.int64)


def _read_features(features: Mapping[str, str | Path], rule: str, notes: list[str]) -> dict[str, Floats]:
    if not features:
        raise ConfigurationError(
            "no features were given: give at least one modality, such as features.visual=looks.npy."
        )
    tables: dict[str, Floats] = {}
    for name, path in features.items():
        if not str(name).isidentifier():
            raise ConfigurationError(f"a modality is called {name!r}; a word of letters, digits and _ is needed.")
        source = f"the features {name} in {str(path)!r}"
        table = _read_array(Path(path).expanduser(), str(name), source)
        if table.ndim != 2 or table.dtype.kind not in "fiub" or 0 in table.shape:
            raise ConfigurationError(
                f"{source} are {table.dtype} of the shape {list(table.shape)}; real numbers of the shape "
                "[items, features] are needed."
            )
        if tables and len(table) != len(next(iter(tables.values()))):
            raise ConfigurationError(
                f"{source} have {len(table)} rows, but those of {next(iter(tables))} have "
                f"{len(next(iter(tables.values())))}: each modality needs a row for each item, in the same order."
            )
        tables[str(name)] = _cleaned(table.astype(np.float64), rule, source, notes)
    return tables


def _read_array(file: Path, name: str, source: str) -> Any:
    try:
        held = read_arrays(file, (".npy", ".npz"))
        if len(held) != 1 and name not in held:
            raise ValueError(f"it holds {', '.join(held) or 'nothing'}, but no array {name}")
        return held[name if name in held else next(iter(held))]
    except ValueError as error:
        raise ConfigurationError(
            f"{source} can't be read: {error}. Give a .npy file, or a .npz file with one array or one called {name}."
        ) from error


def _cleaned(table: Floats, rule: str, source: str, notes: list[str]) -> Floats:
    """Return the features without NaN, Inf and what float32 can't hold, by the rule; say what doesn't change."""
    with np.errstate(over="ignore"):
        bad = ~np.isfinite(table.astype(np.float32))
    if bad.any():
        row, column = (int(place) for place in np.argwhere(bad)[0])
        if rule == "raise":
            raise ConfigurationError(
                f"{source}: {int(bad.sum())} numbers in {int(bad.any(1).sum())} of {len(table)} rows are NaN or Inf, "
                f"the first one in row {row}, column {column} (from 0). Correct them, or choose nonfinite=zero or "
                "nonfinite=median."
            )
        notes.append(f"{source}: {int(bad.sum())} numbers that were NaN or Inf were replaced (nonfinite={rule}).")
        filling = np.zeros(table.shape[1])
        if rule == "median":
            for place in np.flatnonzero(bad.any(0)).tolist():
                known = table[~bad[:, place], place]
                filling[place] = np.median(known) if len(known) > 0 else 0.0
        table = np.where(bad, filling, table)
    constant = table.max(0) == table.min(0)
    if constant.all():
        raise ConfigurationError(f"{source}: no column changes from item to item, so there is nothing to learn from.")
    if constant.any():
        notes.append(f"{source}: {int(constant.sum())} of {len(constant)} columns don't change; they count as 0.")
    return table
