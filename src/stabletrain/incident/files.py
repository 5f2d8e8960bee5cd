"""One incident: what it holds, how it is written and read again."""

from __future__ import annotations

import json
import logging
import math
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml  # type: ignore[import-untyped]
from torch import Tensor

from stabletrain.errors import ConfigurationError
from stabletrain.plain import plain
from stabletrain.sealed import Damaged, read_manifest, read_tensors, verify

logger = logging.getLogger(__name__)

Kind = Literal["rejected", "salvaged", "rolled_back", "validation"]
FORMAT_VERSION = 2
INCIDENT_NAME, STATE_NAME, VERDICT_NAME, CONFIG_NAME = "incident.pt", "state.pt", "verdict.json", "config.yaml"
_NAMED = "stabletrain.namedtuple"  # key under which a named tuple's fields are stored
_STORED = ("reason", "detail", "loss", "grad_norm", "seed", "position", "indices", "precision", "guard", "environment")


@dataclass(frozen=True, kw_only=True)
class Incident:
    """A step that went wrong, and everything that its forward and backward passes depend on."""

    kind: Kind
    reason: str  # the guard's, or "validation"
    detail: str  # what was found, in words
    loss: float
    grad_norm: float
    seed: int
    position: dict[str, int]  # before the step: epoch, step (within it), steps (of the run), updates, samples
    batches: list[Any]  # each microbatch's data; None where it can't be stored
    indices: list[Tensor]  # each microbatch's samples, int64 [n]
    precision: dict[str, Any]  # the loss scaler before the step; empty without one
    guard: dict[str, Any]  # counts and recent history
    environment: dict[str, Any]  # torch, threads, device
    state: dict[str, Any] | None  # model, buffers (outside its state_dict), optimizer, ema, loss; None: too large
    samples: list[dict[str, Any]] = field(default_factory=list)  # found bad: index, and what is odd about it
    settings: dict[str, Any] = field(default_factory=dict)  # the resolved config

    @property
    def name(self) -> str:
        """The folder's name."""
        return f"{self.position['steps']:09d}" + ("-validation" if self.kind == "validation" else "")

    def content(self) -> dict[str, Any]:
        """Return what `incident.pt` holds."""
        parts = {name: getattr(self, name) for name in _STORED}
        batches = [_storable(data, number) for number, data in enumerate(self.batches)]
        return {**parts, "indices": [_compact(indices) for indices in self.indices], "batches": batches}

    def verdict(self) -> dict[str, Any]:
        """Return what `verdict.json` says at first; NaN and Inf as words, since JSON has no number for them."""
        return {
            "kind": self.kind,
            "reason": self.reason,
            "detail": self.detail,
            "loss": _number(self.loss),
            "grad_norm": _number(self.grad_norm),
            **self.position,
            "seed": self.seed,
            "samples": self.samples,
            "indices": [indices.tolist() for indices in self.indices],
            "environment": self.environment,
        }

    @property
    def replayable(self) -> bool:
        """Whether everything is there that a replay needs."""
        lost = [data is None and len(indices) > 0 for data, indices in zip(self.batches, self.indices, strict=True)]
        return self.state is not None and not any(lost)


def incident_folders(folder: Path | str) -> list[Path]:
    """Return the incidents in `folder`, a run's folder or its `incidents`, in the order of their steps."""
    folder = Path(folder)
    inside = folder / "incidents" if (folder / "incidents").is_dir() else folder
    if not inside.is_dir():
        return []
    return sorted(path for path in inside.iterdir() if path.name[:9].isdigit() and path.is_dir())


def load_incident(folder: Path | str) -> Incident:
    """Verify an incident and read it, to host memory and without running any code that it may hold.

    Args:
        folder: `incidents/<step>` of a run.

    Raises:
        ConfigurationError: it is missing, damaged, or of a format that isn't known.
    """
    folder = Path(folder)
    try:
        manifest = read_manifest(folder, what="incident", version=FORMAT_VERSION, needed=INCIDENT_NAME)
        files = manifest["files"]
        for name, entry in files.items():
            verify(folder / name, entry)
        content = read_tensors(folder / INCIDENT_NAME, files[INCIDENT_NAME])
        state = read_tensors(folder / STATE_NAME, files[STATE_NAME]) if STATE_NAME in files else None
        verdict = json.loads((folder / VERDICT_NAME).read_text())
        content["batches"] = [_unpacked(data) for data in content["batches"]]
        settings = yaml.safe_load((folder / CONFIG_NAME).read_text()) or {}
        return Incident(
            **content, state=state, settings=settings, kind=verdict["kind"], samples=list(verdict["samples"])
        )
    except (Damaged, OSError, RuntimeError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(
            f"the incident {folder} can't be used: {error}; give the folder of another one (…/incidents/000000120)"
        ) from error


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _storable(data: Any, number: int) -> Any:
    """Return a batch's data in a form that loads without code; None if it has none."""
    try:
        return _packed(data)
    except TypeError as error:
        logger.warning("an incident without the data of microbatch %d, so it can't be replayed: %s", number, error)
        return None


def _packed(tree: Any) -> Any:
    """Return the tree with named tuples as dictionaries, and tensors without what lies around them in memory."""
    if isinstance(tree, Tensor):
        return _compact(tree.detach().as_subclass(Tensor))
    if isinstance(tree, dict):
        return {key: _packed(item) for key, item in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return {_NAMED: [type(tree).__name__, list(tree._fields), [_packed(item) for item in tree]]}
    if isinstance(tree, (list, tuple)):
        packed = [_packed(item) for item in tree]
        return packed if isinstance(tree, list) else tuple(packed)
    return plain(tree, "the batch's data")


def _unpacked(tree: Any) -> Any:
    """Undo `_packed`; a named tuple is one of the same name and fields, but not the class that it was."""
    if isinstance(tree, dict) and tree.keys() == {_NAMED}:
        name, fields, items = tree[_NAMED]
        return namedtuple(name, fields)(*(_unpacked(item) for item in items))
    if isinstance(tree, dict):
        return {key: _unpacked(item) for key, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_unpacked(item) for item in tree)
    return tree


def _compact(tensor: Tensor) -> Tensor:
    """Return the tensor with the same strides, and no more memory than they span: a view would save all it views."""
    if tensor.layout != torch.strided or tensor.numel() == 0:
        return tensor
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.untyped_storage().nbytes() <= span * tensor.element_size():
        return tensor
    return tensor.as_strided((span,), (1,)).clone().as_strided(tensor.shape, tensor.stride())
