"""Weights alone, without the run they come from: read from wherever they lie, and put into a model."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stabletrain.checkpoint import nonfinite_names
from stabletrain.checkpoint.files import Checkpoint, checkpoint_folders, manifest_or_none, read_manifest, read_state
from stabletrain.checkpoint.retention import Retention
from stabletrain.checkpoint.store import BEST_NAME
from stabletrain.errors import ConfigurationError
from stabletrain.sealed import MANIFEST_NAME, Damaged, verify
from stabletrain.sealed import read_manifest as read_any_manifest

EXPORT_FORMAT = 1
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.yaml"
_WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before every name
_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A model's parameters and buffers, and what is known about them."""

    tensors: dict[str, Any]  # by name, as in the model's `state_dict`
    origin: Path  # the folder or file they were read from
    averaged: bool = False  # whether the parameters are the exponential moving average of a run's
    tied: dict[str, str] = field(default_factory=dict)  # further names of a tensor, each with its first name
    settings: dict[str, Any] = field(default_factory=dict)  # the config of the run; empty where none is known
    checkpoint: Checkpoint | None = None  # where they were read from one

    def __str__(self) -> str:
        """Say in words what these are."""
        return f"{'the averaged weights (EMA)' if self.averaged else 'the weights'} of {self.origin}"


