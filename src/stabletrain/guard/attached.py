"""The guard in a loop that belongs to somebody else and calls `optimizer.step` itself: through hooks alone."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from stabletrain.errors import ConfigurationError
from stabletrain.finite import scale_all
from stabletrain.guard import measure
from stabletrain.guard.verdict import Facts, Verdict

if TYPE_CHECKING:
    from stabletrain.guard.step_guard import StepGuard

log = logging.getLogger(__name__)

# While it steps an optimizer that says this of itself, torch's loss scaler neither unscales nor skips: it hands the
# scale over as `optimizer.grad_scale`. So the guard sees overflows too.
HANDLES_SCALING = "_step_supports_amp_scaling"
AfterStep = Callable[[Verdict], None]


class Attachment:
    """Decides in a hook before `optimizer.step`, or within it once the closure that it was given has run.

    After a rejection every gradient is None, so the optimizer passes and changes nothing. Without `observe` a step is
    judged by its gradients, buffers and state alone. A decision holds for each of the guard's optimizers once; the
    next forward begins a new step.

    Args:
        guard: whose models and optimizers these are; a loss scaler that it was given stays the loop's own.
        handles_scaling: whether the optimizers are to be stepped on overflow as well, so that the guard sees it. False
            where the loop unscales, and calls `decide` before the scaler's `step`.
        after_step: called with the verdict when an optimizer's `step` is over.

    Raises:
        ConfigurationError: for an optimizer that evaluates the loss several times in a step.
    """

    def __init__(self, guard: StepGuard, *, handles_scaling: bool = True, after_step: AfterStep | None = None) -> None:
        if any(isinstance(optimizer, LBFGS) for optimizer in guard.optimizers):
            raise ConfigurationError(
                "LBFGS evaluates the loss several times in one step, which the guard can't undo as one; "
                "use an optimizer that evaluates it once."
            )
        self.guard = guard
        self.losses: list[Tensor] = []
        self.verdict: Verdict | None = None
        self._scaler, guard.scaler = guard.scaler, None
        self._kept_scale: dict[str, Any] | None = None  # to put back once the loop has updated its scaler
        self._after_step = after_step
        self._waiting: list[Optimizer] = []  # optimizers for which the verdict is still to be carried out
        self._stepping: Optimizer | None = None
        self._nested = 0  # a step that calls its parent class's: torch runs the hooks for each
        self._noted = True  # whether the guard knows that the verdict was carried out
        self._scaled = False  # whether the optimizer is stepped by a loss scaler
        self._groups: list[dict[str, Any]] = []
        self._handles: list[Any] = []
        self._marked = []
        for optimizer in guard.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before))
            self._handles.append(optimizer.register_step_post_hook(self._after))
            if handles_scaling and not getattr(optimizer, HANDLES_SCALING, False):
                setattr(optimizer, HANDLES_SCALING, True)
                self._marked.append(optimizer)

    def observe(self, loss: Tensor) -> None:
        """Take note of the loss of a microbatch of the step that was begun, before any loss scaling."""
        self.losses.append(loss.detach())

    def decide(self) -> Verdict:
        """Judge the step that was begun; clip its gradients, or undo it and drop them.

        The optimizer's own `step` calls it. Call it yourself where the loop clips before that.

        Raises:
            UnstableTraining: by the policy, after everything was undone.
            ConfigurationError: if the forward didn't go through the model's `__call__`, so nothing can be undone.
        """
        guard = self.guard
        guard._check_begun()
        self._note()
        guard._snapshot.note_moved_parameters()
        losses, self.losses = self.losses, []
        self.verdict = verdict = Verdict(self._judge(losses))
        self._waiting = list(guard.optimizers)
        self._nested = 0
        self._noted = not verdict.applied
        if verdict.applied:
            guard._limit_gradients(verdict.facts)
            guard._snapshot.taken = False
        else:
            if self._scaler is not None and verdict.reason != "overflow":
                self._kept_scale = self._scaler.state_dict()
            guard._undo(verdict.reason)
            log.warning("step %d was rejected for its %s: %s", guard.ledger.steps, verdict.reason, verdict.detail)
        guard._count(verdict)
        return verdict

    def settle_scale(self) -> None:
        """Put the loss scale back if the loop's scaler took a bad step for an overflow; at least 1 in any case.

        Called at the next forward, so it matters only to those who save the scaler before that.
        """
        if self._scaler is None:
            return
        if self._kept_scale is not None:
            self._scaler.load_state_dict(self._kept_scale)
            self._kept_scale = None
        elif self.verdict is not None and self.verdict.reason == "overflow" and self._scaler.get_scale() < 1.0:
            self._scaler.update(1.0)

    def remove(self) -> None:
        """Take the hooks off the optimizers, and give the guard back its scaler."""
        for handle in self._handles:
            handle.remove()
        for optimizer in self._marked:
            delattr(optimizer, HANDLES_SCALING)
        self.guard.scaler = self._scaler

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Decide, or see to it that the closure does: what it is stepped with then is what the closure leaves."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._prepare(optimizer)
            return None
        calls = itertools.count()

        def then_decide() -> Any:
            if next(calls) > 0:
                raise ConfigurationError(
                    f"{type(optimizer).__name__} evaluates the loss more than once in a step, which the guard can't "
                    "undo as one; use an optimizer that evaluates it once."
                )
            loss = closure()
            if not self.losses and isinstance(loss, Tensor) and self.guard.begun:
                self.observe(loss)
            self._prepare(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], then_decide, *args[2:]), kwargs
        return args, {**kwargs, "closure": then_decide}

    def _is_due(self, optimizer: Optimizer) -> bool:
        """Return whether this optimizer can't step on the last verdict: a forward came after it, or it has done so."""
        return self.guard.begun or not any(optimizer is one for one in self._waiting)

    def _prepare(self, optimizer: Optimizer) -> None:
        if self._stepping is optimizer and not self.guard.begun:
            self._nested += 1
            return
        self._unscale(optimizer)
        if self._is_due(optimizer):
            self.decide()
        self._waiting = [one for one in self._waiting if one is not optimizer]
        self._stepping = optimizer
        assert self.verdict is not None
        if not self.verdict.applied:
            # Some optimizers count their steps in the groups, with or without gradients.
            self._groups = [_values(group) for group in optimizer.param_groups]

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        if self._nested > 0:
            self._nested -= 1
            return
        self._stepping = None
        assert self.verdict is not None
        if not self.verdict.applied:
            for group, values in zip(optimizer.param_groups, self._groups, strict=True):
                _put_back(group, values)
        elif not self._waiting:
            self._note()
        if self._after_step is not None:
            self._after_step(self.verdict)

    def _note(self) -> None:
        """Let the guard know of an applied step, once all optimizers have stepped or the next decision is due."""
        if not self._noted:
            assert self.verdict is not None
            self._noted = True
            self.guard._note_committed(self.verdict.facts)

    def _unscale(self, optimizer: Any) -> None:
        """Undo the loss scale where the scaler has left that to the optimizer."""
        scale = getattr(optimizer, "grad_scale", None)
        if scale is not None:
            if len(self.guard.optimizers) > 1:
                raise ConfigurationError(
                    "several optimizers decide together, so their gradients must be comparable: "
                    "call scaler.unscale_(optimizer) for each of them before the first scaler.step(optimizer)."
                )
            scale_all(measure.gradients([optimizer]), scale.double().reciprocal().float())
        if getattr(optimizer, "found_inf", None) is not None:
            optimizer.grad_scale = None
            self._scaled, optimizer.found_inf = True, None

    def _judge(self, losses: list[Tensor]) -> Facts:
        """Judge as the guard does, but tell an overflow, which is the business of the loop's scaler."""
        facts = self.guard._judge(losses or None)
        scaled = self._scaled or self._scaler is not None
        self._scaled = False
        if not scaled or math.isfinite(facts.grad_norm) or facts.reason not in (None, "gradient"):
            return facts
        if facts.reason is None or self._scaler is None or self._scaler.get_scale() > 1.0:
            return facts._replace(reason="overflow", detail=facts.detail or f"the gradient norm is {facts.grad_norm}")
        return facts


def _values(group: dict[str, Any]) -> dict[str, Any]:
    """Return what stands in a parameter group besides the parameters."""
    return {
        name: value.clone() if isinstance(value, Tensor) else value for name, value in group.items() if name != "params"
    }


@torch.no_grad()
def _put_back(group: dict[str, Any], values: dict[str, Any]) -> None:
    for name in group.keys() - values.keys() - {"params"}:
        del group[name]
    for name, value in values.items():
        if isinstance(value, Tensor):
            group[name].copy_(value)  # schedules keep the tensor itself
        else:
            group[name] = value
