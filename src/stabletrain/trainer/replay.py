"""From a step that went wrong to an incident, and from an incident back to the same step."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stabletrain.collectives import whole
from stabletrain.data import Microbatch
from stabletrain.errors import ConfigurationError
from stabletrain.incident import Incident
from stabletrain.incident.files import Kind
from stabletrain.optimizer import grouping, regrouped
from stabletrain.trainer.evaluation import evaluate
from stabletrain.trainer.run import Run, Step
from stabletrain.trainer.step import forward_backward
from stabletrain.tree import to_device


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What a replay measured."""

    reason: str | None  # why the guard would reject the step; None: it is healthy
    detail: str
    loss: float
    grad_norm: float
    losses: tuple[float, ...] = ()  # of each microbatch
    gradients: dict[str, str] = field(default_factory=dict)  # by parameter: sha256 of its gradient, before unscaling
    differences: tuple[str, ...] = ()  # between the machine of the incident and this one

    def reproduces(self, incident: Incident) -> Literal["yes", "no", "differs"]:
        """Say whether this is what happened: the same reason and the same bits of the loss.

        Returns:
            `no` if the step is healthy this time, `differs` if it goes wrong in another way.
        """
        if self.reason is None:
            return "no"
        same_loss = self.loss == incident.loss or (math.isnan(self.loss) and math.isnan(incident.loss))
        return "yes" if same_loss and self.reason == incident.reason else "differs"


def incident_of(
    run: Run,
    step: Step,
    *,
    kind: Kind = "rejected",
    samples: Sequence[dict[str, Any]] = (),
    precision: dict[str, Any] | None = None,
) -> Incident:
    """Collect what it takes to run a rejected step again.

    Args:
        run: in the state before the step, with nothing begun since. The incident refers to its tensors, so record it
            before anything else happens.
        step: with its verdict, and all the microbatches that it saw.
        kind: what came of it.
        samples: found bad, each with `index` and `odd`.
        precision: the loss scaler's state before the step; None: it is as it was. (An overflow lowers the scale.)
    """
    assert step.verdict is not None and step.verdict.reason is not None
    assert not run.guard.begun
    progress = {**run.progress.state_dict(), "epoch": step.epoch, "step": step.index, "steps": step.number}
    progress |= {"rank": step.rank, "ranks": step.ranks}
    facts = step.verdict.facts
    return Incident(
        kind=kind,
        reason=step.verdict.reason,
        detail=facts.detail,
        loss=facts.loss,
        grad_norm=facts.grad_norm,
        position=progress,
        batches=[microbatch.data for microbatch in step.microbatches],
        indices=[microbatch.indices for microbatch in step.microbatches],
        precision=run.precision.state_dict() if precision is None else precision,
        samples=list(samples),
        state=_state(run),
        **_circumstances(run),
    )


def incident_of_validation(
    run: Run, metrics: dict[str, float], microbatches: Sequence[Microbatch], samples: Sequence[dict[str, Any]] = ()
) -> Incident:
    """Collect what it takes to repeat a validation that wasn't finite.

    Args:
        run: as it was validated; record the incident before anything else happens.
        metrics: what was measured.
        microbatches: of the validation data, at least those that aren't finite.
        samples: found bad, each with `index` and `odd`.
    """
    assert not run.guard.begun
    return Incident(
        kind="validation",
        reason="validation",
        detail=_bad_metrics(metrics),
        loss=metrics.get("loss", math.nan),
        grad_norm=math.nan,
        position=run.progress.state_dict(),
        batches=[microbatch.data for microbatch in microbatches],
        indices=[microbatch.indices for microbatch in microbatches],
        precision=run.precision.state_dict(),
        samples=list(samples),
        state={**_state(run), "ema": run.ema.state_dict() if run.ema is not None else {}},
        **_circumstances(run),
    )


def replay(run: Run, incident: Incident) -> Replayed:
    """Run an incident again exactly as it was, and measure what the guard measured; nothing of the run changes.

    Args:
        run: built from the incident's settings, or the run itself.
        incident: from `load_incident`.

    Raises:
        ConfigurationError: the incident is of another model, or holds too little to be replayed.
    """
    with at_incident(run, incident) as step:
        differences = _differences(run, incident)
        if incident.kind == "validation":
            metrics = run.fault.validation(run.progress.steps, evaluate(run, step.microbatches))
            bad = _bad_metrics(metrics)
            return Replayed(
                reason="validation" if bad else None,
                detail=bad,
                loss=metrics.get("loss", math.nan),
                grad_norm=math.nan,
                differences=differences,
            )
        losses = forward_backward(run, step, alone=True)
        gradients = {name: sha256(p.grad) for name, p in run.model.named_parameters() if p.grad is not None}
        facts = run.guard.attempt(losses, commit=False, alone=True)
        return Replayed(
            reason=facts.reason,
            detail=facts.detail,
            loss=facts.loss,
            grad_norm=facts.grad_norm,
            losses=tuple(float(loss) for loss in losses),
            gradients=gradients,
            differences=differences,
        )


@contextmanager
def at_incident(run: Run, incident: Incident) -> Iterator[Step]:
    """Put the run into the state before the incident's step, and back into its own state afterwards, bit for bit.

    Yields:
        The step, ready for `forward_backward`.

    Raises:
        ConfigurationError: as for `replay`.
    """
    if not incident.replayable:
        raise ConfigurationError(
            f"the incident {incident.name} was stored without its state or its data, so it can't be replayed: a state "
            "larger than guard.max_incident_bytes is left out, and data is that isn't tensors, numbers and text."
        )
    assert not run.guard.begun
    with ExitStack() as stack:
        _keep(run, stack)
        _load(run, incident)
        stack.enter_context(run.precision.active())
        # First of all, what was begun and not decided: buffers that a forward put in place of others.
        stack.callback(lambda: run.guard.discard() if run.guard.begun else None)
        run.model.train()
        torch.set_num_threads(incident.environment["threads"])
        run.guard.begin()
        data = to_device(incident.batches, run.device)
        yield Step(
            epoch=incident.position["epoch"],
            index=incident.position["step"],
            number=incident.position["steps"],
            microbatches=[Microbatch(*pair) for pair in zip(data, incident.indices, strict=True)],
            rank=incident.position.get("rank", 0),
            ranks=incident.position.get("ranks", 1),
        )


