"""The same transaction without asking the device: skipped, undone and recorded there, read one step later.

Three things must hold for that. The optimizer skips by itself: torch's fused kernels do when `found_inf` is exactly
1.0. Buffers are put back by a selection, never by a multiplication with 0. And the outcome goes to pinned memory, to
be awaited by its event when the next step's backward pass is already queued.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from stabletrain.collectives import Ranks
from stabletrain.finite import LARGEST_SQUARE, global_norm
from stabletrain.guard import loss_scale, measure
from stabletrain.guard.clipper import Clipper
from stabletrain.guard.snapshot import Snapshot
from stabletrain.guard.spikes import describe
from stabletrain.guard.verdict import FAULTS, Facts, Reason

DETAILS: dict[Reason, str] = {
    "loss": "the loss is {loss}",
    "overflow": "the gradient norm is {norm} at a finite loss",
    "gradient": "the gradient norm is {norm:.3g}",
    "buffer": "a buffer became NaN or Inf, or a running variance grew beyond reason",
    "optimizer": "a parameter, the optimizer's state or the learning rate is not finite",
    "spike": "{spike}",
}


def honours_found_inf(optimizer: Optimizer) -> bool:
    """Return whether the optimizer skips a step by itself when its `found_inf` is 1.0.

    RMSprop, Adafactor, Muon, NAdam and others ignore it silently and apply the step, and the loops that aren't
    fused refuse it. Fused SGD honours it, but with dampening its first step can't be prepared for a skip.

    Example:
        >>> weight = torch.zeros(1, requires_grad=True)
        >>> honours_found_inf(torch.optim.AdamW([weight], fused=True)), honours_found_inf(torch.optim.NAdam([weight]))
        (True, False)
    """
    if type(optimizer) not in (Adam, AdamW, Adagrad, SGD):
        return False
    return all(group.get("fused") and not group.get("dampening") for group in optimizer.param_groups)


def can_skip_on_device(optimizers: Sequence[Optimizer]) -> bool:
    """Return whether all parameters are on one accelerator and every optimizer can skip there."""
    if not all(honours_found_inf(optimizer) for optimizer in optimizers):
        return False
    devices = {p.device for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return len(devices) == 1 and next(iter(devices)).type == "cuda"


class DeviceStep:
    """One step whose decision stays on the device.

    Args:
        optimizers: all of which honour `found_inf`.
        scaler: the loss scaler, or None.
        clip: clips with the norm as a tensor.
        spikes: largest loss and largest gradient norm that are no spikes, known on the host.
        ranks: who decides together.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        scaler: GradScaler | None,
        clip: Clipper,
        spikes: tuple[float, float],
        ranks: Ranks,
    ) -> None:
        self.optimizers = optimizers
        self.scaler = scaler
        self.clip = clip
        self.spikes = spikes
        self.ranks = ranks
        self.scaler_before: list[Tensor] = []  # its tensors before it reacted

    @torch.no_grad()
    def run(
        self, loss: Tensor, snapshot: Snapshot, buffers: measure.BufferJudge, check_state: bool, bad_rate: bool
    ) -> Callable[[], Facts]:
        """Measure, decide, commit or undo, all queued on the device.

        Args:
            loss: shape [], mean over the microbatches.
            snapshot: taken before the step's first forward.
            buffers: judges them.
            check_state: whether to look at parameters and optimizer state as well.
            bad_rate: whether a learning rate was found bad on the host.

        Returns:
            A function that waits for the outcome and returns it.
        """
        self._unscale()
        gradients = measure.gradients(self.optimizers)
        norm = global_norm(gradients, exact=True).to(loss.device)
        bad_loss = ~torch.isfinite(loss)
        bad_gradient = ~torch.isfinite(norm)
        if not self.clip.limits:
            bad_gradient = bad_gradient | (norm > LARGEST_SQUARE)
        never = torch.zeros_like(bad_loss)
        can_overflow = self.scaler_before[0] > 1.0 if self.scaler is not None else never
        overflow = ~bad_loss & ~torch.isfinite(norm) & can_overflow
        bad_state = never | bad_rate
        if check_state:
            bad_state = bad_state | ~measure.state_is_finite(self.optimizers)
        faults = torch.stack(
            [bad_loss, overflow, bad_gradient, _bad_buffers(snapshot, buffers, never), bad_state, never]
        )
        loss, faults = self._agreed(loss, faults)
        overflow = faults[FAULTS.index("overflow")] & ~faults[0]
        measured = torch.stack([loss.double(), norm.double()])
        faults = torch.cat([faults[:-1], self._spike(measured).reshape(1)])
        rejected = faults.any()
        self.clip(norm, rejected)
        self._step_unless(rejected)
        held = never | self._update_scale(rejected & ~overflow, overflow)
        snapshot.restore_where(rejected)
        return _later(torch.cat([measured, held.double()[None], faults.double()]), self.spikes)

    def _agreed(self, loss: Tensor, faults: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss and the faults that all ranks together have."""
        if not self.ranks.together:
            return loss, faults
        mean, faults = self.ranks.agree(loss, faults)
        return torch.where(faults[0], math.nan, mean), faults

    def _spike(self, measured: Tensor) -> Tensor:
        """Return whether loss or gradient norm is above its limit; the limits travel as arguments, not as tensors."""
        loss, norm = measured.unbind()
        return (loss > self.spikes[0]) | (norm > self.spikes[1])

    def _unscale(self) -> None:
        """Unscale the gradients, and copy what the scaler remembers."""
        if self.scaler is None:
            return
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        self.scaler_before = loss_scale.copies(self.scaler)

    def _update_scale(self, unchanged: Tensor, overflow: Tensor) -> Tensor | bool:
        """Let the scaler react to success or to an overflow, but not fall below 1; else leave it as it was.

        Returns:
            Whether an overflow left the scale where it was.
        """
        if self.scaler is None:
            return False
        self.scaler.update()
        for now, before in zip(loss_scale.tensors(self.scaler), self.scaler_before, strict=True):
            now.copy_(torch.where(unchanged, before, now))
        scale = loss_scale.tensors(self.scaler)[0]
        scale.copy_(torch.where(overflow, scale.clamp_min(1.0), scale))
        return overflow & (scale >= self.scaler_before[0])

    def _step_unless(self, rejected: Tensor) -> None:
        for optimizer in self.optimizers:
            _prepare_momentum(optimizer)
            skipping: Any = optimizer
            skipping.grad_scale, skipping.found_inf = None, torch.where(rejected, 1.0, 0.0)
            try:
                optimizer.step()
            finally:
                del skipping.grad_scale, skipping.found_inf  # a loop that isn't fused asserts that they are not set


def _bad_buffers(snapshot: Snapshot, judge: measure.BufferJudge, never: Tensor) -> Tensor:
    found = snapshot.buffers()
    if not found:
        return never
    now = measure.buffer_sizes([current for _, current, _ in found], exact=True)
    before = measure.buffer_sizes([copied for _, _, copied in found], exact=True)
    return judge.bad([name for name, _, _ in found], now, before).any()


def _prepare_momentum(optimizer: Optimizer) -> None:
    """Give fused SGD its momentum buffers: skipped at its first step it would keep uninitialised memory as momentum.

    Zeros are exact: the first step then gives momentum * 0 + gradient.
    """
    if type(optimizer) is not SGD:
        return
    for group in optimizer.param_groups:
        if group["momentum"] == 0:
            continue
        for parameter in group["params"]:
            if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _later(values: Tensor, spikes: tuple[float, float]) -> Callable[[], Facts]:
    """Send the outcome to the host, and return a function that waits for it."""
    event = None
    if values.device.type == "cuda":
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
    else:
        host = values

    def read() -> Facts:
        if event is not None:
            event.synchronize()
        loss, norm, held, *faults = host.numpy().tolist()
        reason = next((name for name, fault in zip(FAULTS, faults, strict=True) if fault == 1.0), None)
        if reason is None:
            return Facts(None, loss, norm, "")
        norm = math.nan if reason == "loss" else norm
        spike = describe(loss, norm, spikes)
        return Facts(reason, loss, norm, DETAILS[reason].format(loss=loss, norm=norm, spike=spike), held == 1.0)

    return read
