"""Training, validation and test parts, and what is known about them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from stabletrain.data.arrays import ArrayDataset, Integers, Part, class_targets
from stabletrain.errors import ConfigurationError
from stabletrain.randomness import key, keyed_all

PARTS = ("training", "validation", "test")


@dataclass
class Splits:
    """The three parts of a data set; what a `data` option builds.

    Attributes:
        train: map-style data set to train on.
        validation: data set to choose by; None = no validation.
        test: data set for the last number; None = no test.
        facts: what models and losses may take from the data (`auto` in a config): `num_classes`, `class_counts` (of the
            training part), and of one sample's shape `in_features`, `in_channels`, `image_size`. Found by itself.
        name: name for records.
        notes: sentences about what was done to the data, for the user to read.
        classes: names of the classes, in the order of their numbers; empty where they have none.
        tables: what belongs to no sample and every forward needs, by name: a graph's edges, the features of all items.
            A model that has a frozen parameter or a buffer of that name is given it when the run is built.

    Example:
        >>> train = ArrayDataset(torch.zeros(4, 3), torch.tensor([0, 1, 1, 2]))
        >>> Splits(train).facts
        {'num_classes': 3, 'class_counts': [1, 2, 1], 'in_features': 3}
    """

    train: Any
    validation: Any = None
    test: Any = None
    facts: dict[str, Any] = field(default_factory=dict)
    name: str = "data"
    notes: list[str] = field(default_factory=list)
    classes: Sequence[str] = ()
    tables: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for part, name in zip((self.train, self.validation, self.test), PARTS, strict=True):
            if part is not None or name == "training":
                check_map_style(part, f"the {name} part")
        found = _facts(self.train, self.validation, self.test, num_classes=self.facts.get("num_classes", 0))
        self.facts = {**found, **self.facts}

    def fingerprint(self) -> str:
        """Return 32 hexadecimal digits that change when the samples, their order or the split change.

        Data in memory counts with its shapes, types and bytes (evenly spaced rows of it above 16 MB); any other data
        set with its length and the bytes of 8 samples. Samples that differ between two readings count with shapes only.
        """
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.train, self.validation, self.test):
            _digest_dataset(digest, part)
        if self.tables:
            _digest_tree(digest, self.tables)
        return digest.hexdigest()


def check_map_style(dataset: Any, what: str = "the data set") -> None:
    """Raise ConfigurationError unless `dataset` has a length above 0 and samples that are read by index."""
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ConfigurationError(
            f"{what} is a {type(dataset).__name__}; a map-style data set with __len__ and __getitem__ is needed, "
            "because a run must be able to continue at any sample. Read the stream into a list or an array first."
        )
    if len(dataset) == 0:
        raise ConfigurationError(f"{what} is empty (0 samples): check its path, filters and fractions.")


def _facts(train: Any, *others: Any, num_classes: int) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    labels = [class_targets(part) for part in (train, *others) if part is not None]
    known = [part for part in labels if part is not None]
    if len(known) == len(labels):
        classes = max(num_classes, *(int(part.max()) + 1 for part in known))
        if min(int(part.min()) for part in known) < 0:
            raise ConfigurationError(
                f"the targets hold the label {min(int(part.min()) for part in known)}; class numbers go from 0 to the "
                "number of classes - 1. Number the classes from 0, and leave out samples without a label."
            )
        facts["num_classes"] = classes
        facts["class_counts"] = np.bincount(known[0], minlength=classes).tolist()
    with keyed_all(key("facts")):
        sample = train[0]
    first = sample[0] if isinstance(sample, (tuple, list)) and len(sample) > 0 else sample
    shape = tuple(getattr(first, "shape", ()))
    if len(shape) in (1, 2):
        facts["in_features"] = int(shape[-1])
    elif len(shape) == 3:
        facts["in_channels"] = int(shape[0])
        facts["image_size"] = [int(shape[1]), int(shape[2])]
    return facts


def _digest_dataset(digest: Any, dataset: Any) -> None:
    if dataset is None:
        digest.update(b"none")
        return
    digest.update(f"samples:{len(dataset)};".encode())
    if isinstance(dataset, ArrayDataset):
        _digest_tree(digest, dataset.inputs)
        _digest_tree(digest, dataset.targets)
        return
    if isinstance(dataset, Part):
        _digest_tree(digest, dataset.indices)
    for index in sorted({round(place * (len(dataset) - 1) / 7) for place in range(8)}):
        readings = []
        for _ in range(2):
            with keyed_all(key("fingerprint", index)):
                sample = dataset[index]
            one, shapes = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
            _digest_tree(one, sample)
            _digest_tree(shapes, sample, content=False)
            readings.append((one.digest(), shapes.digest()))
        digest.update(readings[0][0] if readings[0] == readings[1] else readings[0][1])


def _digest_tree(digest: Any, tree: Any, *, content: bool = True, limit: int = 1 << 24) -> None:
    if isinstance(tree, torch.Tensor):
        tree = tree.detach().cpu()
        digest.update(f"{tree.dtype}{tuple(tree.shape)};".encode())
        if content and tree.numel() > 0:
            stride = max(1, math.ceil(tree.numel() * tree.element_size() / limit)) if tree.dim() > 0 else 1
            rows = tree[::stride] if tree.dim() > 0 else tree.reshape(1)
            digest.update(rows.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(tree, np.ndarray) and tree.dtype.kind in "biufc":
        digest.update(f"{tree.dtype}{tree.shape};".encode())
        if content:
            digest.update(np.ascontiguousarray(tree).tobytes())
    elif isinstance(tree, dict):
        for name in tree:
            digest.update(f"{name}:".encode())
            _digest_tree(digest, tree[name], content=content, limit=limit)
    elif isinstance(tree, (list, tuple)):
        digest.update(f"{type(tree).__name__}{len(tree)};".encode())
        total = sum(item.numel() * item.element_size() for item in tree if isinstance(item, torch.Tensor))
        for item in tree[:: max(1, math.ceil(total / limit))]:
            _digest_tree(digest, item, content=content, limit=limit)
    else:
        primitive = content and isinstance(tree, (bool, int, float, str, bytes, np.generic, type(None)))
        digest.update(f"{type(tree).__name__}:{tree!r};".encode() if primitive else type(tree).__name__.encode())


def check_shares(validation: float, test: float) -> None:
    """Refuse shares of the validation and test part that are none, or leave nothing to train on.

    Raises:
        ConfigurationError: names the part and the share.
    """
    for share, name in ((validation, "validation"), (test, "test")):
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
            raise ConfigurationError(
                f"the share of the {name} part is {share!r}; a number from 0 to below 1 is allowed."
            )
    if validation + test >= 1:
        raise ConfigurationError(
            f"the shares of the validation part ({validation}) and the test part ({test}) leave nothing to train on: "
            "their sum must be below 1."
        )


def split_indices(
    count: int,
    *,
    validation: float = 0.15,
    test: float = 0.15,
    seed: int = 0,
    classes: Integers | None = None,
    names: Sequence[str] = (),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Divide the positions 0 to count - 1 into training, validation and test, by the seed and nothing else.

    Args:
        count: number of samples.
        validation: share of the validation part, from 0 (no such part) to below 1.
        test: share of the test part, likewise; the two leave a share for training.
        seed: number that decides which sample goes where.
        classes: class number of each sample, int64 [count]: each class is divided in the same shares (stratified), and
            no part is left without one of its samples. None = divide all samples as one class.
        names: names of the classes, for messages.

    Returns:
        Three tensors of positions, int64, each in rising order.

    Raises:
        ConfigurationError: for shares that leave nothing, and for a class with too few samples.

    Example:
        >>> [len(part) for part in split_indices(10, validation=0.2, test=0.2, seed=1)]
        [6, 2, 2]
    """
    check_shares(validation, test)
    if count == 0:
        raise ConfigurationError("the data set is empty (0 samples): check its path and filters.")
    groups = np.zeros(count, dtype=np.int64) if classes is None else classes
    random = np.random.default_rng(key(seed, "split"))
    parts: list[list[Integers]] = [[], [], []]
    for group in np.unique(groups):
        members = random.permutation(np.flatnonzero(groups == group))
        who = "the data set" if classes is None else f"class {names[group] if len(names) > 0 else int(group)!r}"
        held_out = _held_out(len(members), validation, test, who)
        cuts = np.cumsum(held_out)
        for part, chosen in zip((1, 2, 0), np.split(members, cuts), strict=True):
            parts[part].append(chosen)
    train, validation_part, test_part = (torch.from_numpy(np.sort(np.concatenate(part))) for part in parts)
    return train, validation_part, test_part


