"""CSV, .npz and Parquet: what is read, what is cleaned, and one message for each thing that can be wrong."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from processes import run
from stabletrain.data import Splits, from_csv, from_npz, from_parquet
from stabletrain.errors import ConfigurationError

RAW: dict[str, Any] = {"standardize": False, "validation": 0.0, "test": 0.0}


def table(rows: int = 12) -> str:
    """Return a table with two features and a label."""
    lines = [f"{row},{row * 10.5},{'abc'[row % 3]}" for row in range(rows)]
    return "\n".join(["width,height,kind", *lines]) + "\n"


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def _write(text: str, name: str = "mine.csv", encoding: str = "utf-8") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding=encoding, newline="")
        return path

    return _write


def rows_of(splits: Splits) -> list[list[float]]:
    rows: list[list[float]] = splits.train.inputs.tolist()
    return rows


def test_a_table_with_words_as_labels(write: Any) -> None:
    splits = from_csv(write(table()), "kind", **RAW)
    assert splits.classes == ("a", "b", "c")
    assert rows_of(splits) == [[row, row * 10.5] for row in range(12)]
    assert splits.train.targets.tolist() == [row % 3 for row in range(12)]
    assert splits.train.targets.dtype == torch.int64
    assert splits.facts == {"num_classes": 3, "class_counts": [4, 4, 4], "in_features": 2}
    assert splits.name == "mine"
    assert splits.notes == []


def test_a_table_is_divided_stratified_and_standardised_by_the_training_part(write: Any) -> None:
    splits = from_csv(write(table(60)), "kind", validation=0.2, test=0.1, seed=2)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [42, 12, 6]
    for part in (splits.train, splits.validation, splits.test):
        assert len(set(np.bincount(part.targets).tolist())) == 1
    torch.testing.assert_close(splits.train.inputs.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(splits.train.inputs.std(0, correction=0), torch.ones(2))
    raw = from_csv(write(table(60)), "kind", validation=0.2, test=0.1, seed=2, standardize=False)
    mean, deviation = raw.train.inputs.double().mean(0), raw.train.inputs.double().std(0, correction=0)
    torch.testing.assert_close(
        splits.test.inputs.double(), (raw.test.inputs.double() - mean) / deviation, atol=1e-5, rtol=0
    )


def test_chosen_features_keep_their_order(write: Any) -> None:
    splits = from_csv(write(table()), "kind", ["height", "width"], **RAW)
    assert rows_of(splits)[2] == [21.0, 2.0]


def test_no_header_other_delimiter_quotes_blank_lines_and_a_byte_order_mark(write: Any) -> None:
    splits = from_csv(write('1;"2.5";0\n\n3;4;1\r\n', encoding="utf-8-sig"), 2, header=False, delimiter=";", **RAW)
    assert rows_of(splits) == [[1.0, 2.5], [3.0, 4.0]]
    assert splits.train.targets.tolist() == [0, 1]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_numbers_are_read_exactly(tmp_path_factory: pytest.TempPathFactory, numbers: list[float]) -> None:
    path = tmp_path_factory.mktemp("exact") / "mine.csv"
    path.write_text("x,y\n" + "".join(f"{number!r},0\n" for number in numbers))
    assert rows_of(from_csv(path, "y", **RAW)) == [[number] for number in numbers]


@pytest.mark.parametrize("labels", [["1", "0", "2"], ["1.0", "0", " 2 "]])
def test_whole_numbers_are_class_numbers(write: Any, labels: list[str]) -> None:
    splits = from_csv(write("x,y\n" + "".join(f"0,{label}\n" for label in labels)), "y", **RAW)
    assert splits.train.targets.tolist() == [1, 0, 2]


def test_classes_can_be_listed(write: Any) -> None:
    path = write("x,y\n0,5\n0,3\n0,5\n")
    splits = from_csv(path, "y", classes=[5, 3, 4], **RAW)
    assert splits.train.targets.tolist() == [0, 1, 0]
    assert splits.facts["num_classes"] == 3
    assert splits.facts["class_counts"] == [2, 1, 0]
    assert splits.classes == ("5", "3", "4")


def test_a_constant_column_becomes_zero(write: Any) -> None:
    splits = from_csv(write("x,c,y\n" + "".join(f"{row},0.1,{row % 2}\n" for row in range(20))), "y", test=0.0)
    assert torch.equal(splits.train.inputs[:, 1], torch.zeros(len(splits.train)))
    assert torch.isfinite(splits.validation.inputs).all()


# ---- NaN and Inf ----

HOLES = "x,z,y\n1,10,0\n2,nan,1\n3,30,0\n,40,1\n5,inf,0\n6,60,1\n7,1e39,0\n8,80,1\n"


def test_nan_and_inf_stop_by_default_with_row_and_column(write: Any) -> None:
    with pytest.raises(ConfigurationError) as error:
        from_csv(write(HOLES), "y", **RAW)
    for word in ("line 3", "'z'", "nan", "4 such cells in 4 rows", "nonfinite=drop", "zero", "impute"):
        assert word in str(error.value)


def test_a_number_beyond_float32_counts_as_infinite(write: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"line 2, column 'x': .* 1e\+39, beyond .* float32"):
        from_csv(write("x,y\n1e39,0\n"), "y", **RAW)


def test_rows_are_dropped_and_counted(write: Any) -> None:
    splits = from_csv(write(HOLES), "y", nonfinite="drop", **RAW)
    assert rows_of(splits) == [[1, 10], [3, 30], [6, 60], [8, 80]]
    assert splits.train.targets.tolist() == [0, 0, 1, 1]
    assert len(splits.notes) == 1
    assert "4 of 8 rows" in splits.notes[0]


def test_holes_become_zero(write: Any) -> None:
    splits = from_csv(write(HOLES), "y", nonfinite="zero", **RAW)
    assert [row[1] for row in rows_of(splits)] == [10, 0, 30, 40, 0, 60, 0, 80]
    assert rows_of(splits)[3][0] == 0
    assert "4 cells" in splits.notes[0]


def test_holes_become_the_median_of_the_training_part(write: Any) -> None:
    lines = "".join(f"{'nan' if row % 5 == 0 else row * row},{row % 2}\n" for row in range(100))
    splits = from_csv(write("x,y\n" + lines), "y", nonfinite="impute", standardize=False, seed=1)
    squares = {float(row * row) for row in range(100) if row % 5 != 0}
    known = [value for (value,) in rows_of(splits) if value in squares]
    everything = [value for part in (splits.train, splits.test) for (value,) in part.inputs.tolist()]
    filled = {value for value in everything if value not in squares}
    median = float(np.median(known))
    assert filled == {median} or (median in squares and filled == set())
    assert "20 cells" in splits.notes[0]


def test_a_column_without_a_value_can_not_be_imputed(write: Any) -> None:
    with pytest.raises(ConfigurationError, match="'z' has no finite value in the training part"):
        from_csv(write("x,z,y\n1,,0\n2,NA,1\n"), "y", nonfinite="impute", **RAW)


# ---- bad input: what was given, where, what to do ----


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        ("", {}, ["empty"]),
        ("x,y\n", {}, ["empty", "no row of data"]),
        (table(), {"target": "kinds"}, ["no column 'kinds'", "width, height, kind", "Did you mean kind?"]),
        (table(), {"target": "kind", "features": ["widht"]}, ["no column 'widht'", "Did you mean width?"]),
        (table(), {"target": "kind", "features": ["kind", "width"]}, ["'kind'", "target"]),
        (table(), {"target": "kind", "features": []}, ["nothing to learn from"]),
        ("y\n1\n", {}, ["nothing to learn from"]),
        ("x,x,y\n1,2,0\n", {}, ["more than one column 'x'"]),
        ("x,y\n1,0\noops,1\n", {}, ["line 3", "'x'", "'oops'", "not a number", "features"]),
        ("x,y\n1,0\n2\n", {}, ["line 3", "1 cells", "2", "delimiter"]),
        ("x,y\n1,0\n2,\n", {}, ["'y'", "line 3", "missing", "label"]),
        ("x,y\n1,0\n2,nan\n", {}, ["'y'", "line 3", "missing", "'nan'"]),
        ("x,y\n1,0\n2,-1\n", {}, ["'y'", "line 3", "-1", "out of range", "classes"]),
        ("x,y\n1,0\n2,1.5\n", {}, ["'y'", "line 3", "1.5", "out of range"]),
        ("x,y\n1,0\n2,inf\n", {}, ["'y'", "line 3", "inf", "out of range"]),
        ("x,y\n1,0\n2,2\n", {}, ["'y'", "no sample has the label 1", "without gaps", "classes"]),
        ("x,y\n1,0\n2,1000000000000\n", {}, ["no sample has the label 1"]),
        ("x,y\n1,0\n2,one\n", {}, ["line 3", "'one'", "word", "classes"]),
        ("x,y\n1,0\n2,7\n", {"classes": [0, 1]}, ["line 3", "'7'", "allowed: 0, 1"]),
        ("x,y\n1,cat\n2,dogg\n", {"classes": ["cat", "dog"]}, ["line 3", "'dogg'", "Did you mean dog?"]),
        (table(), {"target": "kind", "nonfinite": "ignore"}, ["'ignore'", "raise, drop, zero, impute"]),
        (table(), {"target": "kind", "nonfinite": "imputed"}, ["Did you mean impute?"]),
        (table(), {"target": "kind", "delimiter": ";;"}, ["delimiter", "';;'", "one character"]),
        (table(), {"target": "kind", "encoding": "utf-9"}, ["utf-9"]),
        ("x,y\nnan,0\n", {"nonfinite": "drop"}, ["empty after nonfinite=drop", "1 rows", "impute"]),
        (table(), {"target": "kind", "validation": 0.6, "test": 0.6}, ["0.6", "below 1"]),
        (
            "x,y\n1,0\n2,0\n3,0\n4,0\n5,b\n".replace("0", "a"),
            {"validation": 0.1},
            ["class 'b'", "1 sample,", "validation=0"],
        ),
    ],
)
def test_bad_tables_get_one_message(write: Any, text: str, arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as error:
        from_csv(**{"path": write(text), "target": "y", **RAW, **arguments})
    assert all(word in str(error.value) for word in words), error.value


def test_bytes_that_are_no_text_get_a_message(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_bytes(b"x,y\n\xff\xfe,0\n")
    with pytest.raises(ConfigurationError, match="can't be read as text in utf-8"):
        from_csv(path, "y")


@pytest.mark.parametrize(("read", "arguments"), [(from_csv, {"target": "y"}), (from_npz, {})])
def test_a_missing_file_gets_a_message(read: Any, arguments: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "data.file").write_text("")
    with pytest.raises(ConfigurationError) as error:
        read(tmp_path / "date.file", **arguments)
    assert all(word in str(error.value) for word in ("date.file", "doesn't exist", "Did you mean data.file?"))
    with pytest.raises(ConfigurationError, match="is a folder"):
        read(tmp_path, **arguments)


# ---- .npz ----


@pytest.mark.parametrize("shape", [(12, 3), (12, 5, 3), (12, 2, 4, 4)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8])
def test_arrays_of_any_shape_and_type(tmp_path: Path, shape: tuple[int, ...], dtype: Any) -> None:
    x = (np.random.default_rng(0).random(shape) * 200).astype(dtype)
    np.savez(tmp_path / "mine.npz", x=x, y=np.arange(12) % 2)
    splits = from_npz(tmp_path / "mine.npz", **RAW)
    assert torch.equal(splits.train.inputs, torch.from_numpy(x.astype(np.float32)))
    assert splits.train.targets.tolist() == [0, 1] * 6
    axes = {2: (0,), 3: (0, 1), 4: (0, 2, 3)}[len(shape)]
    standardised = from_npz(tmp_path / "mine.npz", validation=0.0, test=0.0).train.inputs
    torch.testing.assert_close(standardised.mean(axes), torch.zeros(standardised.mean(axes).shape), atol=1e-5, rtol=0)
    torch.testing.assert_close(standardised.std(axes, correction=0), torch.ones(standardised.mean(axes).shape))


def test_arrays_of_other_names_and_words_as_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", features=np.zeros((3, 2)), kind=np.array(["b", "a", "b"]))
    splits = from_npz(tmp_path / "mine.npz", "features", "kind", **RAW)
    assert splits.train.targets.tolist() == [1, 0, 1]
    assert splits.classes == ("a", "b")


X, Y = np.zeros((4, 2)), np.array([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": X}, ["no array 'y'", "it has: x"]),
        ({"X": X, "y": Y}, ["no array 'x'", "X, y"]),
        ({"x": X, "y": Y[:3]}, ["4 rows of features", "3 labels"]),
        ({"x": X, "y": np.zeros((4, 1))}, ["'y'", "[4, 1]", "one label"]),
        ({"x": np.zeros(4), "y": Y}, ["'x'", "[4]", "[samples, features, ...]"]),
        ({"x": X.astype(complex), "y": Y}, ["'x'", "complex"]),
        ({"x": X.astype(str), "y": Y}, ["'x'", "<U"]),
        ({"x": X.astype(object), "y": Y}, ["can't be read", "savez"]),
        ({"x": X[:0], "y": Y[:0]}, ["empty"]),
        ({"x": X, "y": np.array([0, 1, 0, np.nan])}, ["'y'", "row 3", "missing"]),
        ({"x": X, "y": np.array([0, 1, 0, -1])}, ["'y'", "row 3", "-1", "out of range"]),
        ({"x": np.where(np.arange(8).reshape(4, 2) == 5, np.inf, 0.0), "y": Y}, ["row 2", "'x[1]'", "inf"]),
        ({"x": np.where(np.arange(16).reshape(4, 2, 2) == 6, np.nan, 0.0), "y": Y}, ["row 1", "'x[1, 0]'", "nan"]),
    ],
)
def test_bad_arrays_get_one_message(tmp_path: Path, arrays: dict[str, Any], words: list[str]) -> None:
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(ConfigurationError) as error:
        from_npz(tmp_path / "mine.npz", **RAW)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 torn"])
def test_a_file_that_is_no_archive_gets_a_message(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mine.npz").write_bytes(content)
    with pytest.raises(ConfigurationError, match="can't be read"):
        from_npz(tmp_path / "mine.npz")


def test_a_single_array_is_no_archive(tmp_path: Path) -> None:
    with (tmp_path / "mine.npz").open("wb") as stream:
        np.save(stream, X)
    with pytest.raises(ConfigurationError, match=r"mine.npz'.* (can't be read|no array)"):
        from_npz(tmp_path / "mine.npz")


# ---- Parquet ----


def parquet(path: Path, columns: dict[str, Any]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet_reads_numbers_and_words(tmp_path: Path) -> None:
    path = parquet(tmp_path / "mine.parquet", {"x": [1.5, 2.5, 3.5], "n": [1, 2, 3], "kind": ["b", "a", "b"]})
    splits = from_parquet(path, "kind", **RAW)
    assert rows_of(splits) == [[1.5, 1.0], [2.5, 2.0], [3.5, 3.0]]
    assert splits.train.targets.tolist() == [1, 0, 1]
    assert from_parquet(path, "kind", ["n"], **RAW).facts["in_features"] == 1


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"x": [1.0, None], "y": [0, 1]}, ["row 1", "'x'", "nan", "nonfinite=drop"]),
        ({"x": [1.0, 2.0], "y": [0, None]}, ["'y'", "row 1", "missing"]),
        ({"x": ["1", "two"], "y": [0, 1]}, ["row 1", "'x'", "'two'", "not a number"]),
        ({"x": [1.0, 2.0], "z": [0, 1]}, ["no column 'y'", "x, z"]),
        ({"x": [], "y": []}, ["empty"]),
    ],
)
def test_bad_parquet_gets_one_message(tmp_path: Path, columns: dict[str, Any], words: list[str]) -> None:
    path = parquet(tmp_path / "mine.parquet", columns)
    with pytest.raises(ConfigurationError) as error:
        from_parquet(path, "y", **RAW)
    assert all(word in str(error.value) for word in words), error.value


def test_a_file_that_is_no_parquet_gets_a_message(tmp_path: Path) -> None:
    (tmp_path / "mine.parquet").write_text("x,y\n1,0\n")
    with pytest.raises(ConfigurationError, match="can't be read"):
        from_parquet(tmp_path / "mine.parquet", "y")


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from stabletrain.data import from_parquet\n"
        "from stabletrain.errors import ConfigurationError\n"
        "try:\n    from_parquet('mine.parquet', 'y')\n"
        "except ConfigurationError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = run([sys.executable, "-c", code], environment=environment)
    assert "stabletrain[parquet]" in result.stdout
    assert "CSV" in result.stdout