def read_weights(place: Path | str, checkpoint: str = "best") -> Weights:
    """Read weights, preferring their exponential moving average where there is one, without running any code.

    Args:
        place: folder of a checkpoint, of a run or of an export, or a `.safetensors` file.
        checkpoint: of a run's checkpoints: `best`, `last`, or the name of one, such as `step_000000100`.

    Raises:
        ConfigurationError: there are none, or they are damaged; what is there is said.
    """
    place = Path(place)
    if place.is_file() and place.suffix == ".safetensors":
        return _from_safetensors(place)
    if (place / WEIGHTS_NAME).is_file():
        return _from_safetensors(place / WEIGHTS_NAME)
    if (place / MANIFEST_NAME).is_file():
        return _from_checkpoint(place)
    folder = place / "checkpoints" if (place / "checkpoints").is_dir() else place
    names = [path.name for path in checkpoint_folders(folder)]
    if len(names) == 0:
        found = "is neither" if place.exists() else "doesn't exist; give"
        raise ConfigurationError(
            f"{place} {found} a run's folder with checkpoints, a checkpoint's folder, an exported folder or a "
            ".safetensors file."
        )
    return _from_checkpoint(_chosen(folder, checkpoint, names))


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return the further names of parameters and buffers that have several, each with the first one.

    Example:
        >>> model = nn.ModuleDict({"one": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
        >>> model["other"].weight = model["one"].weight
        >>> tied_names(model)
        {'other.weight': 'one.weight'}
    """
    first: dict[int, str] = {}
    named: Iterable[tuple[str, Tensor]] = itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    return {name: known for name, tensor in named if (known := first.setdefault(id(tensor), name)) != name}


def put_weights(model: nn.Module, weights: Weights, *, strict: bool, hint: str = "") -> str:
    """Put weights into a model, in place.

    Args:
        model: whose parameters and buffers are overwritten.
        weights: from `read_weights`; of another number format, they are converted.
        strict: whether every name and shape must fit. Otherwise what fits is taken.
        hint: what to do about a mismatch, for its error.

    Returns:
        What was taken and what wasn't, in words.

    Raises:
        ConfigurationError: the weights don't fit, nothing of them does, or some aren't finite; names them.
    """
    own = model.state_dict()
    given = _renamed(weights.tensors, own)
    tied = tied_names(model)
    there = {tied.get(name, name) for name in given}
    shapes = {name: (_shape(given[name]), _shape(own[name])) for name in own if name in given}
    misshaped = [f"{name} is {one}, in the model {other}" for name, (one, other) in shapes.items() if one != other]
    missing = [name for name in own if name not in given and tied.get(name, name) not in there]
    unexpected = [name for name in given if name not in own]
    fitting = {name: given[name] for name, (one, other) in shapes.items() if one == other}
    differences = "".join(
        f"\n  {what}: {_listed(names)}"
        for what, names in (
            ("missing (the model has them, the weights don't)", missing),
            ("unexpected (the weights have them, the model doesn't)", unexpected),
            ("of another shape", misshaped),
        )
        if names
    )
    if (differences and strict) or not fitting:
        raise ConfigurationError(f"{weights} don't fit the model:{differences}{hint and f'{chr(10)}{hint}'}")
    _refuse_nonfinite(weights, fitting, own)
    model.load_state_dict(fitting, strict=False)
    count = f"all {len(own)}" if not missing and not misshaped else f"{len(fitting)} of {len(own)}"
    return f"{count} tensors of the model are {weights}{differences}"


def _refuse_nonfinite(weights: Weights, fitting: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse NaN and infinities, but for names that hold some in the model already (a mask, say)."""
    known = set(nonfinite_names(dict(own)))
    converted = {
        name: tensor.to(own[name].dtype) if isinstance(tensor, Tensor) and isinstance(own[name], Tensor) else tensor
        for name, tensor in fitting.items()
        if name not in known
    }
    bad = nonfinite_names(converted)
    if bad:
        raise ConfigurationError(f"{weights} aren't finite: {_listed(bad)}. Take an earlier checkpoint.")


def _chosen(folder: Path, wish: str, names: list[str]) -> Path:
    if wish in names:
        return folder / wish
    if wish not in ("best", "last"):
        raise ConfigurationError(f"checkpoint={wish} is not there; allowed: best, last, {', '.join(names)}.")
    good = [one for name in names if (one := manifest_or_none(folder / name)) is not None]
    if not good:
        raise ConfigurationError(f"none of the checkpoints in {folder} is good: {', '.join(names)}.")
    newest = max(good, key=lambda one: one.serial)
    return newest.path if wish == "last" else (_retention(folder).best(good) or newest).path


def _retention(folder: Path) -> Retention:
    """Return what the run goes by; without a note of it there, the default."""
    try:
        noted = json.loads((folder / BEST_NAME).read_text())
        return Retention(metric=str(noted["metric"]), mode=noted["mode"])
    except (OSError, ValueError, KeyError, TypeError):
        return Retention()


def _from_checkpoint(path: Path) -> Weights:
    try:
        checkpoint = read_manifest(path)
        state = read_state(checkpoint)
    except (Damaged, OSError, RuntimeError) as error:
        raise ConfigurationError(f"the checkpoint {path} can't be used: {error}; give another one.") from error
    tensors = dict(state["model"])
    tied = {alias: name for alias, name in state.get("tied", {}).items() if alias in tensors and name in tensors}
    average = state.get("ema", {}).get("average", {})
    for name, tensor in average.items():
        tensors[name] = tensor.to(tensors[name].dtype)
    tensors |= {alias: tensors[name] for alias, name in tied.items()}
    settings = yaml.safe_load(state.get("settings", "")) or {}
    return Weights(
        tensors=tensors,
        origin=path,
        averaged=len(average) > 0,
        tied=tied,
        settings=settings,
        checkpoint=checkpoint,
    )


def _from_safetensors(path: Path) -> Weights:
    """Read a file; where a manifest beside it names it, it must be what was written."""
    manifest: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    try:
        if path.name == WEIGHTS_NAME and (path.parent / MANIFEST_NAME).is_file():
            manifest = read_any_manifest(path.parent, what="export", version=EXPORT_FORMAT, needed=WEIGHTS_NAME)
            verify(path, manifest["files"][WEIGHTS_NAME])
            settings = yaml.safe_load((path.parent / CONFIG_NAME).read_text()) or {}
        tensors = load_file(path)
    except (Damaged, SafetensorError, OSError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{path} can't be used: {error}; export it again.") from error
    return Weights(
        tensors=tensors,
        origin=path,
        averaged=manifest.get("averaged") is True,
        tied=dict(manifest.get("tied", {})),
        settings=settings,
    )


def _renamed(given: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Give tensors the model's names where they differ in what wraps the model and in nothing else."""
    if any(name in own for name in given):
        return given
    theirs = {_bare(name): name for name in own}
    bare = {_bare(name): tensor for name, tensor in given.items()}
    if not any(name in theirs for name in bare):
        return given
    return {theirs.get(name, name): tensor for name, tensor in bare.items()}


def _bare(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def _listed(names: list[str]) -> str:
    return "; ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
