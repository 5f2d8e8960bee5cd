"""The guard in Lightning's `Trainer`."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from stabletrain.collectives import all_ranks
from stabletrain.guard import StepGuard, Verdict
from stabletrain.guard.attached import HANDLES_SCALING

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:  # the same library under its older name
    from pytorch_lightning import Callback


class GuardCallback(Callback):  # type: ignore[misc]
    """Lets the trainer's optimizers step only if loss, gradients, buffers and optimizer state are healthy.

    It decides after backward (of the last microbatch under accumulation) and before Lightning clips, so clip with
    either. A scheduler that moves with each step doesn't move on a rejected one; `global_step` does. Logged after each
    epoch and each rejected step: `guard/applied`, `guard/rejected`. The counts are saved in Lightning's checkpoints.

    In manual optimization each optimizer gets a guard of its own, and each `optimizer.step()` ends a step.

    Args:
        log: whether to log the counts.
        settings: `max_norm`, `policy` and whatever else `StepGuard` takes.

    Example:
        >>> GuardCallback(max_norm=1.0).guards
        []
    """

    def __init__(self, *, log: bool = True, **settings: Any) -> None:
        self.settings = settings
        self.guards: list[StepGuard] = []  # one for each optimizer
        self._log = log
        self._logged = 0  # rejected steps when the counts were logged last
        self._saved: list[dict[str, Any]] = []
        self._frequencies: list[tuple[Any, int]] = []  # of schedulers that wait

    @property
    def guard(self) -> StepGuard:
        """The guard of the only optimizer, from the start of training on."""
        [guard] = self.guards
        return guard

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach the guards to the optimizers."""
        scaler = _scaler(trainer)
        manual = not pl_module.automatic_optimization

        def after_step(verdict: Verdict) -> None:
            if manual:
                self._begin()  # what comes next in this batch is another step
            elif not verdict.applied:
                self._hold_schedulers(trainer)

        settings = {"scaler": scaler, "ranks": all_ranks(), **self.settings}
        self.guards = [StepGuard(pl_module, optimizer, **settings) for optimizer in trainer.optimizers]
        for guard, state in zip(self.guards, self._saved, strict=False):
            guard.load_state_dict(state)
        for guard in self.guards:
            guard.attach(handles_scaling=manual, after_step=after_step)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin a step, unless this is one more microbatch of it: `training_step` is no forward that can be seen."""
        self._begin()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Take note of the loss, which Lightning has scaled and divided by the number of microbatches."""
        if pl_module.automatic_optimization:
            scaler = _scaler(trainer)
            scale = scaler.get_scale() if scaler is not None else 1.0
            self.guard.observe(loss.detach().float() * (trainer.accumulate_grad_batches / scale))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """Decide, with the gradients unscaled and not yet clipped."""
        if _scaler(trainer) is not None and getattr(optimizer, HANDLES_SCALING, False):
            return  # they are still scaled: the hook of the optimizer's step decides, and nothing clips
        [attachment] = [guard.attachment for guard in self.guards if guard.optimizers[0] is optimizer]
        assert attachment is not None
        if not attachment.decide().applied and pl_module.automatic_optimization:
            self._hold_schedulers(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let schedulers move again, and log after a rejection; Lightning's logging costs too much for every batch."""
        for config, frequency in self._frequencies:
            config.frequency = frequency
        self._frequencies = []
        for guard in self.guards:
            assert guard.attachment is not None
            guard.attachment.settle_scale()
        if self._rejected != self._logged:
            self._write(pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log."""
        self._write(pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the guards off; their `stats` can still be read."""
        self._saved = [guard.state_dict() for guard in self.guards]
        for guard in self.guards:
            guard.remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take the guards off."""
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the guards' states for Lightning's checkpoint."""
        return {"guards": [guard.state_dict() for guard in self.guards] or self._saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the guards' states until training starts."""
        self._saved = state_dict["guards"]

    @property
    def _rejected(self) -> int:
        return sum(guard.stats.rejected for guard in self.guards)

    def _write(self, pl_module: Any) -> None:
        if self._log:
            pl_module.log("guard/applied", float(sum(guard.stats.applied for guard in self.guards)))
            pl_module.log("guard/rejected", float(self._rejected))
        self._logged = self._rejected

    def _begin(self) -> None:
        for guard in self.guards:
            if not guard.begun:
                guard.begin()

    def _hold_schedulers(self, trainer: Any) -> None:
        """Make the schedulers that would move after this step wait for another one."""
        if not self._frequencies:
            configs = [config for config in trainer.lr_scheduler_configs if config.interval == "step"]
            self._frequencies = [(config, config.frequency) for config in configs]
            for config in configs:
                config.frequency = sys.maxsize


def _scaler(trainer: Any) -> Any:
    """Return the loss scaler of float16 training, None without one."""
    return getattr(trainer.precision_plugin, "scaler", None)
