"""The guard in a loop written with Accelerate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from stabletrain.errors import ConfigurationError
from stabletrain.guard import StepGuard, Verdict


def guarded(accelerator: Any, model: nn.Module, optimizer: Any, **settings: Any) -> StepGuard:
    """Let the optimizer's `step` decide; the schedulers that Accelerate prepared wait while steps are rejected.

    The loop stays as it is, less its own clipping. Show the guard each loss with `guard.observe(loss)` before
    `accelerator.backward(loss)` if you can: then its verdicts name the loss, and spikes are judged by it too.

    Args:
        accelerator: the accelerator, after `prepare`. It saves and loads the guard with its own checkpoints.
        model: what `accelerator.prepare` returned for the model.
        optimizer: what it returned for the optimizer.
        settings: `max_norm`, `policy` and whatever else `StepGuard` takes.

    Returns:
        The guard, attached.

    Raises:
        ConfigurationError: if the optimizer wasn't prepared.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> accelerator = Accelerator(cpu=True)
        >>> model = nn.Linear(2, 1)
        >>> model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> guard = guarded(accelerator, model, optimizer, max_norm=1.0)
        >>> accelerator.backward(model(torch.full((1, 2), float("nan"))).mean())
        >>> optimizer.step()
        >>> guard.stats.rejected, optimizer.step_was_skipped
        (1, True)
    """
    plain = unwrapped(optimizer)
    guard = StepGuard(model, plain, **{"scaler": accelerator.scaler, **settings})
    attachment = guard.attach(after_step=telling(optimizer)).attachment
    assert attachment is not None
    accelerator.register_save_state_pre_hook(lambda *_: attachment.settle_scale())
    accelerator.register_for_checkpointing(guard)
    return guard


def unwrapped(optimizer: Any) -> Optimizer:
    """Return the torch optimizer in what `accelerator.prepare` returned.

    Raises:
        ConfigurationError: if it wasn't prepared.
    """
    plain = getattr(optimizer, "optimizer", None)
    if not hasattr(optimizer, "step_was_skipped") or not isinstance(plain, Optimizer):
        raise ConfigurationError(
            f"the optimizer is a {type(optimizer).__name__}; give the one that accelerator.prepare(...) returned. "
            "DeepSpeed's and Megatron's, which step by themselves, can't be guarded."
        )
    return plain


def telling(optimizer: Any) -> Callable[[Verdict], None]:
    """Return what tells Accelerate's optimizer that its step was skipped, so that its schedulers wait."""

    def tell(verdict: Verdict) -> None:
        # Without a loss scaler the first is read as it stands; with one it is derived from the second.
        optimizer._is_overflow = not verdict.applied
        if optimizer.scaler is not None:
            optimizer._accelerate_step_called = verdict.applied

    return tell
