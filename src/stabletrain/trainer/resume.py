"""Saving everything that the rest of a run depends on, and taking it up again."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn

from stabletrain.errors import ConfigurationError
from stabletrain.trainer.rollback import learned_state
from stabletrain.trainer.run import Run

log = logging.getLogger(__name__)


def save(run: Run, metrics: dict[str, float] | None = None) -> None:
    """Save everything that the rest of the run depends on."""
    assert run.checkpoint is not None
    run.checkpoint.save(_state(run), updates=run.progress.updates, metrics=metrics)


def _state(run: Run) -> dict[str, Any]:
    return {
        **learned_state(run),
        "guard": run.guard.state_dict(),
        "progress": run.progress.state_dict(),
        "totals": run.totals.state_dict(),
        "quarantine": run.quarantine.state_dict(),
        "ramp": run.ramp.state_dict(),
        "rollback": run.rollback.state_dict(run.progress.updates) if run.rollback is not None else {},
        "incidents": run.incidents.state_dict() if run.incidents is not None else {},
        "fault": run.fault.state_dict(),
        "metrics": run.metrics,
        "identity": run.identity,
    }


def resume(run: Run) -> None:
    """Continue from the checkpoint that `resume` asks for, if there is one."""
    store = run.checkpoint
    if store is None or run.resume == "never":
        return
    state = store.latest() if run.resume in ("auto", "must") else store.load(run.resume)
    if state is None:
        if run.resume == "must":
            raise ConfigurationError(
                f"resume=must, but {store.folder} holds no checkpoint; resume=auto starts from the beginning then."
            )
        return
    _check_identity(run, state["identity"])
    _load_model(run.model, state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    if run.ema is not None and state["ema"]:
        run.ema.load_state_dict(state["ema"])
    run.precision.load_state_dict(state["precision"])
    run.guard.load_state_dict(state["guard"])
    run.progress.load_state_dict(state["progress"])
    run.totals.load_state_dict(state["totals"])
    run.quarantine.load_state_dict(state["quarantine"])
    run.ramp.load_state_dict(state["ramp"])
    if run.ramp.batch_size is not None:
        run.loader.resize(run.ramp.batch_size)
    if run.rollback is not None and state["rollback"]:
        run.rollback.load_state_dict(state["rollback"], run)
    if run.incidents is not None and state["incidents"]:
        run.incidents.load_state_dict(state["incidents"])
    run.fault.load_state_dict(state["fault"])
    run.metrics.update(state["metrics"])
    run.tracker.truncate(run.progress)
    log.info("continuing at epoch %d, step %d", run.progress.epoch, run.progress.step)


def _check_identity(run: Run, saved: dict[str, Any]) -> None:
    changed = [name for name, value in run.identity.items() if name in saved and saved[name] != value]
    if changed:
        listed = "; ".join(f"{name} was {saved[name]!r} and is {run.identity[name]!r}" for name in changed)
        raise ConfigurationError(
            f"the checkpoint belongs to another run: {listed}. These decide which samples a step sees. Set them back, "
            "or start anew under another name."
        )


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
