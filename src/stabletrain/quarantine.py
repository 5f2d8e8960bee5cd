"""Samples found bad: left out from the next epoch on, and written down with what is odd about them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stabletrain.errors import ConfigurationError
from stabletrain.folder import json_text, write_whole

FILE_NAME = "quarantine.json"
FAR = 1000.0  # times the median magnitude of a tensor: what lies beyond is worth saying


class Quarantine:
    """Remembers which samples were found bad.

    What is left out changes at the start of an epoch only, so that the order of the samples within one stays a
    function of the epoch's number and this set.

    Example:
        >>> quarantine = Quarantine()
        >>> quarantine.add(7, epoch=0, step=3, sample=(torch.tensor([[1.0, float("nan")]]), torch.tensor([0])))
        >>> quarantine.found[7]["odd"], sorted(quarantine.frozen)
        ('inputs: 1 of 2 elements NaN', [])
        >>> quarantine.begin_epoch()
        >>> sorted(quarantine.frozen), quarantine.share(100), quarantine.exceeds(0.005, 100)
        ([7], 0.01, True)
    """

    def __init__(self) -> None:
        """Begin with nothing found."""
        self.found: dict[int, dict[str, Any]] = {}  # by index, in the order in which they were found
        self.frozen: frozenset[int] = frozenset()  # left out during the current epoch
        self._given: frozenset[int] = frozenset()  # found by another run

    def add(self, index: int, *, epoch: int, step: int, sample: Any = None) -> None:
        """Note a bad sample; one that is known already keeps its first note.

        Args:
            index: position in the data set.
            epoch: where it was found.
            step: within the epoch.
            sample: its data, alone or as a batch of one; for what is odd about it.
        """
        odd = what_is_odd(sample)
        self.found.setdefault(int(index), {"index": int(index), "epoch": epoch, "step": step, "odd": odd})

    def begin_epoch(self) -> None:
        """Leave out from now on what was found until now."""
        self.frozen = frozenset(self.found)

    def share(self, total: int) -> float:
        """Return which part of `total` samples this run has found bad; what was given to it doesn't count."""
        return len(self.found.keys() - self._given) / total

    def exceeds(self, limit: float, total: int) -> bool:
        """Return whether more than the part `limit` of `total` samples was found bad by this run."""
        return self.share(total) > limit

    def write(self, path: Path | str) -> None:
        """Replace the file `path` by the list as it is now.

        Raises:
            OSError: the disk is full or the folder can't be written; the old file is as it was.
        """
        write_whole(path, json_text({"indices": sorted(self.found), "samples": list(self.found.values())}))

    def take(self, path: Path | str, total: int) -> None:
        """Take over the list that another run, or somebody by hand, has written.

        Args:
            path: `{"indices": [...], "samples": [...]}`, of which `samples` may be missing, or `[...]` alone.
            total: samples in the data set.

        Raises:
            ConfigurationError: the file can't be read, or doesn't fit the data.
        """
        indices, samples = _read(Path(path))
        outside = [index for index in indices if index >= total]
        if outside:
            raise ConfigurationError(
                f"the quarantine {path} names sample {outside[0]}, but the training part has {total} samples, numbered "
                "from 0: it is of other data, or of another split (data and seed decide it)."
            )
        known = {sample["index"]: sample for sample in samples}
        for index in indices:
            unknown = {"index": index, "epoch": None, "step": None, "odd": "named by a list that was given"}
            self.found.setdefault(index, known.get(index, unknown))
        self._given |= frozenset(indices)

    def state_dict(self) -> dict[str, Any]:
        """Return what was found, what is left out in this epoch, and what was given."""
        return {
            "found": [dict(sample) for sample in self.found.values()],
            "frozen": sorted(self.frozen),
            "given": sorted(self._given),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.found = {int(sample["index"]): dict(sample) for sample in state["found"]}
        self.frozen, self._given = frozenset(state["frozen"]), frozenset(state["given"])


def _read(path: Path) -> tuple[list[int], list[dict[str, Any]]]:
    """Return indices and notes of a list on disk."""
    form = 'a file like {"indices": [3, 14]} is needed, for example the quarantine.json of another run'
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ConfigurationError(f"the quarantine {path} can't be read: {error.strerror}; {form}.") from error
    except ValueError as error:
        raise ConfigurationError(f"the quarantine {path} isn't JSON: {error}; {form}.") from error
    indices = content.get("indices") if isinstance(content, dict) else content
    if not isinstance(indices, list) or not all(type(index) is int and index >= 0 for index in indices):
        raise ConfigurationError(f"the quarantine {path} holds no list of whole numbers from 0; {form}.")
    samples = content.get("samples", []) if isinstance(content, dict) else []
    if not isinstance(samples, list) or not all(isinstance(item, dict) and "index" in item for item in samples):
        raise ConfigurationError(f"the quarantine {path} has `samples` without an `index`; {form}.")
    return indices, samples


def what_is_odd(sample: Any) -> str:
    """Say what is odd about a sample: NaN and Inf, and magnitudes far beyond the others in the same tensor.

    Args:
        sample: a tree of tensors and numbers, alone or as a batch of one; a pair is taken for (inputs, label).

    Returns:
        One clause for each odd tensor; if there is none, that nothing can be seen.

    Example:
        >>> what_is_odd((torch.tensor([1.0, float("nan"), float("inf")]), float("nan")))
        'inputs: 1 of 3 elements NaN, 1 of 3 Inf; label: NaN'
        >>> what_is_odd({"x": torch.tensor([1.0, -2.0, 1.0, 3e8])})
        'x: largest magnitude 3e+08, 3e+08 times the median'
        >>> what_is_odd((torch.ones(3), torch.tensor(1)))
        'nothing can be seen in the sample itself'
    """
    found = [f"{name or 'sample'}: {odd}" for name, value in _places(sample) if (odd := _odd(value))]
    return "; ".join(found) or "nothing can be seen in the sample itself"


def _places(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Visit the tensors and numbers of a sample, each with its place."""
    if isinstance(tree, Tensor):
        yield name, tree.detach()
    elif isinstance(tree, float):
        yield name, torch.tensor(tree, dtype=torch.float64)
    elif isinstance(tree, dict):
        for key, item in tree.items():
            yield from _places(item, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        yield from _places(dict(zip(tree._fields, tree, strict=True)), name)
    elif isinstance(tree, tuple) and len(tree) == 2 and not name:
        yield from _places(tree[0], "inputs")
        yield from _places(tree[1], "label")
    elif isinstance(tree, (list, tuple)):
        for position, item in enumerate(tree):
            yield from _places(item, name if len(tree) == 1 else f"{name}[{position}]")


def _odd(tensor: Tensor) -> str:
    """Describe what is odd about one tensor; empty if nothing is."""
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return ""
    values = tensor.double()
    found: list[str] = []
    for kind, flags in (("NaN", torch.isnan(values)), ("Inf", torch.isinf(values))):
        if bool(flags.any()):
            of_all = f"{int(flags.sum())} of {values.numel()} {'' if found else 'elements '}"
            found.append(kind if values.numel() == 1 else of_all + kind)
    sizes = values[torch.isfinite(values) & (values != 0)].abs()
    if sizes.numel() >= 3 and bool(sizes.max() > FAR * sizes.median()):
        times = float(sizes.max() / sizes.median())
        found.append(f"largest magnitude {float(sizes.max()):.3g}, {times:.3g} times the median")
    elif sizes.numel() > 0 and bool(sizes.max() > torch.finfo(torch.float16).max):
        found.append(f"largest magnitude {float(sizes.max()):.3g}")
    return ", ".join(found)