def _held_out(count: int, validation: float, test: float, who: str) -> list[int]:
    """Return how many of `count` samples go to validation and test: about the shares, at least one for each part."""
    wanted = [0 if share == 0 else max(1, round(share * count)) for share in (validation, test)]
    needed = 1 + sum(number > 0 for number in wanted)
    if count < needed:
        raise ConfigurationError(
            f"{who} has {count} sample{'s' if count != 1 else ''}, but each of {needed} parts (training, validation, "
            "test) needs at least one of them. Add samples, leave the class out, or do without a part by "
            "validation=0 or test=0."
        )
    while sum(wanted) >= count:
        wanted[wanted.index(max(wanted))] -= 1
    return wanted


def split_dataset(
    dataset: Any,
    *,
    validation: float = 0.15,
    test: float = 0.15,
    seed: int = 0,
    name: str | None = None,
    notes: Sequence[str] = (),
    classes: Sequence[str] = (),
) -> Splits:
    """Divide any map-style data set by the seed; stratified if it tells its class numbers (see `class_targets`).

    Args:
        dataset: object with `__len__` and `__getitem__`; a `Splits` is returned as it is.
        validation: share of the validation part, from 0 (no such part) to below 1.
        test: share of the test part, likewise.
        seed: number that decides which sample goes where.
        name: name for records; None = the name of the data set's class.
        notes: sentences for the user to read.
        classes: names of the classes, for messages and records.

    Returns:
        The parts: of an `ArrayDataset` new ones, of any other data set views that read from it.

    Raises:
        ConfigurationError: for data that can't be divided so.

    Example:
        >>> data = ArrayDataset(torch.zeros(20, 3), torch.arange(20) % 2)
        >>> splits = split_dataset(data, validation=0.2, test=0.1)
        >>> len(splits.train), len(splits.validation), len(splits.test)
        (14, 4, 2)
    """
    if isinstance(dataset, Splits):
        return dataset
    check_map_style(dataset, f"the data set {type(dataset).__name__}")
    labels = class_targets(dataset)
    positions = split_indices(len(dataset), validation=validation, test=test, seed=seed, classes=labels, names=classes)
    train, validation_part, test_part = (part_of(dataset, chosen) for chosen in positions)
    name = name or type(dataset).__name__
    return Splits(train, validation_part, test_part, name=name, notes=list(notes), classes=classes)


def part_of(dataset: Any, positions: torch.Tensor) -> Any:
    """Return these samples as a data set: a new one in memory, a view otherwise, None for no positions."""
    if len(positions) == 0:
        return None
    return dataset.part(positions) if isinstance(dataset, ArrayDataset) else Part(dataset, positions)
