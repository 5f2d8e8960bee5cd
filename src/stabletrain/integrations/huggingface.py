"""The guard in Hugging Face's `Trainer`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from stabletrain.collectives import all_ranks
from stabletrain.errors import ConfigurationError
from stabletrain.guard import Policy, StepGuard
from stabletrain.integrations.accelerate import telling, unwrapped


class GuardCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Lets the trainer's optimizer step only if loss, gradients, buffers and optimizer state are healthy.

    Set `max_grad_norm=0` in the training arguments: the guard clips, after it has looked. The learning rate's schedule
    doesn't move on a rejected step; the trainer's `global_step` does. Counts appear in the trainer's logs as
    `guard_applied` and `guard_rejected`.

    Args:
        max_norm: largest Euclidean norm over all gradients; None: no clipping.
        policy: what follows from a rejected step; a mapping of its fields will do.
        settings: whatever else `StepGuard` takes; it isn't saved with the trainer's checkpoints.

    Example:
        >>> GuardCallback(max_norm=1.0).state()["args"]["max_norm"]
        1.0
    """

    def __init__(
        self, max_norm: float | None = None, policy: Policy | dict[str, Any] | None = None, **settings: Any
    ) -> None:
        self.max_norm = max_norm
        self.policy = Policy(**policy) if isinstance(policy, dict) else policy or Policy()
        self.settings = settings
        self.guard: StepGuard | None = None
        self.saved: dict[str, Any] | None = None  # the guard's state, of a checkpoint or of training before
        self._handle: Any = None

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse clipping by the trainer.

        Raises:
            ConfigurationError: for a `max_grad_norm` other than 0.
        """
        if args.max_grad_norm:
            raise ConfigurationError(
                f"max_grad_norm is {args.max_grad_norm}, but clipping turns one NaN into all NaN before the guard can "
                f"look: set max_grad_norm=0 and give GuardCallback(max_norm={args.max_grad_norm})."
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Attach the guard to the trainer's model and optimizer."""
        self.on_init_end(args, state, control)
        model, optimizer = parts["model"], parts["optimizer"]
        guard = StepGuard(
            model,
            unwrapped(optimizer),
            max_norm=self.max_norm,
            policy=self.policy,
            **{"scaler": optimizer.scaler, "ranks": all_ranks(), **self.settings},
        )
        if self.saved is not None:
            guard.load_state_dict(self.saved)
        self.guard = guard.attach(after_step=telling(optimizer))
        self._handle = model.register_forward_hook(self._observe)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the guard off; `guard.stats` can still be read."""
        if self.guard is not None:
            self.saved = self.guard.state_dict()
            self.guard.remove()
            self._handle.remove()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the loss scale right for a checkpoint, which may follow."""
        if self.guard is not None and self.guard.attachment is not None:
            self.guard.attachment.settle_scale()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Add the guard's counts to what the trainer logs."""
        if self.guard is None or logs is None:
            return
        stats = self.guard.stats
        counts = {"guard_applied": stats.applied, "guard_rejected": stats.rejected}
        counts.update({f"guard_rejected_{reason}": count for reason, count in stats.reasons.items()})
        logs.update(counts)
        state.log_history[-1].update(counts)

    def state(self) -> dict[str, Any]:
        """Return what the trainer writes into its checkpoint; `restore_callback_states_from_checkpoint` reads it."""
        saved = self.guard.state_dict() if self.guard is not None else self.saved
        return {"args": {"max_norm": self.max_norm, "policy": asdict(self.policy)}, "attributes": {"saved": saved}}

    def _observe(self, model: nn.Module, _: Any, outputs: Any) -> None:
        """Take note of the loss that the model returns; one that the trainer computes itself isn't seen."""
        loss = outputs.get("loss") if hasattr(outputs, "get") else None
        if self.guard is not None and model.training and torch.is_grad_enabled() and isinstance(loss, Tensor):
            self.guard.observe(loss.mean())
