"""Files with arrays: what was written is read, and whatever is torn is told in one line."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from stabletrain.data.array_files import KINDS, read_arrays

VALUES = np.arange(6.0).reshape(2, 3)


def write(folder: Path, kind: str) -> Path:
    file = folder / f"file{kind}"
    if kind == ".npy":
        np.save(file, VALUES)
    elif kind == ".npz":
        np.savez(file, a=VALUES)
    elif kind == ".safetensors":
        save_file({"a": torch.from_numpy(VALUES).bfloat16()}, file)
    else:
        torch.save({"a": torch.from_numpy(VALUES).bfloat16(), "note": "left out"}, file)
    return file


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_read_and_cut_short_it_is_told(kind: str, tmp_path: Path) -> None:
    file = write(tmp_path, kind)
    held = read_arrays(file)
    assert list(held) == ["" if kind == ".npy" else "a"]
    (found,) = held.values()
    assert found.dtype == np.float64
    assert np.array_equal(found, VALUES)  # these numbers are exact in bfloat16
    whole = file.read_bytes()
    for share in (0.0, 0.1, 0.5, 0.9):
        file.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=r"\S") as error:
            read_arrays(file)
        assert "\n" not in str(error.value)


def test_a_tensor_without_a_name_and_what_is_no_file_of_arrays(tmp_path: Path) -> None:
    torch.save(torch.ones(2), tmp_path / "bare.pt")
    assert read_arrays(tmp_path / "bare.pt")[""].tolist() == [1.0, 1.0]
    torch.save({"note": "nothing"}, tmp_path / "words.pt")
    (tmp_path / "code.pt").write_bytes(pickle.dumps(Path("x"), protocol=2))
    for name, message in (
        ("words.pt", "it holds no tensor"),
        ("code.pt", r"\S"),
        ("none.npy", "No such file"),
        ("table.csv", "its name ends with '.csv'"),
    ):
        with pytest.raises(ValueError, match=message):
            read_arrays(tmp_path / name)
    with pytest.raises(ValueError, match=r"its name ends with '\.pt'"):
        read_arrays(tmp_path / "bare.pt", (".npy",))
