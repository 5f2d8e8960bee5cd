"""Saving everything that the rest of a run depends on, and taking it up again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stabletrain.checkpoint import CheckpointStore
from stabletrain.collectives import sharded_like, whole
from stabletrain.errors import ConfigurationError
from stabletrain.folder import yaml_text
from stabletrain.optimizer import grouping, regrouped, with_changed
from stabletrain.state import Stateful
from stabletrain.trainer.changes import STRUCTURAL, WITH_BATCH_NORM, Change, changes, listed
from stabletrain.trainer.rollback import learned_state
from stabletrain.trainer.run import Run
from stabletrain.weights import tied_names

log = logging.getLogger(__name__)


ROLLBACK_NAME = "rollback.pt"


def save(run: Run, metrics: dict[str, float] | None = None) -> None:
    """Save everything that the rest of the run depends on.

    Args:
        run: between two steps.
        metrics: of the validation of this state; None when it wasn't validated.
    """
    assert run.checkpoint is not None
    further: dict[str, Any] = {}
    run.same_buffers()
    if run.rollback is not None and (kept := run.rollback.kept()) is not None:
        further[ROLLBACK_NAME] = whole(kept)
    position = {name: getattr(run.progress, name) for name in ("epoch", "step", "steps")}
    state = _state(run)
    if not run.ranks.first:
        run.checkpoint.occasions.saved()
        return
    run.checkpoint.save(state, updates=run.progress.updates, position=position, metrics=metrics, further=further)


def _state(run: Run) -> dict[str, Any]:
    return {
        **whole(learned_state(run)),
        "guard": run.guard.state_dict(),
        "progress": run.progress.state_dict(),
        "totals": run.totals.state_dict(),
        "quarantine": run.quarantine.state_dict(),
        "ramp": run.ramp.state_dict(),
        "schedule": run.schedule.state_dict() if isinstance(run.schedule, Stateful) else {},
        "ladder": run.ladder.plan.state_dict() if run.ladder is not None else {},
        "rollback": whole(run.rollback.state_dict(run.progress.updates)) if run.rollback is not None else {},
        "incidents": run.incidents.state_dict() if run.incidents is not None else {},
        "fault": run.fault.state_dict(),
        # Of each process; clones, because they are views of the whole epoch's order.
        "last_good": run.ranks.gather([indices.clone() for indices in run.last_good]),
        "metrics": run.metrics,
        "identity": run.identity,
        "settings": yaml_text(run.settings),
        "hyperparameters": run.hyperparameters,
        "grouping": grouping(run.optimizer, run.trained),
        "tied": tied_names(run.model),
    }


def resume(run: Run) -> None:
    """Continue from the checkpoint that `resume` asks for, if there is one."""
    store = run.checkpoint
    if store is None or run.resume == "never":
        return
    state = _found(run, store)
    if state is None:
        if run.resume == "must":
            raise ConfigurationError(
                f"resume=must, but {store.folder} holds no checkpoint; resume=auto starts from the beginning then."
            )
        return
    changed = _check_changes(run, state)
    hyperparameters = state["hyperparameters"]
    regroup = partial(_regrouped, run, settings=hyperparameters, before=state.get("grouping"))
    state["optimizer"], state["hyperparameters"] = regroup(state["optimizer"])
    state |= _divided(run, state)
    _load_model(run.model, state["model"])
    changed = _load_optimizer(run, state) | changed
    _load_objective(run, state.get("loss"))
    if any(change.of_the_objective for change in changed.values()):
        _forget_losses(run, state)
    if run.ema is not None:
        run.ema.load_state_dict(state["ema"]) if state["ema"] else run.ema.restart(run.model)
    _note(run, changed)
    run.precision.load_state_dict(state["precision"])
    run.guard.load_state_dict(state["guard"])
    run.progress.load_state_dict(state["progress"])
    run.totals.load_state_dict(state["totals"])
    run.quarantine.load_state_dict(state["quarantine"])
    if "ramp" in state:  # younger than the format
        run.ramp.load_state_dict(state["ramp"])
    if state.get("schedule") and isinstance(run.schedule, Stateful):
        run.schedule.load_state_dict(state["schedule"])
    if run.ladder is not None and state.get("ladder"):
        run.ladder.plan.load_state_dict(state["ladder"])
    if run.ramp.batch_size is not None:
        run.loader.resize(run.ramp.batch_size)
    if run.rollback is not None and state["rollback"]:
        rollback = state["rollback"]
        kept = _kept(run, state, store.further.get(ROLLBACK_NAME), regroup)
        trial = rollback.get("trial")
        if trial is not None:
            trial = _kept(run, state, trial, regroup) if "model" in trial else {**learned_state(run), **trial}
        run.rollback.load_state_dict(rollback, kept, trial)
        if any(change.of_the_objective for change in changed.values()):
            run.rollback.forget_losses()
    if run.incidents is not None and state["incidents"]:
        run.incidents.load_state_dict(state["incidents"])
    run.fault.load_state_dict(state["fault"])
    run.last_good = state["last_good"][run.ranks.rank % len(state["last_good"])]
    run.metrics.update(state["metrics"])
    run.tracker.truncate(run.progress)
    log.info("continuing at epoch %d, step %d", run.progress.epoch, run.progress.step)


def _found(run: Run, store: CheckpointStore) -> dict[str, Any] | None:
    """Return the state to continue from: the first process finds it and says which it is, the others read it too."""
    if run.resume not in ("auto", "must"):
        return store.load(run.resume)
    states = []

    def find() -> Path | None:
        states.append(store.latest())
        return store.found if states[0] is not None else None

    found = run.ranks.from_first(find)
    if found is None or run.ranks.first:
        return states[0] if states else None
    return store.load(found)


def _check_changes(run: Run, state: dict[str, Any]) -> dict[str, Change]:
    """Return by key what was changed since the checkpoint was saved; refuse what doesn't go with it."""
    saved = state["identity"]
    found = changes(saved, {name: run.identity.get(name) for name in saved})
    found += changes(yaml.safe_load(state["settings"]), yaml.safe_load(yaml_text(run.settings)))
    structural = STRUCTURAL | (WITH_BATCH_NORM if _has_batch_norm(run.model) else {})
    changed = {change.key: change for change in found}
    refused = [(change, why) for change in changed.values() if (why := change.reason(structural)) is not None]
    if refused:
        place = run.checkpoint.found if run.checkpoint is not None else None
        lines = [f"\n  {one.key} was {one.before!r} and is {one.after!r}: {why}" for one, why in refused]
        raise ConfigurationError(
            f"the checkpoint {place} was saved by a run that can't go on like this:{''.join(lines)}\nSet them back, or "
            f"start a new run, from its weights if you like: name=<other> init_from={place}"
        )
    return changed


