"""Embeddings that stay as they are, from a file or of digits, with each sample's nearest neighbours."""

from __future__ import annotations

import hashlib
import io
import json
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stabletrain.checks import whole
from stabletrain.data.array_files import Arrays, array_of, read_arrays
from stabletrain.data.arrays import Integers
from stabletrain.data.files import existing
from stabletrain.data.pairs import Pairs, nearest
from stabletrain.data.splits import Splits, split_indices
from stabletrain.data.table import Floats, did_you_mean, encode_labels
from stabletrain.errors import ConfigurationError
from stabletrain.folder import write_whole

POLICIES = ("raise", "drop", "zero")
KINDS = (".pt", ".pth", ".npz", ".safetensors")
FORMAT = 1  # of what is kept; another number makes all of it be computed again


def digit_embeddings(
    *,
    components: int = 32,
    neighbours: int = 40,
    clusters: int | str = "auto",
    validation: float = 0.15,
    test: float = 0.15,
    seed: int = 0,
) -> Splits:
    """Embed scikit-learn's 1,797 digits by the principal components of the training images, without labels.

    Args:
        components: numbers of an embedding, from 1 to 64.
        neighbours: how many of the nearest training samples (by cosine) a training sample is paired with.
        clusters: how many to look for; `auto` = 10.
        validation: share of the validation part.
        test: share of the test part.
        seed: number that decides which image goes where.

    Returns:
        `Pairs` with labels, which are for measuring only.

    Raises:
        ConfigurationError: for numbers that can't be.

    Example:
        >>> splits = digit_embeddings(components=8, neighbours=3)
        >>> views, labels = splits.test.gather(torch.arange(5))
        >>> views.shape, splits.facts["num_classes"]
        (torch.Size([5, 2, 8]), 10)
    """
    from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]
    from sklearn.decomposition import PCA  # type: ignore[import-untyped, unused-ignore]

    whole("components", components, 1, 64)
    pixels, labels = load_digits(return_X_y=True)
    kinds = labels.astype(np.int64)
    parts = split_indices(len(kinds), validation=validation, test=test, seed=seed, classes=kinds)
    analysis = PCA(components, svd_solver="full").fit(pixels[parts[0].numpy()])
    embedded = Embedded(analysis.transform(pixels), kinds, [str(digit) for digit in range(10)])
    return embedded.splits(parts, embedded.neighbours(parts, neighbours), clusters=clusters, name="digit_embeddings")


def embeddings_of_file(
    path: str | Path,
    x: str = "embeddings",
    y: str = "labels",
    *,
    embed: str | None = None,
    neighbours: int = 40,
    clusters: int | str = "auto",
    classes: Sequence[Any] | None = None,
    nonfinite: str = "raise",
    scale: bool = True,
    cache: bool | str = True,
    recompute: bool = False,
    validation: float = 0.15,
    test: float = 0.15,
    seed: int = 0,
) -> Splits:
    """Read embeddings from a `.pt`, `.npz` or `.safetensors` file, and find each sample's nearest neighbours.

    Neighbours, and embeddings that a function of the user's computes, are kept in files beside the data, each with a
    checksum of the data file and of the settings that it depends on. Where that differs they are computed again.

    Args:
        path: the file; relative to the current folder. A `.pt` file holds a tensor or a dictionary of tensors.
        x: name of the embeddings in it, real numbers [N, D].
        y: name of the labels in it [N], whole numbers or (in `.npz`) words; without them only the loss is measured.
        embed: function, such as `mine.embed`, from what stands under `x`, a tensor [N, ...], to embeddings [N, D]; None
            = these are the embeddings.
        neighbours: how many of the nearest training samples (by cosine) a training sample is paired with.
        clusters: how many to look for; `auto` = as many as there are classes.
        classes: the labels that are allowed, in the order of their class numbers; None = those that occur.
        nonfinite: samples with NaN or Inf in them (float32's range counts): `raise`, `drop` them, or set the numbers to
            `zero`.
        scale: subtract the training part's mean and divide by one number, so that the mean square is 1 there.
        cache: True: keep beside the file; a folder: keep there; False: nowhere.
        recompute: compute again what was kept.
        validation: share of the validation part.
        test: share of the test part.
        seed: number that decides which sample goes where.

    Returns:
        `Pairs`, with labels where there are some.

    Raises:
        ConfigurationError: for anything in the file that can't be used, with the row.
    """
    if nonfinite not in POLICIES:
        raise ConfigurationError(
            f"nonfinite is {nonfinite!r}; allowed: {', '.join(POLICIES)}.{did_you_mean(str(nonfinite), POLICIES)}"
        )
    file = existing(path, "embeddings")
    source = f"the file {str(path)!r}"
    held = _read(file, x, source)
    if x not in held:
        raise ConfigurationError(
            f"{source} has nothing under {x!r}; it has: {', '.join(held)}.{did_you_mean(x, list(held))} Name the "
            "embeddings by `x`."
        )
    values = held[x]
    notes: list[str] = []
    if values.dtype.kind not in "fiub" or values.ndim < 2 or len(values) == 0:
        raise ConfigurationError(
            f"{source}: {x!r} has the shape {list(values.shape)} and the type {values.dtype}; real numbers of the "
            "shape [samples, features] are needed."
        )
    store = Store(file, cache, recompute, notes)
    of_file = {"format": FORMAT, "file": _digest(file), "x": x, "embed": embed}
    if embed is not None:
        values = store.kept("embeddings", of_file, lambda: {"x": _embedded(embed, values)})["x"]
    if values.ndim != 2 or values.shape[1] == 0 or len(values) != len(held[x]) or values.dtype.kind not in "fiub":
        what = f"{x!r}" if embed is None else f"what {embed} returned"
        raise ConfigurationError(
            f"{source}: {what} has the shape {list(values.shape)} and the type {values.dtype}; {len(held[x])} samples "
            "with one row of real numbers each are needed. Flatten them, or let `embed` name a function that returns "
            "embeddings."
        )
    labels = names = None
    if y in held:
        labels, names = _labels(held[y], len(values), f"{source}, {y!r}", classes)
    else:
        notes.append(f"{source} has no labels under {y!r} (it has: {', '.join(held)}): only the loss is measured.")
    embedded = Embedded(values.astype(np.float64), labels, names or (), notes).cleaned(nonfinite, source)
    shares = {"validation": validation, "test": test, "seed": seed}
    # Stratified, so that each part can be measured; what is trained doesn't depend on labels otherwise.
    parts = split_indices(len(embedded.values), **shares, classes=embedded.labels, names=names or ())  # type: ignore[arg-type]
    told = None if embedded.labels is None else hashlib.blake2b(embedded.labels.tobytes()).hexdigest()
    settings = {**of_file, **shares, "nonfinite": nonfinite, "neighbours": neighbours, "labels": told}
    found = store.kept("neighbours", settings, lambda: embedded.neighbours(parts, neighbours))
    return embedded.splits(parts, found, clusters=clusters, scale=scale, name=file.stem)


