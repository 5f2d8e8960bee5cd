"""The step as a transaction: measure, judge, clip, then commit or undo."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from stabletrain.collectives import Ranks, ranks_of
from stabletrain.errors import ConfigurationError, UnstableTraining
from stabletrain.finite import LARGEST_SQUARE, first_nonfinite, global_norm, limit_norm
from stabletrain.guard import loss_scale, measure, words
from stabletrain.guard.agreement import agreed
from stabletrain.guard.attached import AfterStep, Attachment
from stabletrain.guard.clipper import Clip, Clipper
from stabletrain.guard.hooks import end_step_of_others, watch
from stabletrain.guard.ledger import Ledger, Policy
from stabletrain.guard.on_device import DeviceStep, can_skip_on_device
from stabletrain.guard.snapshot import Snapshot
from stabletrain.guard.spikes import SpikeWindow, describe
from stabletrain.guard.verdict import Facts, Reason, Verdict


class StepGuard:
    """Lets a step reach the model only if its loss, gradients, buffers and optimizer state are healthy.

    A rejected step never happened: parameters, optimizer, buffers, scaler, scheduler and randomness are as they were
    before its first forward pass. Call `step` where `optimizer.step` stood; it measures the gradients once, decides,
    clips with the same norm, and steps or undoes. Several optimizers decide together.

    Under DistributedDataParallel or fully_shard all ranks decide together, with 16 bytes reduced a step.

    On the CPU, and for optimizers that can't skip by themselves, the decision is read at once. On an accelerator with
    fused Adam, AdamW, Adagrad or SGD it stays on the device, and nothing waits: the step is skipped and undone there,
    and the scheduler moves at the next call. Only randomness isn't rewound then.

    Args:
        model: the module whose forward begins a step, or several. The forward must go through its `__call__`.
        optimizer: one or several; their parameters are measured and clipped together.
        max_norm: largest Euclidean norm over all gradients; None: no clipping.
        clip: another way of clipping instead of `max_norm`: `(gradients, norm) -> None`, or an object such as
            `stabletrain.clipping.ZClip`, whose memory is part of the step and saved here. With an attribute `limits`
            that is False it promises no limit, and gradients whose squares overflow are rejected as without clipping.
        scaler: the loss scaler of float16 training, or a function that returns the one in use, where that changes.
            `scale` stays yours; unscaling and updating are done here.
        scheduler: stepped here once for each applied step. Without it, call yours when `verdict.applied`.
        extra: more state that a forward changes: tensors, modules, generators, or objects with `state_dict`.
        policy: what follows from a rejected step.
        keep_on_device: True or False to force where the decision is read; None: as described.
        ranks: who decides together; None: found by torch's wrappers for data parallel training.

    Raises:
        ConfigurationError: for arguments that contradict each other.

    Example:
        >>> import torch
        >>> model = nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> guard = StepGuard(model, optimizer, max_norm=1.0)
        >>> before = model.weight.clone()
        >>> loss = model(torch.tensor([[float("nan"), 1.0, 1.0]])).mean()
        >>> loss.backward()
        >>> verdict = guard.step(loss)
        >>> verdict.applied, verdict.reason, torch.equal(model.weight, before)
        (False, 'loss', True)
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        max_norm: float | None = None,
        clip: Clip = None,
        scaler: GradScaler | Callable[[], GradScaler | None] | None = None,
        scheduler: Any = None,
        extra: Sequence[Any] = (),
        policy: Policy | None = None,
        keep_on_device: bool | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        if max_norm is not None and (clip is not None or not max_norm > 0):
            raise ConfigurationError(f"max_norm is {max_norm}; give a positive number, or `clip` instead, not both.")
        self.models = [model] if isinstance(model, nn.Module) else list(model)
        self.optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        self._scaler = scaler
        self.scheduler = scheduler
        self.policy = policy or Policy()
        self.ranks = ranks if ranks is not None else ranks_of(self.models)
        self.ledger = Ledger(self.policy)
        self.spikes = SpikeWindow(self.policy.spike_window, floor=self.policy.spike_floor)
        chosen = clip if max_norm is None else partial(limit_norm, max_norm=max_norm)
        self.clipper = Clipper(chosen, self.models, self.optimizers)
        self._snapshot = Snapshot([*self.models, *(item for item in extra if isinstance(item, nn.Module))], extra)
        self._buffers = measure.BufferJudge(self.policy.max_variance_growth)
        self._buffers.seen_data = measure.have_seen_data(self.models)
        self._buffer_sizes: list[float] = []  # after the last applied step
        self._candidate_sizes: list[float] = []  # after the step in judgement
        self._until_state_check = 0
        self._keep_on_device = keep_on_device
        self._pending: Verdict | None = None
        self.attachment: Attachment | None = None
        self._scaler_before: list[Tensor] = []  # its tensors before it reacted to the latest overflow
        self._hooks = [handle for module in self.models for handle in watch(module, self)]

    def step(self, loss: Tensor | Sequence[Tensor]) -> Verdict:
        """Decide about the gradients at hand, then commit or undo them; leaves every gradient None.

        Args:
            loss: the loss that was backpropagated, before scaling; with accumulation one for each microbatch.

        Returns:
            The verdict.

        Raises:
            UnstableTraining: by the policy, after everything was undone.
            ConfigurationError: if the forward didn't go through the model's `__call__`, so nothing can be undone.
        """
        if self.attachment is not None:
            raise ConfigurationError("this guard is attached: it decides within optimizer.step(); call that instead.")
        self._check_begun()
        try:
            self.settle()
        except UnstableTraining:
            self._undo("loss")  # the step before ended the training, so this one is undone unseen
            raise
        self._snapshot.note_moved_parameters()
        if self._stays_on_device():
            self._pending = self._step_on_device(loss)
            return self._pending
        facts = self._judge(loss)
        if facts.reason is None:
            self._commit(facts)
        else:
            scale_held = not self._undo(facts.reason) and facts.reason == "overflow"
            facts = facts._replace(scale_held=scale_held)
        verdict = Verdict(facts)
        self._count(verdict)
        return verdict

    @property
    def scaler(self) -> GradScaler | None:
        """The loss scaler in use; None: the loss isn't scaled."""
        scaler = self._scaler() if callable(self._scaler) else self._scaler
        return scaler if scaler is not None and scaler.is_enabled() else None

    @scaler.setter
    def scaler(self, scaler: GradScaler | None) -> None:
        self._scaler = scaler

    def attach(self, *, handles_scaling: bool = True, after_step: AfterStep | None = None) -> StepGuard:
        """Decide within `optimizer.step` from now on, for a loop that belongs to somebody else and calls that itself.

        The decision is read at once, on any device. See `Attachment` for the arguments.

        Returns:
            The guard itself. The optimizers keep it alive.

        Raises:
            ConfigurationError: if it is attached already, or for an optimizer that evaluates the loss several times.

        Example:
            >>> import torch
            >>> model = nn.Linear(3, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> guard = StepGuard(model, optimizer).attach()
            >>> before = model.weight.clone()
            >>> model(torch.tensor([[float("nan"), 1.0, 1.0]])).mean().backward()
            >>> _ = optimizer.step()
            >>> guard.stats.rejected, torch.equal(model.weight, before)
            (1, True)
        """
        if self.attachment is not None:
            raise ConfigurationError("this guard is attached already; call guard.remove() first.")
        self.attachment = Attachment(self, handles_scaling=handles_scaling, after_step=after_step)
        return self

    def observe(self, loss: Tensor) -> None:
        """Show an attached guard the loss of a microbatch, before any loss scaling; the loop doesn't hand it over.

        Raises:
            ConfigurationError: if the guard isn't attached: then `step` takes the losses.
        """
        if self.attachment is None:
            raise ConfigurationError("this guard isn't attached; give the losses to guard.step(...).")
        self.attachment.observe(loss)

    def attempt(self, loss: Tensor | Sequence[Tensor], *, commit: bool, alone: bool = False) -> Facts:
        """Judge a rejected step that was run again, at once and without counting it.

        Args:
            loss: as for `step`.
            commit: whether to commit it if it is healthy; else it is undone either way.
            alone: whether this rank tries something by itself, so that no other one is asked.

        Returns:
            What was found. The loss scale stays as it is.
        """
        self._check_begun()
        assert not (alone and commit), "what is applied is decided by all ranks"
        self._snapshot.note_moved_parameters()
        facts = self._judge(loss, alone=alone)
        if facts.reason is None and commit:
            self._commit(facts)
        else:
            self._undo("gradient")
        return facts

    def call_no_overflow(self, verdict: Verdict) -> Verdict:
        """Correct the last verdict, an overflow, once it is known that the gradient is NaN whatever the loss scale.

        The loss scale goes back to where it was, and the step counts against the budget.

        Args:
            verdict: of the step decided last.

        Returns:
            The corrected verdict, for the reason `gradient`.
        """
        assert self.scaler is not None and verdict.reason == "overflow"
        loss_scale.put_back(self.scaler, self._scaler_before)
        corrected = Verdict(verdict.facts._replace(reason="gradient", scale_held=False))
        self.ledger.correct(verdict, corrected)
        return corrected

    @property
    def begun(self) -> bool:
        """Whether a forward pass was begun since the last decision."""
        return self._snapshot.taken

    def discard(self) -> None:
        """Undo what was begun since the last decision, undecided."""
        self._undo("loss")

    def begin(self) -> None:
        """Mark the start of a step: copy what its forward passes may change.

        The model's forward calls it at the first forward after a decision; call it yourself only if the forward
        doesn't go through the model's `__call__`.
        """
        if self.attachment is not None:
            self.attachment.settle_scale()
        self._snapshot.take()

    def settle(self) -> None:
        """Wait for a decision that is still on the device, count it, and move the scheduler."""
        if self._pending is None:
            return
        verdict, self._pending = self._pending, None
        if verdict.applied:
            self._note_applied(verdict.facts)
        elif verdict.reason == "optimizer":
            self._until_state_check = 0  # what is wrong with it stays wrong
        self._count(verdict)

    def state_dict(self) -> dict[str, Any]:
        """Return counts and budget, what recent updates were like, for spikes and for clipping, and the next check."""
        self.settle()
        if self.attachment is not None:
            self.attachment.settle_scale()
        return {
            "ledger": self.ledger.state_dict(),
            "spikes": self.spikes.state_dict(),
            "clipping": self.clipper.state_dict(),
            "until_state_check": self._until_state_check,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; load model and optimizers first, whose state is looked at then."""
        self._pending = None
        self.ledger.load_state_dict(state["ledger"])
        self.spikes.load_state_dict(state["spikes"])
        self.clipper.load_state_dict(state.get("clipping", {}))
        self._buffers.seen_data = self._buffers.seen_data or self.ledger.applied > 0
        healthy = bool(measure.state_is_finite(self.optimizers))
        self._until_state_check = int(state.get("until_state_check", 0)) if healthy else 0
        self.forget()

    @property
    def stats(self) -> Ledger:
        """Counts: steps, applied, rejected, and reasons."""
        self.settle()
        return self.ledger

    def forget(self) -> None:
        """Drop the copy, because the state was replaced from outside; loading into a model does this by itself."""
        self._snapshot.taken = False
        self._buffer_sizes = []

    def remove(self) -> None:
        """Take the guard's hooks off the model and its optimizers."""
        for handle in self._hooks:
            handle.remove()
        if self.attachment is not None:
            self.attachment.remove()
            self.attachment = None

    def _count(self, verdict: Verdict) -> None:
        """Count a decision; where a trainer may still salvage or roll back, it asks for the budget itself."""
        end_step_of_others(self)
        self.ledger.record(verdict)
        if self.policy.on_rejection in ("skip", "raise"):
            self.ledger.check(verdict)

    def _check_begun(self) -> None:
        if not self._snapshot.taken:
            raise ConfigurationError(
                "no forward pass of the guarded model was seen since the last decision, so a bad step couldn't be "
                "undone. Call the model itself, not one of its methods, or call guard.begin() before the forward. "
                "Optimizers that step after the same backward belong to one guard: StepGuard(model, [one, other])."
            )

    def _judge(self, loss: Tensor | Sequence[Tensor] | None, *, alone: bool = False) -> Facts:
        """Decide, with all ranks unless `alone`; what they have in common, recent history, is looked at last."""
        facts = self._judge_here(loss)
        if self.policy.on_rejection == "none":
            return facts
        if self.ranks.together and not alone:
            device = self.optimizers[0].param_groups[0]["params"][0].device
            facts = agreed(facts, self.ranks, device)
        if facts.reason is None and self.policy.spikes:
            found = describe(facts.loss, facts.grad_norm, self.spikes.limits())
            facts = facts if found is None else facts._replace(reason="spike", detail=found)
        return facts

    def _judge_here(self, loss: Tensor | Sequence[Tensor] | None) -> Facts:
        """Look at loss, gradients, buffers, rates and state, in that order; the first fault decides."""
        value = float(measure.mean_loss(loss)) if loss is not None else math.nan
        bad_loss = ""
        if loss is not None and not math.isfinite(value) and self.policy.on_rejection != "none":
            bad_loss = words.about_loss(self.models, loss, value)
        if bad_loss and not self.ranks.together:  # else the others wait for the norm of their shards
            return Facts("loss", value, math.nan, bad_loss)
        if self.scaler is not None:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
        gradients = measure.gradients(self.optimizers)
        norm = float(global_norm(gradients))
        if not math.isfinite(norm) and gradients and gradients[0].device.type != "mps":
            norm = float(global_norm(gradients, exact=True))  # finite gradients whose squares overflowed
        guarded = self.policy.on_rejection != "none"
        if bad_loss:
            return Facts("loss", value, math.nan, bad_loss)
        if not math.isfinite(norm) and self.scaler is not None and (self.scaler.get_scale() > 1.0 or not guarded):
            return Facts("overflow", value, norm, words.about_gradients(self.models, norm))
        if not guarded:
            return Facts(None, value, norm, "")
        if not math.isfinite(norm) or (not self.clipper.limits and norm > LARGEST_SQUARE):
            return Facts("gradient", value, norm, words.about_gradients(self.models, norm))
        if (found := self._judge_buffers()) is not None:
            return Facts("buffer", value, norm, found)
        if (found := self._judge_optimizers()) is not None:
            return Facts("optimizer", value, norm, found)
        return Facts(None, value, norm, "")

    def _judge_buffers(self) -> str | None:
        """Compare with the sizes after the last applied step; only when those look odd, with the copy itself."""
        buffers = self._snapshot.buffers()
        sizes = measure.buffer_sizes([current for _, current, _ in buffers]).tolist()
        limit = self._buffers.max_growth
        known = len(self._buffer_sizes) == len(sizes)
        self._candidate_sizes = sizes
        if known and all(n <= limit * max(b, 1e-5) for n, b in zip(sizes, self._buffer_sizes, strict=True)):
            return None
        now = measure.buffer_sizes([current for _, current, _ in buffers], exact=True)
        before = measure.buffer_sizes([copied for _, _, copied in buffers], exact=True)
        bad = self._buffers.bad([name for name, _, _ in buffers], now, before).tolist()
        if not any(bad):
            return None
        index = bad.index(True)
        name = words.buffer_name(self.models, buffers[index][1])
        return f"the size of buffer {name} went from {float(before[index]):.3g} to {float(now[index]):.3g} in one step"

    def _judge_optimizers(self) -> str | None:
        rate = measure.bad_learning_rate(self.optimizers)
        if rate is not None:
            return f"the learning rate is {rate}; it must be a finite number of at least 0"
        if self._until_state_check > 0:
            return None
        if bool(measure.state_is_finite(self.optimizers)):
            self._until_state_check = self.policy.check_state_every
            return None
        found = first_nonfinite(words.named_parameters(self.models))
        return f"parameter {found}" if found is not None else "the optimizer's state holds NaN or Inf"

    def _commit(self, facts: Facts) -> None:
        """Clip with the norm that was measured, and let everything move that counts updates."""
        self._limit_gradients(facts)
        for optimizer in self.optimizers:
            optimizer.step()
        if self.scaler is not None:
            # Without a single gradient there is nothing to learn about the scale, only to forget the unscaling.
            self.scaler.update(None if measure.gradients(self.optimizers) else self.scaler.get_scale())
        self._note_committed(facts)
        self._snapshot.taken = False
        self._drop_gradients()

    def _limit_gradients(self, facts: Facts) -> None:
        self.clipper(facts.grad_norm)

    def _note_committed(self, facts: Facts) -> None:
        """Know of one more update that was decided on the host."""
        self._note_applied(facts)
        self._buffer_sizes = self._candidate_sizes
        self._until_state_check -= 1

    def _note_applied(self, facts: Facts) -> None:
        """Let everything on the host know of one more update."""
        if self.scheduler is not None:
            self.scheduler.step()
        self._buffers.seen_data = True
        if self.policy.spikes:
            self.spikes.accept(loss=facts.loss, grad_norm=facts.grad_norm)

    def _undo(self, reason: Reason | None) -> bool:
        """Leave no trace of the step; an overflow alone may lower the loss scale, to 1 at the least.

        Returns:
            Whether it did.
        """
        self._snapshot.restore()
        self._drop_gradients()
        if self.scaler is None or (reason == "loss" and not self.ranks.together):
            return False  # the scaler has seen nothing of a step whose loss decided
        before = scale = self.scaler.get_scale()
        if reason == "overflow":
            self._scaler_before = loss_scale.copies(self.scaler)
            self.scaler.update()
            scale = max(self.scaler.get_scale(), 1.0)
        self.scaler.update(scale)
        return scale < before

    def _drop_gradients(self) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def _stays_on_device(self) -> bool:
        wanted = can_skip_on_device(self.optimizers) if self._keep_on_device is None else self._keep_on_device
        return wanted and self.policy.on_rejection != "none" and self._snapshot.restorable_on_device

    def _step_on_device(self, loss: Tensor | Sequence[Tensor]) -> Verdict:
        self._until_state_check -= 1
        check_state = self._until_state_check < 0
        if check_state:
            self._until_state_check = self.policy.check_state_every - 1
        rate = measure.bad_learning_rate(self.optimizers)
        spikes = self.spikes.limits() if self.policy.spikes else (math.inf, math.inf)
        step = DeviceStep(self.optimizers, self.scaler, self.clipper, spikes, self.ranks)
        read = step.run(measure.mean_loss(loss), self._snapshot, self._buffers, check_state, rate is not None)
        self._scaler_before = step.scaler_before
        self._drop_gradients()
        return Verdict(read)
