"""One part of the data, read as a whole in chunks: which samples hold what."""

from __future__ import annotations

import hashlib
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from stabletrain.doctor.before.columns import Columns, by_column
from stabletrain.doctor.before.subject import inputs_of, leaves, targets_of
from stabletrain.tree import map_tensors, tensors

CHUNK = 256  # samples
Read = Callable[[Sequence[int]], Any]


@dataclass
class Scan:
    """What one part of the data holds; every list is of positions in that part.

    Attributes:
        part: `training`, `validation` or `test`.
        samples: how many it has.
        nan: with a NaN in the inputs; `inf`: with an Inf.
        largest: magnitude of the largest finite input of each sample that exceeds the limit.
        empty: with an input of no element, such as a sequence without a time step.
        zero: whose inputs are all 0.
        bad_labels: whose label is NaN or Inf.
        unreadable: which the data set can't return, with its error.
        labels: class numbers, -1 where a sample has none (only where labels are whole numbers).
        hashes: of each sample's inputs.
        columns: statistics of each floating input, by name.
        unbatched: the error where samples can be read but not put into one batch.
    """

    part: str
    samples: int
    nan: list[int] = field(default_factory=list)
    inf: list[int] = field(default_factory=list)
    largest: dict[int, float] = field(default_factory=dict)
    empty: list[int] = field(default_factory=list)
    zero: list[int] = field(default_factory=list)
    bad_labels: list[int] = field(default_factory=list)
    unreadable: dict[int, str] = field(default_factory=dict)
    labels: dict[int, int] = field(default_factory=dict)
    hashes: dict[int, bytes] = field(default_factory=dict)
    columns: dict[str, Columns] = field(default_factory=dict)
    unbatched: str = ""
    mixtures: list[int] = field(default_factory=list)  # whose label is a distribution that doesn't sum to 1

    def unusable(self) -> list[int]:
        """Return the samples that no step can use."""
        return sorted({*self.nan, *self.inf, *self.empty, *self.bad_labels, *self.unreadable})

    def usable_hashes(self) -> list[tuple[int, bytes]]:
        """Return position and hash of each usable sample."""
        unusable = set(self.unusable())
        return [(index, digest) for index, digest in self.hashes.items() if index not in unusable]


def scan(part: str, samples: int, read: Read, *, limit: float, progress: bool = True) -> Scan:
    """Look at every sample of a part of the data.

    Args:
        part: its name.
        samples: how many it has.
        read: returns the batch of some positions.
        limit: magnitude above which an input is noted.
        progress: show a bar on stderr, where that is a terminal.
    """
    found = Scan(part, samples)
    chunks = math.ceil(samples / CHUNK)
    for indices, data in _chunks(found, samples, read, f"{part} data", progress):
        inputs, targets = inputs_of(data), targets_of(data)
        named = list(leaves(inputs, len(indices)))
        for name, leaf in named:
            _look(found, indices, leaf, limit)
            first = leaf[0] if isinstance(leaf, list) else leaf
            if first.is_floating_point() and sum(item.numel() for item in tensors(leaf)) > 0:
                values = by_column([item for item in leaf if item.numel() > 0] if isinstance(leaf, list) else leaf)
                found.columns.setdefault(name, Columns(chunks)).add(values)
        _look_at_labels(found, indices, targets)
        for place, index in enumerate(indices):
            found.hashes[index] = _hash([leaf[place] for _, leaf in named])
        _note_zeros(found, indices, [leaf for _, leaf in named])
    return found


def find_outliers(
    found: Scan, read: Read, columns: dict[str, list[int]], progress: bool = True
) -> dict[str, list[int]]:
    """Return by the name of an input which samples hold values far outside in these columns of it."""
    result: dict[str, list[int]] = {name: [] for name in columns}
    again = Scan(found.part, found.samples)
    bounds = {name: (found.columns[name].median(), found.columns[name].far()) for name in columns}
    for indices, data in _chunks(again, found.samples, read, "outliers", progress):
        for name, leaf in leaves(inputs_of(data), len(indices)):
            if name not in columns:
                continue
            median, far = bounds[name]
            for place, index in enumerate(indices):
                sample = leaf[place : place + 1]
                distance = (by_column(sample).double() - median).abs()
                if bool(((distance > far) & torch.isfinite(distance))[:, columns[name]].any()):
                    result[name].append(index)
    return result