@dataclass
class Embedded:
    """Embeddings before they are divided.

    Attributes:
        values: float64 [N, D].
        labels: class numbers, int64 [N]; None = there are none.
        classes: names of the classes.
        notes: sentences for the user to read.
    """

    values: Floats
    labels: Integers | None = None
    classes: Sequence[str] = ()
    notes: list[str] = field(default_factory=list)

    def cleaned(self, nonfinite: str, source: str) -> Embedded:
        """Return these without NaN and Inf, by the rule.

        Raises:
            ConfigurationError: for the rule `raise`, with the row; when nothing is left.
        """
        with np.errstate(over="ignore"):
            bad = ~np.isfinite(self.values.astype(np.float32))
        rows = np.flatnonzero(bad.any(1))
        if len(rows) == 0:
            return self
        if nonfinite == "raise":
            column = int(np.flatnonzero(bad[rows[0]])[0])
            raise ConfigurationError(
                f"{source}, row {rows[0]} (from 0): number {column} (from 0) of the embedding is "
                f"{self.values[rows[0], column]}; {len(rows)} of {len(bad)} samples hold NaN or Inf. Correct them, or "
                "choose nonfinite=drop or nonfinite=zero."
            )
        shown = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
        if nonfinite == "zero":
            note = f"{source}: {int(bad.sum())} numbers that were NaN or Inf were set to zero, in the rows {shown}."
            return Embedded(np.where(bad, 0.0, self.values), self.labels, self.classes, [*self.notes, note])
        note = f"{source}: {len(rows)} of {len(bad)} samples were dropped, for a NaN or Inf in the rows {shown}."
        keep = ~bad.any(1)
        labels = self.labels[keep] if self.labels is not None else None
        return Embedded(self.values[keep], labels, self.classes, [*self.notes, note])

    def neighbours(self, parts: Sequence[torch.Tensor], count: int) -> Arrays:
        """Return the neighbours of each part's samples, positions in the training part: `count`, elsewhere one."""
        pool = self.values[parts[0].numpy()]
        found: Arrays = {"train": nearest(pool, count)}
        for name, part in zip(("validation", "test"), parts[1:], strict=True):
            own = self.values[part.numpy()]
            found[name] = nearest(pool, 1, own) if len(own) > 0 else np.zeros((0, 1), dtype=np.int64)
        return found

    def splits(
        self,
        parts: Sequence[torch.Tensor],
        neighbours: Arrays,
        *,
        clusters: int | str = "auto",
        scale: bool = True,
        name: str = "embeddings",
    ) -> Splits:
        """Return the parts as pairs, the training part's drawn at random.

        Args:
            parts: positions of each part's samples.
            neighbours: as from `neighbours`.
            clusters: how many to look for; `auto` = as many as there are classes.
            scale: whether to bring the training part to mean 0 and mean square 1, by one number for all.
            name: name for records.

        Raises:
            ConfigurationError: for a number of clusters that can't be.
        """
        known = len(self.classes)
        if clusters != "auto" and (isinstance(clusters, (bool, str)) or clusters < 2):
            raise ConfigurationError(f"clusters is {clusters!r}; auto or a whole number from 2 is allowed.")
        wanted = known if clusters == "auto" else int(clusters)
        if wanted < 2:
            raise ConfigurationError(
                f"clusters is auto, but the data have {known} classes, so that nothing says how many clusters to look "
                "for. Give their number: data.clusters=10."
            )
        train, values = parts[0].numpy(), self.values
        if scale:
            values = values - values[train].mean(0)
            size = float(np.sqrt((values[train] ** 2).mean()))
            values = values / size if size > 0 else values
        numbers = torch.from_numpy(values.astype(np.float32))
        labels = torch.from_numpy(self.labels) if self.labels is not None else None
        pool = numbers[parts[0]]
        made = [
            Pairs(
                numbers[part],
                pool,
                torch.from_numpy(neighbours[key]),
                labels[part] if labels is not None else None,
                random=key == "train",
            )
            if len(part) > 0
            else None
            for key, part in zip(("train", "validation", "test"), parts, strict=True)
        ]
        facts = {"num_classes": wanted, "classes": known}
        return Splits(made[0], made[1], made[2], facts, name, self.notes, tuple(self.classes))


