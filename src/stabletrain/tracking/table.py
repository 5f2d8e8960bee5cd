"""Tables as CSV files: whole rows, columns fixed when the file is begun, rows dropped again when a run goes back."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stabletrain.folder import AppendedFile


class Table:
    """A CSV file that grows by whole rows.

    The first row says which columns there are. What a later row lacks stays empty; what it has besides is left out.

    Args:
        path: the file; it is opened, or begun, with the first row.
        columns: those that the file begins with, in this order, as far as the first row has them.
        last: those that come after all others.
        leave_out: names that never become columns.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     table = Table(Path(folder, "a.csv"), columns=("step", "loss"))
        ...     table.add({"loss": 0.5, "step": 1, "applied": True})
        ...     table.add({"loss": None, "step": 2, "applied": False})
        ...     table.close()
        ...     print(Path(folder, "a.csv").read_text(), end="")
        step,loss,applied
        1,0.5,1
        2,,0
    """

    def __init__(
        self, path: Path, *, columns: tuple[str, ...], last: tuple[str, ...] = (), leave_out: tuple[str, ...] = ()
    ) -> None:
        self.path = path
        self._first, self._last, self._leave_out = columns, last, leave_out
        self._columns: list[str] = []
        self._file: AppendedFile | None = None

    def add(self, record: Mapping[str, Any]) -> None:
        """Add a row.

        Raises:
            OSError: it could not be written; the file is as it was.
        """
        if self._file is None:
            self._open()
        assert self._file is not None
        if self._columns:
            self._file.append(_line([record.get(name) for name in self._columns]))
            return
        columns = self._columns_of(record)
        self._file.append(_line(columns) + _line([record[name] for name in columns]))
        self._columns = columns

    def _open(self) -> None:
        self._file = AppendedFile(self.path)
        if self._file.size > 0:
            with self.path.open(newline="") as file:
                self._columns = next(csv.reader(file))

    def _columns_of(self, record: Mapping[str, Any]) -> list[str]:
        named = {*self._first, *self._last, *self._leave_out}
        middle = [name for name in record if name not in named]
        return [name for name in (*self._first, *middle, *self._last) if name in record]

    def truncate(self, column: str, end: int) -> None:
        """Drop the first row in which `column` is `end` or more, all rows after it, and a torn last line.

        Args:
            column: its values are whole numbers that never fall from row to row.
            end: the first value to drop.

        Raises:
            OSError: the file can't be read or cut.
        """
        self.close()
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return
        lines = data.splitlines(keepends=True)
        header = next(csv.reader([lines[0].decode()])) if lines else []
        kept = 0
        if column in header:
            place, size = header.index(column), len(lines[0])
            for line in lines[1:]:
                size += len(line)
                if not line.endswith(b"\n") or _whole_number(line, place, len(header)) >= end:
                    break
                kept = size
        # Cut in place: it needs no space on a full disk. Without rows the header goes too, and is written again.
        if kept < len(data):
            os.truncate(self.path, kept)

    def sync(self) -> None:
        """Let the rows survive a power cut."""
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        """Close the file; another row opens it again."""
        if self._file is not None:
            self._file.close()
        self._file, self._columns = None, []


def _whole_number(line: bytes, place: int, columns: int) -> float:
    """Return the value at `place` of a line, or infinity (so that it is dropped) when the line isn't a whole row."""
    cells = next(csv.reader([line.decode(errors="replace")]))
    try:
        return int(cells[place]) if len(cells) == columns else float("inf")
    except ValueError:
        return float("inf")


def _line(values: list[Any]) -> bytes:
    cells = [_cell(value) for value in values]
    text = ",".join(cells)
    if text.count(",") != len(cells) - 1 or '"' in text or "\n" in text or "\r" in text:
        quoted = io.StringIO()
        csv.writer(quoted, lineterminator="\n").writerow([" ".join(cell.splitlines()) for cell in cells])
        return quoted.getvalue().encode()
    return f"{text}\n".encode()


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, int):
        return str(value)
    return repr(float(value))  # the shortest text that reads back as the same number
