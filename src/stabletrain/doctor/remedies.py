"""Overrides that may help, tried on the replay of a step and on the updates that follow it.

They are tried in the order in which people try them: precision, data, loss, learning rate and clipping, augmentation.
Before these, what is plainer: no rehearsed fault, and where the state itself is bad, the last healthy checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stabletrain.checkpoint.files import checkpoint_folders, manifest_or_none
from stabletrain.config.keys import locate
from stabletrain.doctor.diagnosis import Remedy
from stabletrain.doctor.replaying import Replay, run_of
from stabletrain.errors import ConfigurationError
from stabletrain.folder import json_text, write_whole
from stabletrain.incident import Incident

UPDATES = 10  # that follow the step


def tried_remedies(
    incident: Incident,
    folder: Path,
    indices: Sequence[int],
    end: float,
    *,
    all_remedies: bool = True,
    bad_state: bool = False,
) -> tuple[Remedy, ...]:
    """Try one change after another, until the time is over.

    Args:
        incident: what happened.
        folder: where a list of samples to leave out is put.
        indices: the samples to blame, in the data set.
        end: by `time.monotonic`; nothing is begun after it.
        all_remedies: False: only until one holds.
        bad_state: whether weights, buffers or the optimizer were bad before the step.

    Returns:
        What was tried, whether it held or not.
    """
    found: list[Remedy] = []
    for group, override in candidates(incident, folder, indices, bad_state=bad_state):
        if time.monotonic() > end or (found and found[-1].held and not all_remedies):
            break
        found.append(_tried(incident, folder, group, override, indices, end))
    return tuple(found)


def candidates(
    incident: Incident, folder: Path, indices: Sequence[int], *, bad_state: bool = False
) -> Iterator[tuple[str, str]]:
    """Yield the kind and the override of each change that differs from what the run had."""
    settings = incident.settings
    if is_rehearsed(incident):
        yield "fault", "fault=none"
    checkpoint = checkpoint_before(incident, folder) if bad_state else None
    if checkpoint is not None:
        yield "checkpoint", f"resume={checkpoint}"
    dtype = str(settings.get("precision", {}).get("dtype", "float32"))
    if dtype == "float16":
        yield "precision", "precision=fp16_conservative"
        yield "precision", "precision=bf16"
    if dtype != "float32":
        yield "precision", "precision=fp32"
    if indices:
        path = _listed(folder, indices)
        added = "" if "quarantine" in settings.get("guard", {}) else "+"
        yield "data", f"{added}guard.quarantine={path}"
    for mode, before in (("smoothed", ("as_is",)), ("plain", ("as_is", "smoothed"))):
        if settings.get("loss_mode") in before and simplifies(settings, mode):
            yield "loss", f"loss_mode={mode}"
    for rate in rates(incident):
        yield "learning rate and clipping", f"optimizer.lr={rate:g}"
    limit = settings.get("clipping", {}).get("max_norm")
    if limit is None or limit > 0.5:
        yield "learning rate and clipping", "clipping=norm_strict"
    if not str(settings.get("augmentation", {}).get("_target_", "")).endswith("Unchanged"):
        yield "augmentation", "augmentation=none"


def is_rehearsed(incident: Incident) -> bool:
    """Whether the run was told to go wrong."""
    return not str(incident.settings.get("fault", {}).get("_target_", "NoFault")).endswith("NoFault")


def run_folder(folder: Path) -> Path:
    """Return the folder of the run that an incident is of; the incident's own, where it was moved."""
    return folder.parents[1] if folder.parent.name == "incidents" else folder


def checkpoint_before(incident: Incident, folder: Path) -> Path | None:
    """Return the newest checkpoint of the incident's run that is not younger than the incident; None: there is none."""
    found = [manifest_or_none(path) for path in checkpoint_folders(run_folder(folder) / "checkpoints")]
    earlier = [one for one in found if one is not None and one.updates <= incident.position["updates"]]
    return max(earlier, key=lambda checkpoint: checkpoint.serial).path if earlier else None


def simplifies(settings: dict[str, Any], mode: str) -> bool:
    """Return whether a mode changes the loss of these settings; a loss that doesn't say is asked by trying.

    Example:
        >>> [simplifies({"loss": {"_target_": f"stabletrain.loss.{name}"}}, "plain") for name in ("FocalLoss", "BPR")]
        [True, False]
    """
    try:
        modes = getattr(locate("loss", settings.get("loss", {}).get("_target_")), "modes", None)
    except ConfigurationError:
        return True
    return modes is None or mode in modes


def _listed(folder: Path, indices: Sequence[int]) -> Path:
    """Write the samples to leave out into the run's folder, beside those found before."""
    path = run_folder(folder) / "bad_samples.json"
    known = set(json.loads(path.read_text())["indices"]) if path.is_file() else set()
    write_whole(path, json_text({"indices": sorted(known | set(indices))}))
    return path


def rates(incident: Incident) -> list[float]:
    """Return the learning rates to try, by when it happened: the earlier, the smaller.

    In the first epochs 1e-5, 5e-6 and 1e-6; later 5e-5 and 1e-5; each only if it is below the run's own.
    """
    rate = float(incident.settings.get("optimizer", {}).get("lr", 0.0))
    early = incident.position.get("epoch", 0) < 3
    steps = [1e-5, 5e-6, 1e-6] if early else [5e-5, 1e-5]
    return [step for step in steps if step < rate]


def _tried(incident: Incident, folder: Path, group: str, override: str, indices: Sequence[int], end: float) -> Remedy:
    rate = float(override.partition("=")[2]) if override.startswith("optimizer.lr=") else None
    state = Path(override.partition("=")[2]) if group == "checkpoint" else None
    try:
        given = [] if group in ("data", "checkpoint") or rate is not None else [override]
        with run_of(incident, folder, given) as (run, at_hand):
            replay = Replay(run, incident)
            leave_out = set(indices) if group == "data" else set()
            without = [place for place, index in enumerate(replay.indices()) if index in leave_out]
            held, done = replay.goes_on(UPDATES, at_hand, end, rate=rate, without=without, state=state)
    except (ConfigurationError, RuntimeError, ValueError) as error:
        return Remedy(override=override, held=False, tried_updates=0, detail=str(error).splitlines()[0], group=group)
    return Remedy(override=override, held=held, tried_updates=done, group=group)
