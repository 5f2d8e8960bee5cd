"""Files with arrays in them, by numpy, torch and safetensors: read without running any code of theirs."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

Arrays = dict[str, np.ndarray[Any, np.dtype[Any]]]
KINDS = (".npy", ".npz", ".pt", ".pth", ".safetensors")


def read_arrays(file: Path, kinds: Sequence[str] = KINDS) -> Arrays:
    """Return the arrays in a file by their names; a single one without a name is called "".

    Args:
        file: whose name ends with one of `kinds`. Of a dictionary in a .pt file the tensors count.
        kinds: endings that are allowed.

    Returns:
        Arrays as they are in the file; floating tensors are float64, since numpy has no bfloat16.

    Raises:
        ValueError: for whatever keeps it from being read, in one line.

    Example:
        >>> read_arrays(Path("table.csv"))
        Traceback (most recent call last):
        ValueError: its name ends with '.csv'
    """
    if file.suffix not in kinds:
        raise ValueError(f"its name ends with {file.suffix!r}")
    try:
        return _read(file)
    except Exception as error:
        if not isinstance(error, _unreadable()):
            raise
        raise ValueError(str(error).splitlines()[0] if str(error) else type(error).__name__) from error


def _read(file: Path) -> Arrays:
    if file.suffix in (".npy", ".npz"):
        with file.open("rb") as stream:
            held: Any = np.load(stream, allow_pickle=False)
            return {name: held[name] for name in held.files} if hasattr(held, "files") else {"": held}
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        held = load_file(file)
    else:
        held = torch.load(file, map_location="cpu", weights_only=True)
    named = held if isinstance(held, dict) else {"": held}
    found = {str(name): array_of(item) for name, item in named.items() if isinstance(item, torch.Tensor)}
    if not found:
        raise ValueError(f"it holds no tensor, but a {type(held).__name__}")
    return found


def array_of(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """Return a tensor as an array, a floating one in float64."""
    tensor = tensor.detach().cpu()
    array: np.ndarray[Any, Any] = (tensor.double() if tensor.is_floating_point() else tensor).numpy()
    return array


def _unreadable() -> tuple[type[Exception], ...]:
    """Return what the libraries raise for files that are missing, torn, or of something else."""
    from safetensors import SafetensorError

    errors = (OSError, EOFError, ValueError, TypeError, AttributeError, RuntimeError, KeyError)
    return (*errors, pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError)