def sha256(tensor: Tensor) -> str:
    """Return the hash of a tensor's bits.

    Example:
        >>> sha256(torch.zeros(2)) == sha256(torch.zeros(2)), sha256(torch.zeros(1)) == sha256(torch.tensor([-0.0]))
        (True, False)
    """
    tensor = tensor.detach().cpu()
    parts = [tensor.coalesce().indices(), tensor.coalesce().values()] if tensor.is_sparse else [tensor]
    running = hashlib.sha256()
    for part in parts:
        running.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return running.hexdigest()


def _state(run: Run) -> dict[str, Any]:
    return {
        "model": whole(run.model.state_dict()),
        "buffers": _other_buffers(run.model),
        "optimizer": whole(run.optimizer.state_dict()),
        "grouping": grouping(run.optimizer, run.trained),
        **({"loss": run.objective.state_dict()} if run.objective is not None else {}),
    }


def _other_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that the model's `state_dict` leaves out."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}


def _circumstances(run: Run) -> dict[str, Any]:
    return {
        "seed": run.seed,
        "guard": run.guard.state_dict(),
        "environment": _environment(run),
        "settings": run.settings,
    }


def _environment(run: Run) -> dict[str, Any]:
    on_gpu = run.device.type == "cuda"
    return {
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(run.device) if on_gpu else run.device.type,
        "threads": torch.get_num_threads(),
    }


def _differences(run: Run, incident: Incident) -> tuple[str, ...]:
    """Name what is another here than it was, which may change the last bits; called with the threads set."""
    now = _environment(run)
    return tuple(f"{name} was {was}, is {now[name]}" for name, was in incident.environment.items() if now[name] != was)


def _bad_metrics(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value}" for name, value in metrics.items() if not math.isfinite(value))


def _keep(run: Run, stack: ExitStack) -> None:
    """Let the stack put back everything that a replay changes; what is kept first comes back last."""
    stack.callback(torch.set_num_threads, torch.get_num_threads())
    stack.callback(setattr, run, "seed", run.seed)
    stack.callback(run.fault.load_state_dict, run.fault.state_dict())
    stack.callback(run.progress.load_state_dict, run.progress.state_dict())
    stack.callback(run.guard.load_state_dict, copy.deepcopy(run.guard.state_dict()))
    stack.callback(run.precision.load_state_dict, run.precision.state_dict())
    if run.ema is not None:
        stack.callback(run.ema.load_state_dict, copy.deepcopy(run.ema.state_dict()))
    stack.callback(_optimizer_back(run.optimizer))
    model, buffers = copy.deepcopy(run.model.state_dict()), copy.deepcopy(_other_buffers(run.model))
    stack.callback(lambda: _put_model(run.model, model, buffers))
    if run.objective is not None:
        stack.callback(run.objective.load_state_dict, copy.deepcopy(run.objective.state_dict()))
    modes = {module: module.training for module in run.model.modules()}
    gradients = {parameter: parameter.grad for parameter in run.model.parameters()}

    def modes_and_gradients_back() -> None:
        for module, training in modes.items():
            module.training = training
        for parameter, gradient in gradients.items():
            parameter.grad = gradient

    stack.callback(modes_and_gradients_back)
    for parameter in gradients:
        parameter.grad = None


def _optimizer_back(optimizer: Optimizer) -> Callable[[], None]:
    """Return what puts an optimizer's state back.

    Torch's own loading makes new state and new groups, so that the ones before need no copy.
    """
    if type(optimizer).load_state_dict is Optimizer.load_state_dict:
        state, groups = optimizer.state, optimizer.param_groups

        def back() -> None:
            optimizer.state, optimizer.param_groups = state, groups

        return back
    kept = copy.deepcopy(optimizer.state_dict())
    return lambda: optimizer.load_state_dict(kept)


def _load(run: Run, incident: Incident) -> None:
    state = incident.state
    assert state is not None
    try:
        _put_model(run.model, state["model"], state["buffers"])
        saved, _ = regrouped(state["optimizer"], None, state.get("grouping"), run.optimizer, run.trained)
        run.optimizer.load_state_dict(copy.deepcopy(saved))  # it keeps what it loads
        if run.objective is not None and "loss" in state:
            run.objective.load_state_dict(state["loss"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise ConfigurationError(
            f"the incident {incident.name} is of another model or optimizer: {error}. Replay it with the settings in "
            "its config.yaml."
        ) from error
    if run.ema is not None and state.get("ema"):
        run.ema.load_state_dict(copy.deepcopy(state["ema"]))
    run.precision.load_state_dict(incident.precision)
    run.guard.load_state_dict(copy.deepcopy(incident.guard))
    run.progress.load_state_dict(incident.position)
    run.seed = incident.seed
    # A rehearsed fault happens once in a step; in the replay it is to happen again.
    run.fault.load_state_dict({**run.fault.state_dict(), "last": incident.position["steps"] - 1, "done": 0})


@torch.no_grad()
def _put_model(model: nn.Module, state: dict[str, Any], buffers: dict[str, Tensor]) -> None:
    model.load_state_dict(state)
    for name, buffer in _other_buffers(model).items():
        buffer.copy_(buffers[name])