def _divided(run: Run, state: dict[str, Any]) -> dict[str, Any]:
    """Return what is learned of a whole state, divided among the ranks as this run divides it."""
    parameters = dict(enumerate(parameter for group in run.optimizer.param_groups for parameter in group["params"]))
    optimizer = {
        number: {name: sharded_like(value, parameters.get(number)) for name, value in memory.items()}
        for number, memory in state["optimizer"]["state"].items()
    }
    average = run.ema.average if run.ema is not None else {}
    return {
        "model": sharded_like(state["model"], run.model.state_dict()),
        "optimizer": {**state["optimizer"], "state": optimizer},
        "ema": {name: sharded_like(value, average) for name, value in state["ema"].items()},
    }


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def _load_optimizer(run: Run, state: dict[str, Any]) -> dict[str, Change]:
    """Load the optimizer's state under today's settings; return by key those that were changed."""
    saved, changed = with_changed(state["optimizer"], state["hyperparameters"], run.hyperparameters)
    run.optimizer.load_state_dict(saved)
    return {f"optimizer.{name}": Change(f"optimizer.{name}", *pair) for name, pair in changed.items()}


def _regrouped(
    run: Run, saved: dict[str, Any], settings: list[dict[str, Any]], before: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return regrouped(saved, settings, before, run.optimizer, run.trained)


def _load_objective(run: Run, saved: dict[str, Tensor] | None) -> None:
    """Load the loss's own state; a loss that had none, or another one, begins with it as it is."""
    if run.objective is None or saved is None:
        return
    own = run.objective.state_dict()
    if {name: value.shape for name, value in own.items()} == {name: value.shape for name, value in saved.items()}:
        run.objective.load_state_dict(saved)
    else:
        run.notes.append(f"{type(run.objective).__name__} begins anew: what the checkpoint holds is another loss's")


def _kept(
    run: Run, state: dict[str, Any], kept: dict[str, Any] | None, regroup: Callable[..., tuple[Any, Any]]
) -> dict[str, Any] | None:
    """Return the copy to roll back to under today's settings, in today's groups."""
    if kept is None:
        return None
    kept = {**kept, "optimizer": regroup(kept["optimizer"])[0]}
    kept = kept | _divided(run, kept)
    kept = {**kept, "optimizer": with_changed(kept["optimizer"], state["hyperparameters"], run.hyperparameters)[0]}
    if run.ema is not None and not kept["ema"]:
        kept["ema"] = {"average": {name: kept["model"][name] for name in run.ema.average}, "updates": 0}
    return kept


def _forget_losses(run: Run, state: dict[str, Any]) -> None:
    """Let what compares losses begin anew."""
    state["guard"] = {**state["guard"], "spikes": run.guard.state_dict()["spikes"]}
    if run.rollback is not None and state["rollback"]:
        state["rollback"] = {**state["rollback"], "divergence": run.rollback.state_dict()["divergence"]}


def _note(run: Run, changed: dict[str, Change]) -> None:
    if changed:
        run.notes.append(f"continuing with changed settings: {listed(list(changed.values()))}")
    if any(change.of_the_objective for change in changed.values()):
        run.notes.append("the losses before and after this change can't be compared; `best` compares them all the same")


def _load_model(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Load, or say which parameters don't fit."""
    own = model.state_dict()
    found = [f"{name} is new" for name in own if name not in saved]
    found += [f"{name} is gone" for name in saved if name not in own]
    found += [
        f"{name} had shape {tuple(saved[name].shape)} and has {tuple(own[name].shape)}"
        for name in own
        if name in saved and saved[name].shape != own[name].shape
    ]
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise ConfigurationError(
            f"the checkpoint is of another model: {'; '.join(found[:5])}{more}. Use the model it was saved from, or "
            "start anew under another name."
        )
    model.load_state_dict(saved)