class Store:
    """What was computed from a file, kept beside it, each with a checksum of what it depends on.

    Args:
        file: the data.
        cache: True: beside it; a folder: there; False: nowhere.
        recompute: whether what was kept is computed again.
        notes: where sentences for the user go.
    """

    def __init__(self, file: Path, cache: bool | str, recompute: bool, notes: list[str]) -> None:
        self.file = file
        self.folder = file.parent if cache is True else Path(cache).expanduser() if cache else None
        self.recompute = recompute
        self.notes = notes

    def kept(self, what: str, settings: dict[str, Any], compute: Callable[[], Arrays]) -> Arrays:
        """Return what was kept under these settings, or else compute it and keep it.

        Args:
            what: it is, for the file's name.
            settings: all that it depends on.
            compute: returns it.
        """
        if self.folder is None:
            return compute()
        path = self.folder / f"{self.file.name}.{what}.npz"
        checksum = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()
        found = None if self.recompute else _kept(path, checksum)
        if found is not None:
            self.notes.append(f"{what} were taken from {path} (data.recompute=true computes them again).")
            return found
        made = compute()
        content = io.BytesIO()
        named: dict[str, Any] = {"checksum": np.array(checksum), **made}
        np.savez(content, **named)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, content.getvalue())
        except OSError as error:
            self.notes.append(f"{what} can't be kept in {path}: {error.strerror or error}.")
        return made


def _kept(path: Path, checksum: str) -> Arrays | None:
    """Return what a file holds under this checksum; None where it isn't there, torn, or of something else."""
    try:
        arrays = read_arrays(path)
    except ValueError:
        return None
    return arrays if str(arrays.pop("checksum", "")) == checksum else None


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        running = hashlib.blake2b(digest_size=16)
        while piece := stream.read(1 << 22):
            running.update(piece)
    return running.hexdigest()


def _read(file: Path, x: str, source: str) -> Arrays:
    """Return the arrays in a file by their names; a single tensor is called `x`."""
    if file.suffix not in KINDS:
        raise ConfigurationError(f"{source} ends with {file.suffix!r}; allowed: {', '.join(KINDS)}.")
    try:
        return {name or x: array for name, array in read_arrays(file, KINDS).items()}
    except ValueError as error:
        raise ConfigurationError(
            f"{source} can't be read: {error}. Write it by "
            f"torch.save or safetensors.torch.save_file of {{{x!r}: tensor}}, or numpy.savez(path, {x}=array)."
        ) from error


def _labels(
    values: np.ndarray[Any, Any], count: int, source: str, classes: Sequence[Any] | None
) -> tuple[Integers, list[str]]:
    if values.shape != (count,):
        raise ConfigurationError(
            f"{source} has the shape {list(values.shape)}; one label for each of {count} samples is needed."
        )
    return encode_labels(values.tolist(), where=lambda row: f"row {row} (from 0)", source=source, classes=classes)


def _embedded(name: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Call the user's function on all that the file holds."""
    try:
        function = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"data.embed is {name!r}, which can't be imported: {error}. Give the dotted name of a function, such as "
            "mine.embed, in a module that Python finds from the current folder."
        ) from error
    inputs = torch.from_numpy(values.astype(np.float32) if values.dtype.kind == "f" else values)
    with torch.no_grad():
        made = function(inputs)
    if not isinstance(made, torch.Tensor):
        raise ConfigurationError(f"data.embed: {name} returned a {type(made).__name__}; a tensor [N, D] is needed.")
    return array_of(made)
