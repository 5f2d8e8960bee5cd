"""Bags for multiple-instance learning: samples that are sets of instances, with a label for the set alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stabletrain.data.array_files import read_arrays
from stabletrain.data.arrays import ArrayDataset, Integers
from stabletrain.data.files import numbers, read_columns
from stabletrain.data.splits import Splits, part_of, split_indices
from stabletrain.data.table import Booleans, Floats, did_you_mean, encode_labels, standardized
from stabletrain.errors import ConfigurationError
from stabletrain.randomness import key

POLICIES = ("raise", "drop", "zero")


class DigitBags(ArrayDataset):
    """Bags of digits that remember what nobody tells the model: which digit each instance is, and which image.

    Args:
        inputs: N tensors float32 [instances, 64].
        targets: int64 [N]; 1 = the bag holds the digit that is looked for.
        digits: N tensors int64 [instances].
        images: N tensors int64 [instances], positions among scikit-learn's digits.
    """

    def __init__(
        self,
        inputs: list[torch.Tensor],
        targets: torch.Tensor,
        digits: list[torch.Tensor],
        images: list[torch.Tensor],
    ) -> None:
        super().__init__(inputs, targets)
        self.digits = digits
        self.images = images


def digit_bags(
    *,
    bags: int = 1000,
    digit: int = 9,
    mean_size: float = 10.0,
    deviation: float = 2.0,
    min_size: int = 3,
    witnesses: float = 0.1,
    validation: float = 0.15,
    test: float = 0.15,
    seed: int = 0,
) -> Splits:
    """Generate bags of scikit-learn's digits, whose label says whether one of them is a 9.

    First the images are divided into the three parts, stratified by digit, then each part draws its bags from its own
    images: no image is in two parts. A bag's size is a rounded normal number. Half of the bags hold the digit: one
    instance for sure and each other one with the probability `witnesses`. All other instances are other digits, drawn
    evenly from the images. No image is twice in a bag, unless its part has too few.

    Args:
        bags: number of bags in all parts together.
        digit: what is looked for, from 0 to 9.
        mean_size: mean of the number of instances.
        deviation: its standard deviation.
        min_size: smallest number of instances.
        witnesses: probability that a further instance of a bag with the digit is that digit too.
        validation: share of the validation part, of the images and of the bags.
        test: share of the test part, likewise.
        seed: number that decides which image goes where and what is drawn.

    Returns:
        Inputs: lists of tensors float32 [instances, 64] from 0 to 1; targets int64 (1 = holds the digit).

    Raises:
        ConfigurationError: for numbers that describe no bags.

    References:
        M. Ilse, J. M. Tomczak, M. Welling: Attention-based Deep Multiple Instance Learning, ICML 2018, section 4.2,
        where bags of MNIST's digits are made so.

    Example:
        >>> splits = digit_bags(bags=20)
        >>> inputs, targets = splits.train.gather(torch.arange(2))
        >>> len(inputs), inputs[0].shape[1], targets.tolist()
        (2, 64, [1, 0])
    """
    from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]

    whole = all(isinstance(number, int) and not isinstance(number, bool) for number in (bags, digit, min_size))
    if not (whole and bags >= 6 and 0 <= digit <= 9 and 1 <= min_size <= mean_size <= 100 and 0 <= deviation <= 100):
        raise ConfigurationError(
            f"digit bags were asked for with bags {bags}, digit {digit}, min_size {min_size}, mean_size {mean_size} "
            f"and deviation {deviation}; allowed are 6 bags or more, a digit from 0 to 9, a min_size from 1, a "
            "mean_size from min_size to 100, and a deviation from 0 to 100."
        )
    if not 0 <= witnesses <= 1:
        raise ConfigurationError(f"witnesses is {witnesses}; a probability from 0 to 1 is allowed.")
    pixels, labels = load_digits(return_X_y=True)
    features = torch.from_numpy((pixels / 16.0).astype(np.float32))
    kinds = labels.astype(np.int64)
    images = split_indices(len(kinds), validation=validation, test=test, seed=seed, classes=kinds)
    wanted = np.arange(bags) % 2
    places = split_indices(bags, validation=validation, test=test, seed=seed, classes=wanted)
    random = np.random.default_rng(key(seed, "bags"))
    parts: list[DigitBags | None] = []
    for own, chosen in zip(images, places, strict=True):
        is_digit = kinds[own.numpy()] == digit
        found, others = own.numpy()[is_digit], own.numpy()[~is_digit]
        targets = wanted[chosen.numpy()]
        drawn = []
        for target in targets:
            size = max(min_size, round(random.normal(mean_size, deviation)))
            count = int(target) * (1 + int(random.binomial(size - 1, witnesses)))
            bag = np.concatenate([_drawn(random, found, count), _drawn(random, others, size - count)])
            drawn.append(torch.from_numpy(random.permutation(bag)))
        made = DigitBags(
            [features[bag] for bag in drawn],
            torch.from_numpy(targets),
            [torch.from_numpy(kinds[bag.numpy()]) for bag in drawn],
            drawn,
        )
        parts.append(made if len(drawn) > 0 else None)
    train, validation_part, test_part = parts
    names = (f"no {digit}", f"with {digit}")
    return Splits(train, validation_part, test_part, {"num_classes": 2}, "digit_bags", classes=names)


def _drawn(random: np.random.Generator, pool: Integers, count: int) -> Integers:
    drawn: Integers = random.choice(pool, count, replace=count > len(pool))
    return drawn


def from_bag_table(
    path: str | Path,
    bag: str = "bag",
    target: str = "label",
    features: Sequence[str] | None = None,
    file: str | None = None,
    *,
    classes: Sequence[Any] | None = None,
    nonfinite: str = "raise",
    standardize: bool = True,
    validation: float = 0.15,
    test: float = 0.15,
    seed: int = 0,
) -> Splits:
    """Read bags from a table, CSV or Parquet, whose rows name a bag, its label, and instances.

    Rows with the same bag belong together, wherever they stand, and have to have the same label. A row is either one
    instance, whose features are its other columns, or names a file of instances.

    Args:
        path: the table, .csv or .parquet; relative to the current folder.
        bag: name of the column that says which bag a row belongs to: any words or numbers.
        target: name of the column with the labels: whole numbers from 0, or words (numbered in sorted order).
        features: names of the columns with an instance's features; None = all others.
        file: name of a column with paths instead, relative to the table's folder: a .npy file or a tensor in a .pt
            file, of the shape [instances, features]; None = the features are in the table. A file without a row makes
            an empty bag.
        classes: the labels that are allowed, in the order of their class numbers; None = those that occur.
        nonfinite: what to do with NaN and Inf (float32's range counts; empty cells are NaN): `raise`, `drop` the
            instance, or set the number to `zero`.
        standardize: bring each feature to mean 0 and standard deviation 1 by the training part's instances.
        validation: share of the validation part, of the bags.
        test: share of the test part, of the bags.
        seed: number that decides which bag goes where.

    Returns:
        Inputs: lists of tensors float32 [instances, F], the bags in the order in which they first occur; targets int64.

    Raises:
        ConfigurationError: for anything in the files that can't be used, with the row.
    """
    if nonfinite not in POLICIES:
        raise ConfigurationError(
            f"nonfinite is {nonfinite!r}; allowed: {', '.join(POLICIES)}.{did_you_mean(str(nonfinite), POLICIES)}"
        )
    if file is not None and features is not None:
        raise ConfigurationError(
            f"both `features` and `file` ({file!r}) say where the instances are; leave one of them out."
        )
    columns, source, where = read_columns(path)
    wanted = [str(name) for name in features] if features is not None else []
    for name in (bag, target, *wanted, *([file] if file is not None else [])):
        if name not in columns:
            raise ConfigurationError(
                f"{source} has no column {name!r}; it has: {', '.join(list(columns)[:20])}."
                f"{did_you_mean(name, list(columns))}"
            )
    rows = _rows_of_bags(columns[bag], columns[target], bag, source, where)
    first = [members[0] for members in rows]
    labels, known = encode_labels(
        [columns[target][row] for row in first],
        where=lambda position: where(first[position]),
        source=f"{source}, column {target!r}",
        classes=classes,
    )
    if file is not None:
        blocks = _read_files(columns[file], Path(path).expanduser().parent, source, where)
    else:
        wanted = wanted or [name for name in columns if name not in (bag, target)]
        if not wanted or bag in wanted or target in wanted:
            raise ConfigurationError(
                f"{source}: the features are {wanted or 'none'}; name columns besides {bag!r} and {target!r} by "
                "`features`, or a column of paths by `file`."
            )
        table = np.array([numbers(columns[name], name, source, where) for name in wanted], dtype=np.float64).T
        blocks = list(table[:, None, :])
    origin = [row for members in rows for row in members for _ in range(len(blocks[row]))]
    instances = np.concatenate([blocks[row] for members in rows for row in members])
    owner = np.repeat(np.arange(len(rows)), [sum(len(blocks[row]) for row in members) for members in rows])
    notes: list[str] = []
    instances, keep = _cleaned(instances, nonfinite, source, lambda place: where(origin[place]), notes)
    owner = owner[keep]
    parts = split_indices(len(rows), validation=validation, test=test, seed=seed, classes=labels, names=known)
    if standardize and len(instances) > 0:
        used = np.flatnonzero(np.isin(owner, parts[0].numpy()))
        instances = standardized(instances, used) if len(used) > 0 else instances
    sizes = np.bincount(owner, minlength=len(rows))
    if (sizes == 0).any():
        notes.append(f"{source}: {int((sizes == 0).sum())} of {len(sizes)} bags are empty.")
    bags = list(torch.split(torch.from_numpy(instances.astype(np.float32)), sizes.tolist()))
    whole = ArrayDataset(bags, torch.from_numpy(labels))
    train, validation_part, test_part = (part_of(whole, chosen) for chosen in parts)
    facts = {"num_classes": len(known)}
    return Splits(train, validation_part, test_part, facts, Path(path).stem, notes, tuple(known))


def _rows_of_bags(
    names: Sequence[Any], labels: Sequence[Any], bag: str, source: str, where: Callable[[int], str]
) -> list[list[int]]:
    """Return the rows of each bag, after a check that each row names one and that a bag's rows agree on its label."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        if name is None or str(name).strip() == "":
            raise ConfigurationError(f"{source}, {where(row)}: the column {bag!r} is empty. Name the row's bag.")
        members = rows.setdefault(str(name).strip(), [])
        members.append(row)
        if str(labels[row]).strip() != str(labels[members[0]]).strip():
            raise ConfigurationError(
                f"{source}, {where(row)}: the bag {str(name).strip()!r} has the label {labels[row]!r}, but "
                f"{labels[members[0]]!r} in {where(members[0])}. A bag has one label: correct one of the two."
            )
    if not rows:
        raise ConfigurationError(f"{source} is empty: it has no row of data.")
    return list(rows.values())


def _read_files(paths: Sequence[Any], folder: Path, source: str, where: Callable[[int], str]) -> list[Floats]:
    """Return the instances that each row's file holds, all with the same number of features."""
    blocks: list[Floats] = []
    for row, name in enumerate(paths):
        file = folder / str(name).strip()
        try:
            held = read_arrays(file, (".npy", ".pt", ".pth"))
            if "" not in held:
                raise ValueError("it holds tensors by name, not one tensor")
            block = held[""]
        except ValueError as error:
            raise ConfigurationError(
                f"{source}, {where(row)}: the file {str(name)!r} can't be read: {error}. Give the "
                "path of a .npy file, or of a .pt file with one tensor, relative to the table's folder."
            ) from error
        if block.ndim != 2 or block.dtype.kind not in "fiub" or block.shape[1] == 0:
            raise ConfigurationError(
                f"{source}, {where(row)}: the file {str(name)!r} holds {block.dtype} of the shape {list(block.shape)}; "
                "real numbers of the shape [instances, features] are needed."
            )
        if blocks and block.shape[1] != blocks[0].shape[1]:
            raise ConfigurationError(
                f"{source}, {where(row)}: the file {str(name)!r} has {block.shape[1]} features, but the one in "
                f"{where(0)} has {blocks[0].shape[1]}. All instances need the same features."
            )
        blocks.append(block.astype(np.float64))
    return blocks


def _cleaned(
    instances: Floats, nonfinite: str, source: str, where: Callable[[int], str], notes: list[str]
) -> tuple[Floats, Booleans]:
    """Return the instances that stay, without NaN and Inf, and which of all these are."""
    with np.errstate(over="ignore"):
        bad = ~np.isfinite(instances.astype(np.float32))
    keep: Booleans = np.ones(len(instances), dtype=np.bool_)
    if not bad.any():
        return instances, keep
    places = np.flatnonzero(bad.any(1))
    if nonfinite == "raise":
        feature = int(np.flatnonzero(bad[places[0]])[0])
        raise ConfigurationError(
            f"{source}, {where(int(places[0]))}: feature {feature} (from 0) of an instance is "
            f"{instances[places[0], feature]}; {len(places)} of {len(instances)} instances hold NaN or Inf. Correct "
            "them, or choose nonfinite=drop or nonfinite=zero."
        )
    if nonfinite == "drop":
        keep = np.asarray(~bad.any(1))
        notes.append(f"{source}: {len(places)} of {len(keep)} instances were dropped, for a NaN or Inf in them.")
        return instances[keep], keep
    notes.append(f"{source}: {int(bad.sum())} numbers that were NaN or Inf were set to zero.")
    return np.where(bad, 0.0, instances), keep
