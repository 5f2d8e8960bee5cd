"""Data from files: CSV, NumPy's .npz, Parquet."""

from __future__ import annotations

import csv
import math
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stabletrain.data.splits import Splits
from stabletrain.data.table import Table, did_you_mean, encode_labels
from stabletrain.errors import ConfigurationError

MISSING = ("", "na", "n/a", "null", "none")  # cells that hold no value; `nan` is a number of its own


def existing(path: str | Path, kind: str) -> Path:
    """Return the path of a file, or say that there is none.

    Args:
        path: the file; relative to the current folder.
        kind: of file, for the message.

    Raises:
        ConfigurationError: for one that doesn't exist.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "doesn't exist"
        close = did_you_mean(file.name, [item.name for item in file.parent.iterdir()]) if file.parent.is_dir() else ""
        raise ConfigurationError(
            f"the {kind} file {str(path)!r} {what} (looked for {file.absolute()}). Give the path of an existing "
            f"file.{close}"
        )
    return file


def _chosen(names: Sequence[str], target: str, features: Sequence[str] | None, source: str) -> list[str]:
    """Return the names of the feature columns, after a check of all names."""
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigurationError(
            f"{source} has more than one column {repeated[0]!r}: give each column a name of its own."
        )
    wanted = [name for name in names if name != target] if features is None else [str(name) for name in features]
    for name in (target, *wanted):
        if name not in names:
            shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            raise ConfigurationError(f"{source} has no column {name!r}; it has: {shown}.{did_you_mean(name, names)}")
    if target in wanted:
        raise ConfigurationError(f"{source}: the column {target!r} is the target and can't be among the features too.")
    if len(wanted) == 0:
        raise ConfigurationError(
            f"{source} has no column besides the target {target!r}: there is nothing to learn from."
        )
    return wanted


def _floats(cells: Sequence[str], column: str, source: str, where: Callable[[int], str]) -> list[float]:
    try:
        return [float(cell) for cell in cells]
    except ValueError:
        return [_float(cell, row, column, source, where) for row, cell in enumerate(cells)]


def _float(cell: str, row: int, column: str, source: str, where: Callable[[int], str]) -> float:
    if cell.strip().lower() in MISSING:
        return math.nan
    try:
        return float(cell)
    except ValueError:
        raise ConfigurationError(
            f"{source}, {where(row)}, column {column!r}: {cell!r} is not a number. Correct it, or leave the column "
            "out by `features`."
        ) from None


def _read_csv(
    file: Path, source: str, header: bool, delimiter: str, encoding: str
) -> tuple[list[str], list[list[str]], list[int]]:
    """Return the column names, the rows of cells, and the line in which each row ends."""
    if len(delimiter) != 1:
        raise ConfigurationError(f"delimiter is {delimiter!r}; one character is allowed, such as ',' ';' or a tab.")
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        with file.open(newline="", encoding=encoding) as stream:
            reader = csv.reader(stream, delimiter=delimiter)
            for cells in reader:
                if len(cells) > 0:
                    rows.append(cells)
                    lines.append(reader.line_num)
    except (OSError, UnicodeDecodeError, LookupError, csv.Error) as error:
        raise ConfigurationError(
            f"{source} can't be read as text in {encoding}: {error}. Check file and encoding."
        ) from error
    if len(rows) == 0:
        raise ConfigurationError(f"{source} is empty: it has no row of data.")
    names = [name.strip() for name in rows[0]] if header else [str(place) for place in range(len(rows[0]))]
    if header:
        del rows[0], lines[0]
    for cells, line in zip(rows, lines, strict=True):
        if len(cells) != len(names):
            raise ConfigurationError(
                f"{source}, line {line}: {len(cells)} cells, where the first line has {len(names)} (delimiter "
                f"{delimiter!r}). Correct the line, or set `delimiter`."
            )
    return names, rows, lines


def from_csv(
    path: str | Path,
    target: str | int,
    features: Sequence[str] | None = None,
    *,
    header: bool = True,
    delimiter: str = ",",
    encoding: str = "utf-8-sig",
    classes: Sequence[Any] | None = None,
    nonfinite: str = "raise",
    standardize: bool = True,
    validation: float = 0.15,
    test: float = 0.15,
    seed: int = 0,
) -> Splits:
    """Read a table of numbers with a column of labels from a CSV file.

    Args:
        path: the file; relative to the current folder.
        target: name of the column with the labels: whole numbers from 0, or words (numbered in sorted order).
        features: names of the columns to learn from; None = all but the target.
        header: the first line holds the names; otherwise columns are called 0, 1, 2, ...
        delimiter: character between cells.
        encoding: of the text.
        classes: the labels that are allowed, in the order of their class numbers; None = those that occur.
        nonfinite: `raise`, `drop`, `zero` or `impute`, see `Table.splits`. Empty cells and NA count as NaN.
        standardize: bring each column to mean 0 and standard deviation 1 by the training part.
        validation: share of the validation part.
        test: share of the test part.
        seed: number that decides which row goes where.

    Returns:
        Inputs float32 [N, F], targets int64 [N].

    Raises:
        ConfigurationError: for anything in the file that can't be used, with its place.
    """
    file = existing(path, "CSV")
    source = f"the CSV file {str(path)!r}"
    names, rows, lines = _read_csv(file, source, header, delimiter, encoding)
    target = str(target)
    wanted = _chosen(names, target, features, source)
    if len(rows) == 0:
        raise ConfigurationError(f"{source} is empty: it has column names, but no row of data.")
    cells = dict(zip(names, zip(*rows, strict=True), strict=True))

    def where(row: int) -> str:
        return f"line {lines[row]}"

    values = np.array([_floats(cells[name], name, source, where) for name in wanted], dtype=np.float64).T
    labels, known = encode_labels(cells[target], where=where, source=f"{source}, column {target!r}", classes=classes)
    table = Table(values, labels, wanted.__getitem__, known, source, where)
    return table.splits(
        nonfinite=nonfinite, standardize=standardize, validation=validation, test=test, seed=seed, name=file.stem
    )


def from_npz(
    path: str | Path,
    x: str = "x",
    y: str = "y",
    *,
    classes: Sequence[Any] | None = None,
    nonfinite: str = "raise",
    standardize: bool = True,
    validation: float = 0.15,
    test: float = 0.15,
    seed: int = 0,
) -> Splits:
    """Read an array of features and one of labels from a .npz file.

    Args:
        path: the file; relative to the current folder.
        x: name of the features: numbers [N, ...], such as [N, F] or [N, channels, height, width].
        y: name of the labels [N]: whole numbers from 0, or words (numbered in sorted order).
        classes: the labels that are allowed, in the order of their class numbers; None = those that occur.
        nonfinite: `raise`, `drop`, `zero` or `impute`, see `Table.splits`.
        standardize: bring each feature or channel to mean 0 and standard deviation 1 by the training part.
        validation: share of the validation part.
        test: share of the test part.
        seed: number that decides which row goes where.

    Returns:
        Inputs float32 [N, ...], targets int64 [N].

    Raises:
        ConfigurationError: for anything in the file that can't be used, with its place.
    """
    file = existing(path, ".npz")
    source = f"the .npz file {str(path)!r}"
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            names = list(getattr(archive, "files", ()))
            for name in (x, y):
                if name not in names:
                    raise ConfigurationError(
                        f"{source} has no array {name!r}; it has: "
                        f"{', '.join(names) or 'none'}.{did_you_mean(name, names)}"
                    )
            features, values = archive[x], archive[y]
    except ConfigurationError:
        raise
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ConfigurationError(
            f"{source} can't be read: {error}. Write it by numpy.savez(path, {x}=..., {y}=...) with arrays of numbers."
        ) from error
    if features.dtype.kind not in "fiub" or features.ndim < 2 or features.size == 0 != len(features):
        raise ConfigurationError(
            f"{source}: the array {x!r} has shape {list(features.shape)} and type {features.dtype}; real numbers of "
            "the shape [samples, features, ...] are needed."
        )
    if values.ndim != 1:
        raise ConfigurationError(
            f"{source}: the array {y!r} has shape {list(values.shape)}; one label per sample is needed."
        )

    def where(row: int) -> str:
        return f"row {row} (from 0)"

    def column(place: int) -> str:
        return f"{x}[{', '.join(str(int(index)) for index in np.unravel_index(place, features.shape[1:]))}]"

    labels, known = encode_labels(values.tolist(), where=where, source=f"{source}, array {y!r}", classes=classes)
    features = features if features.dtype in (np.float32, np.float64) else features.astype(np.float64)
    table = Table(features, labels, column, known, source, where)
    return table.splits(
        nonfinite=nonfinite, standardize=standardize, validation=validation, test=test, seed=seed, name=file.stem
    )


def _pyarrow() -> Any:
    """Return pyarrow, or say how to get it."""
    try:
        import pyarrow  # type: ignore[import-not-found, import-untyped, unused-ignore]
        import pyarrow.parquet  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise ConfigurationError(
            "data=parquet needs pyarrow, which is not installed: pip install 'stabletrain[parquet]' (or pip install "
            "pyarrow), or convert the file to CSV or .npz."
        ) from error
    return pyarrow


def from_parquet(
    path: str | Path,
    target: str,
    features: Sequence[str] | None = None,
    *,
    classes: Sequence[Any] | None = None,
    nonfinite: str = "raise",
    standardize: bool = True,
    validation: float = 0.15,
    test: float = 0.15,
    seed: int = 0,
) -> Splits:
    """Read a table of numbers with a column of labels from a Parquet file; needs the extra `parquet` (pyarrow).

    Args:
        path: the file; relative to the current folder.
        target: name of the column with the labels: whole numbers from 0, or words (numbered in sorted order).
        features: names of the columns to learn from; None = all but the target.
        classes: the labels that are allowed, in the order of their class numbers; None = those that occur.
        nonfinite: `raise`, `drop`, `zero` or `impute`, see `Table.splits`. Null counts as NaN.
        standardize: bring each column to mean 0 and standard deviation 1 by the training part.
        validation: share of the validation part.
        test: share of the test part.
        seed: number that decides which row goes where.

    Returns:
        Inputs float32 [N, F], targets int64 [N].

    Raises:
        ConfigurationError: for anything in the file that can't be used, with its place; when pyarrow is missing.
    """
    pyarrow = _pyarrow()
    file = existing(path, "Parquet")
    source = f"the Parquet file {str(path)!r}"
    try:
        names = [str(name) for name in pyarrow.parquet.read_schema(file).names]
        wanted = _chosen(names, target, features, source)
        read = pyarrow.parquet.read_table(file, columns=[*wanted, target])
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigurationError(f"{source} can't be read: {error}. Check that it is a Parquet file.") from error

    def where(row: int) -> str:
        return f"row {row} (from 0)"

    columns = [numbers(read[name].to_pylist(), name, source, where) for name in wanted]
    labels, known = encode_labels(
        read[target].to_pylist(), where=where, source=f"{source}, column {target!r}", classes=classes
    )
    values = np.array(columns, dtype=np.float64).T
    table = Table(values, labels, wanted.__getitem__, known, source, where)
    return table.splits(
        nonfinite=nonfinite, standardize=standardize, validation=validation, test=test, seed=seed, name=file.stem
    )


def numbers(values: list[Any], column: str, source: str, where: Callable[[int], str]) -> list[float]:
    """Return numbers as floats and null as NaN; text is read as in CSV.

    Args:
        values: one for each row.
        column: its name, for messages.
        source: names the file, for messages.
        where: names the place of a row, for messages.

    Raises:
        ConfigurationError: for text that is no number, with its row.
    """
    return [
        math.nan
        if value is None
        else float(value)
        if isinstance(value, (int, float))
        else _float(str(value), row, column, source, where)
        for row, value in enumerate(values)
    ]


def read_columns(
    path: str | Path, *, header: bool = True, delimiter: str = ",", encoding: str = "utf-8-sig"
) -> tuple[dict[str, list[Any]], str, Callable[[int], str]]:
    """Read all columns of a table as they are: text from a CSV file, values from a Parquet file.

    Args:
        path: the file, whose name ends with .csv or .parquet; relative to the current folder.
        header: of CSV, the first line holds the names; otherwise columns are called 0, 1, 2, ...
        delimiter: of CSV, the character between cells.
        encoding: of CSV, of the text.

    Returns:
        The columns by their names; what to call the file in messages; and what names the place of a row.

    Raises:
        ConfigurationError: for a file that can't be read.
    """
    kind = {".csv": "CSV", ".tsv": "CSV", ".txt": "CSV", ".inter": "CSV", ".parquet": "Parquet", ".pq": "Parquet"}.get(
        Path(path).suffix.lower()
    )
    if kind is None:
        raise ConfigurationError(f"the table {str(path)!r} is neither a .csv nor a .parquet file; give one of these.")
    file = existing(path, kind)
    source = f"the {kind} file {str(path)!r}"
    if kind == "CSV":
        names, rows, lines = _read_csv(file, source, header, delimiter, encoding)
        cells = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in names]
    else:
        pyarrow = _pyarrow()
        try:
            read = pyarrow.parquet.read_table(file)
        except (OSError, pyarrow.ArrowException) as error:
            raise ConfigurationError(f"{source} can't be read: {error}. Check that it is a Parquet file.") from error
        names, cells = [str(name) for name in read.column_names], [column.to_pylist() for column in read.columns]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigurationError(
            f"{source} has more than one column {repeated[0]!r}: give each column a name of its own."
        )
    return (
        dict(zip(names, cells, strict=True)),
        source,
        lambda row: f"line {lines[row]}" if kind == "CSV" else f"row {row} (from 0)",
    )
