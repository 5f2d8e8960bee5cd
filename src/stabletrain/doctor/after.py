"""After an incident: replay it, find where it began and in which samples, name the cause, and try what helps."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from stabletrain.config import group_names, option_names
from stabletrain.doctor.cause import Facts, classify
from stabletrain.doctor.diagnosis import Cause, Confidence, Diagnosis
from stabletrain.doctor.origin import Traced
from stabletrain.doctor.remedies import is_rehearsed, tried_remedies
from stabletrain.doctor.replaying import Replay, run_of
from stabletrain.errors import ConfigurationError
from stabletrain.folder import json_text, write_whole
from stabletrain.incident import Incident, incident_folders, load_incident
from stabletrain.trainer.replay import Replayed, replay

DIAGNOSIS_NAME, TEXT_NAME = "diagnosis.json", "diagnosis.txt"


def latest_incident(run: Path | str) -> Path:
    """Return the folder of a run's latest incident.

    Raises:
        ConfigurationError: it has none.
    """
    found = incident_folders(run)
    if not found:
        raise ConfigurationError(f"{run} holds no incidents; give run=<folder of a run> or incident=<folder>.")
    return found[-1]


def diagnose_incident(folder: Path | str, *, time_limit: float = 60.0, all_remedies: bool = True) -> Diagnosis:
    """Find out why a step went bad, from its incident alone, and write `diagnosis.json` and `diagnosis.txt` beside it.

    Args:
        folder: `incidents/<step>` of a run.
        time_limit: seconds after which no more is tried.
        all_remedies: try all that may help; False: until one holds.

    Raises:
        ConfigurationError: the incident can't be read or replayed.
    """
    begun, folder = time.monotonic(), Path(folder)
    incident = load_incident(folder)
    with run_of(incident, folder) as (run, _):
        replayed = replay(run, incident)
        found = _looked_into(Replay(run, incident), replayed, begun + time_limit / 2)
    if found.cause not in (None, "not_reproducible"):
        tried = tried_remedies(
            incident,
            folder,
            list(found.samples),
            begun + time_limit,
            all_remedies=all_remedies,
            bad_state=found.cause in ("weights", "optimizer"),
        )
        held = next((remedy for remedy in tried if remedy.held), None)
        going_on = _command(incident, folder, held.override) if held is not None else ""
        found = replace(found, remedies=tried, command=going_on)
    found = replace(found, seconds=time.monotonic() - begun)
    write_whole(folder / DIAGNOSIS_NAME, json_text(found.content()))
    write_whole(folder / TEXT_NAME, f"{found}\n")
    return found


def _looked_into(attempt: Replay, replayed: Replayed, end: float) -> Diagnosis:
    incident = attempt.incident
    reproduced = replayed.reproduces(incident)
    differences = [f"another machine: {said}" for said in replayed.differences]
    if is_rehearsed(incident):
        differences.append(f"the run rehearses a fault: {incident.settings['fault']['_target_'].rpartition('.')[2]}")
    if reproduced == "no":
        why = "the step is healthy from the same state: hardware or an operation that isn't deterministic is suspected"
        return Diagnosis(reproduced="no", cause="not_reproducible", confidence="medium", evidence=(why, *differences))
    traced = attempt.traced()
    places = attempt.samples(traced, end) if traced.may_be_samples else []
    facts = _facts(attempt, traced, places)
    cause, confidence, evidence = _cause(attempt, facts, replayed)
    indices = attempt.indices()
    return Diagnosis(
        reproduced=reproduced,
        cause=cause,
        confidence=confidence,
        evidence=(_when(incident), *evidence, *differences),
        reached=traced.reached,
        operation=traced.operation,
        source=traced.source,
        samples=[indices[place] for place in places],
        odd=facts.odd,
    )


def _facts(attempt: Replay, traced: Traced, places: Sequence[int]) -> Facts:
    """Describe the microbatch in which it began."""
    batches, indices = attempt.incident.batches, attempt.incident.indices
    bad = next((number for number, loss in enumerate(traced.losses) if not math.isfinite(loss)), 0)
    begin = sum(len(one) for one in indices[:bad])
    count = len(indices[bad]) if indices else 0
    own = [place - begin for place in places if begin <= place < begin + count]
    return Facts(
        traced=traced,
        batch=batches[bad] if batches else None,
        count=count,
        samples=own if len(own) == len(places) else [],
        modules=[attempt.run.model],
        updates=attempt.incident.position.get("updates"),
    )


def _cause(attempt: Replay, facts: Facts, replayed: Replayed) -> tuple[Cause, Confidence, tuple[str, ...]]:
    incident = attempt.incident
    if replayed.reason == "optimizer":
        what: Cause = "weights" if "parameter" in replayed.detail else "optimizer"
        return what, "high", (replayed.detail,)
    if facts.traced.reached is None:
        if facts.samples:
            return "data", "medium", (f"{replayed.detail}; without these samples the step is like the others",)
        if incident.kind == "validation":
            return "unknown", "low", (f"{replayed.detail}; the loss of each batch is finite",)
        return "learning_rate", "low", (f"{replayed.detail}; everything is finite, and no sample is to blame",)
    cause, confidence, evidence = classify(facts)
    outside = cause in ("data", "label", "weights", "initialization")
    if incident.kind != "validation" and not outside and attempt.healthy_without_augmentation():
        return "augmentation", "high", ("without the augmentation the step is healthy", *evidence)
    return cause, confidence, evidence


def _when(incident: Incident) -> str:
    position = incident.position
    return f"at epoch {position['epoch']}, step {position['step']}, after {position['updates']} updates"


def three_lines(found: Diagnosis, folder: Path) -> list[str]:
    """Return the short form, for the end of a run: where, which samples, what to do."""
    samples = ", ".join(map(str, found.samples[:8])) + (" ..." if len(found.samples) > 8 else "")
    if found.command:
        advice = found.command
    elif found.remedies:
        advice = f"none of {len(found.remedies)} changes that were tried holds; see {folder / TEXT_NAME}"
    else:
        advice = f"python -m stabletrain doctor incident={folder}"
    return [
        f"where: {found.where()} (cause: {found.cause}, confidence {found.confidence})",
        f"samples: {samples or 'none is to blame'}",
        f"to do: {advice}",
    ]


def _command(incident: Incident, folder: Path, override: str) -> str:
    """Return the command line that goes on with a run, with one more override."""
    recorded = folder.resolve().parents[1] / "overrides.yaml"
    given = yaml.safe_load(recorded.read_text()) if recorded.is_file() else []
    key, name = override.lstrip("+").partition("=")[0], incident.settings.get("name")
    chosen = [word.lstrip("+").partition("=")[::2] for word in given or []]
    own = any(group in group_names() and option not in option_names(group) for group, option in chosen)
    folder_of_options = ["--config-dir=<the folder of your options>"] if own else []
    kept = [word for word in given or [] if word.lstrip("+").partition("=")[0] not in (key, "name")]
    return shlex.join(["python", "-m", "stabletrain", *folder_of_options, *kept, f"name={name}", override])