class _QuietBar(tqdm):  # type: ignore[misc]
    monitor_interval = 0  # no thread of its own


def _chunks(found: Scan, samples: int, read: Read, title: str, progress: bool) -> Iterator[tuple[list[int], Any]]:
    """Yield the samples in chunks, on the CPU; what can't be read is noted and left out."""
    disable = None if progress else True  # None: where stderr is no terminal
    width = shutil.get_terminal_size().columns  # known also where a terminal doesn't tell its size
    options = {"unit": " samples", "file": sys.stderr, "disable": disable, "ncols": width, "leave": False}
    with _QuietBar(total=samples, desc=title, **options) as bar:
        for first in range(0, samples, CHUNK):
            indices = list(range(first, min(first + CHUNK, samples)))
            for some, data in _read(found, indices, read):
                yield some, map_tensors(lambda tensor: tensor.detach().cpu(), data)
            bar.update(len(indices))


def _read(found: Scan, indices: list[int], read: Read) -> Iterator[tuple[list[int], Any]]:
    try:
        data = read(indices)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        if len(indices) == 1:
            found.unreadable[indices[0]] = said
            return
        before = len(found.unreadable)
        middle = len(indices) // 2
        yield from _read(found, indices[:middle], read)
        yield from _read(found, indices[middle:], read)
        if len(found.unreadable) == before and not found.unbatched:
            found.unbatched = said
        return
    yield indices, data


def _look(found: Scan, indices: list[int], leaf: Tensor | list[Tensor], limit: float) -> None:
    for place, index in _empty(indices, leaf):
        del place
        _add(found.empty, index)
    for kind, test in (("nan", torch.isnan), ("inf", torch.isinf)):
        for place in _where(leaf, test):
            _add(getattr(found, kind), indices[place])
    for place in _where(leaf, lambda values: values.abs() > limit):
        index = indices[place]
        values = leaf[place].abs()
        finite = values[torch.isfinite(values)]
        if finite.numel() > 0 and float(finite.max()) > limit:
            found.largest[index] = max(found.largest.get(index, 0.0), float(finite.max()))


def _empty(indices: list[int], leaf: Tensor | list[Tensor]) -> Iterator[tuple[int, int]]:
    for place, index in enumerate(indices):
        if leaf[place].numel() == 0:
            yield place, index


def _add(found: list[int], index: int) -> None:
    if len(found) == 0 or found[-1] != index:
        found.append(index)


def _where(leaf: Tensor | list[Tensor], test: Callable[[Tensor], Tensor]) -> list[int]:
    """Return the places in a chunk for which the test holds somewhere."""
    if isinstance(leaf, list):
        return [place for place, item in enumerate(leaf) if item.is_floating_point() and bool(test(item).any())]
    if not leaf.is_floating_point() or leaf.numel() == 0:
        return []
    return torch.nonzero(test(leaf).reshape(len(leaf), -1).any(1)).flatten().tolist()


def _note_zeros(found: Scan, indices: list[int], floats: list[Tensor | list[Tensor]]) -> None:
    floats = [leaf for leaf in floats if next(tensors(leaf)).is_floating_point()]
    for place, index in enumerate(indices):
        values = [leaf[place] for leaf in floats]
        if values and all(item.numel() > 0 and not bool(item.any()) for item in values):
            found.zero.append(index)


def _look_at_labels(found: Scan, indices: list[int], targets: Any) -> None:
    for place in sorted({place for leaf in tensors(targets) for place in _where_in(leaf, len(indices))}):
        _add(found.bad_labels, indices[place])
    if not isinstance(targets, Tensor):
        return
    if not targets.is_floating_point() and targets.dim() == 1 and targets.dtype != torch.bool:
        found.labels.update(zip(indices, targets.tolist(), strict=True))
    elif targets.is_floating_point() and targets.dim() == 2 and targets.shape[1] > 1:
        off = ((targets.sum(1) - 1).abs() > 1e-3) | (targets < 0).any(1)
        found.mixtures += [indices[place] for place in torch.nonzero(off).flatten().tolist()]


def _where_in(leaf: Tensor, samples: int) -> list[int]:
    return _where(leaf, lambda values: ~torch.isfinite(values)) if leaf.dim() > 0 and len(leaf) == samples else []


def _hash(sample: list[Tensor]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for item in sample:
        digest.update(f"{item.dtype}{tuple(item.shape)};".encode())
        if item.numel() > 0:
            digest.update(item.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()
