"""How a guarded model tells its guard that a step begins, or that its state was replaced."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._compile import _disable_dynamo

from stabletrain.guard import measure

if TYPE_CHECKING:
    from stabletrain.guard.step_guard import StepGuard


class Hook:
    """What the model calls; copies of the model (for an average of weights, say) must not call the guard."""

    def __init__(self, guard: StepGuard | None) -> None:
        self._guard = weakref.ref(guard) if guard is not None else None

    def __deepcopy__(self, memo: Any) -> Hook:
        return type(self)(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (None,)

    @property
    def guard(self) -> StepGuard | None:
        """The guard, unless it is gone."""
        return self._guard() if self._guard is not None else None


class BeforeForward(Hook):
    """Marks the start of a step at the first forward after a decision."""

    # Not traced, so that a compiled forward stays in one piece. Unlike torch.compiler.disable this doesn't load the
    # compiler, which takes seconds, before the first call; by then an optimizer has loaded it.
    @_disable_dynamo
    def __call__(self, module: nn.Module, *_: Any) -> None:
        """Begin a step if none is begun."""
        guard = self.guard
        # A forward in evaluation without gradients belongs to no step.
        if guard is not None and not guard._snapshot.taken and (module.training or torch.is_grad_enabled()):
            guard.begin()


class AfterLoading(Hook):
    """Drops what was copied before the state was replaced."""

    def __call__(self, *_: Any) -> None:
        """Let the guard forget, and look at the new state."""
        guard = self.guard
        if guard is not None:
            guard.forget()
            guard._buffers.seen_data = measure.have_seen_data(guard.models)


def watch(module: nn.Module, guard: StepGuard) -> list[Any]:
    """Hang the guard's hooks on a model, and return the handles that take them off."""
    after = AfterLoading(guard)
    return [
        module.register_forward_pre_hook(BeforeForward(guard), prepend=True),
        *(part.register_load_state_dict_post_hook(after) for part in module.modules()),  # type: ignore[no-untyped-call]
    ]


def end_step_of_others(guard: StepGuard) -> None:
    """End the step of every other guard of these models, because a decision about what they did was made.

    Two networks that train in turn run each other: what one ran within the other's step was decided there.
    """
    for module in guard.models:
        for hook in module._forward_pre_hooks.values():
            other = hook.guard if isinstance(hook, BeforeForward) else None
            if other is not None and other is not guard:
                other._snapshot.taken = False
