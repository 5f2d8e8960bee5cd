"""What follows from a rejected step: salvage, or a rollback, or going on within the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stabletrain.errors import UnstableTraining
from stabletrain.guard.measure import state_is_finite
from stabletrain.quarantine import FILE_NAME
from stabletrain.trainer.interruption import poll
from stabletrain.trainer.record import located
from stabletrain.trainer.replay import incident_of
from stabletrain.trainer.run import Run, Step
from stabletrain.trainer.salvage import bad_inputs, is_no_overflow, read_samples, salvage


def mend(run: Run, step: Step) -> bool:
    """Keep a rejected step on disk, and salvage it or roll back, as the policy says.

    Args:
        run: in the state before the step, or with the work of the step after it begun.
        step: was rejected; after a salvage it is what was applied instead.

    Returns:
        Whether work begun since has to begin anew.

    Raises:
        UnstableTraining: when nothing helps within the policy's limits.
    """
    policy, verdict = run.guard.policy, step.verdict
    assert verdict is not None
    begun = run.guard.begun
    if begun:
        run.guard.discard()
    if policy.on_rejection not in ("salvage", "rollback"):
        keep_incident(run, step)
        return begun
    if verdict.reason == "overflow" and is_no_overflow(run, step):
        step.verdict = verdict = run.guard.call_no_overflow(verdict)
        # A replay is to show what showed it: the step without a loss scale.
        incident = keep_incident(run, step, precision={**run.precision.state_dict(), "scale": 1.0})
    else:
        incident = keep_incident(run, step)
    bad = salvage(run, step)
    if bad is not None:
        step.rejected_for, step.bad_samples = verdict, bad
        run.guard.ledger.take_back(verdict)
        _quarantine(run, step)
        _amend(run, incident, "salvaged", bad)
        return True
    ruined = run.ranks.any(verdict.reason == "optimizer" or not bool(state_is_finite([run.optimizer])))
    try:
        run.guard.ledger.check(verdict)
        if ruined:
            raise UnstableTraining(f"{verdict.detail}.", verdict)  # no step can heal that
    except UnstableTraining as error:
        roll_back(run, error, step, blame_rate=not ruined)
        _amend(run, incident, "rolled_back", [])
    if run.rollback is not None:
        run.rollback.disturbed(run.progress.updates)
    return True


def roll_back(run: Run, why: UnstableTraining, step: Step, *, blame_rate: bool) -> None:
    """Return to the last healthy state, at a lower rate, or stop and say where it was."""
    if run.rollback is None:
        raise located(run, why, step) from None
    try:
        run.rollback.go_back(run, why, blame_rate=blame_rate)
    except UnstableTraining as final:
        raise located(run, UnstableTraining(str(final), why.verdict), step) from None


def keep_incident(run: Run, step: Step, *, precision: dict[str, Any] | None = None) -> Path | None:
    """Write a rejected step to disk, so that it can be replayed; overflows are no incidents.

    Args:
        run: in the state before the step, with the work of the step after it begun at most.
        step: was rejected.
        precision: the loss scaler's state for the replay; None: as it is.
    """
    verdict = step.verdict
    if run.guard.begun:
        run.guard.discard()
    if run.incidents is None or verdict is None or verdict.reason in (None, "overflow"):
        return None
    incident = incident_of(run, step, precision=precision)
    if run.ranks.rank == verdict.facts.rank:
        return run.incidents.record(incident)
    run.incidents.recorded += 1  # by the process that has the bad microbatch
    return None


def _amend(run: Run, incident: Path | None, kind: str, bad: list[int]) -> None:
    if run.incidents is not None:
        samples = [{"index": index, "odd": run.quarantine.found[index]["odd"]} for index in bad]
        run.incidents.amend(incident, kind=kind, samples=samples)


def scan(run: Run) -> None:
    """Look at all training data before the first step, and leave out the samples that hold NaN or Inf."""
    size, total, ranks = run.loader.batch_size, len(run.loader.dataset), run.ranks
    found: list[int] = []
    for first in range(0, total, size * ranks.size):
        poll(run)
        own = first + size * ranks.rank
        indices = range(min(own, total), min(own + size, total))
        found += bad_inputs([run.loader.read(indices, 0)]) if indices else []
    for index in sorted(index for some in ranks.gather(found) for index in some):
        run.quarantine.add(index, epoch=0, step=0, sample=run.loader.read([index], 0).data)
    if run.quarantine.found:
        _keep_quarantine(run, "the data scan before the first step")


def _quarantine(run: Run, step: Step) -> None:
    """Remember the bad samples of a step."""
    for index in step.bad_samples:
        sample = read_samples(run, step, [index]).data
        run.quarantine.add(index, epoch=step.epoch, step=step.index, sample=sample)
    _keep_quarantine(run, f"epoch {step.epoch}, step {step.index}")


def _keep_quarantine(run: Run, where: str) -> None:
    """Write the list down, and stop when it is too long for a few bad samples."""
    if run.folder is not None:  # the first process has it
        try:
            run.quarantine.write(run.folder.path / FILE_NAME)
        except OSError as error:
            run.tracker.warning(f"the quarantine can't be written ({error}); training goes on")
    limit, total = run.guard.policy.max_quarantined, len(run.loader.dataset)
    if run.quarantine.exceeds(limit, total):
        raise UnstableTraining(
            f"{where}: {run.quarantine.share(total):.1%} of the training data were found bad, more than the "
            f"{limit:.1%} allowed (guard.max_quarantined). That is not a few bad samples: quarantine.json in the run's "
            "folder says what is odd about them."
        )
