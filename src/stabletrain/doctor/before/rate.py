"""The learning rate against what training stands: short trainings from the initial weights, each at one rate.

First a sweep over all magnitudes finds about where the loss begins to rise, then trials around it narrow that down.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from stabletrain.data import Microbatch
from stabletrain.doctor.before.findings import Finding
from stabletrain.doctor.before.overrides import first_known, rounded_down
from stabletrain.doctor.before.subject import Subject
from stabletrain.fault import NoFault
from stabletrain.finite import global_norm
from stabletrain.guard.clipper import Clipper
from stabletrain.guard.measure import gradients
from stabletrain.optimizer import set_learning_rate
from stabletrain.precision import Precision
from stabletrain.randomness import key, keyed_all
from stabletrain.trainer import Run
from stabletrain.trainer.step import forward_backward

UPDATES = 32  # of a trial
SWEEP = 48  # updates
LEAST, MOST = 1e-7, 1e2  # rates that are tried
STEP = 2.0  # between the largest rate known to be stable and the smallest known not to be
RISE = 0.1  # above the untrained model's loss, as a share of its size, at which a trial counts as unstable
SECONDS = 45.0  # for all of it


@dataclass
class Trial:
    """A short training at one rate: how it went."""

    rate: float
    stable: bool
    why: str


@dataclass
class Range:
    """What was found about rates.

    Attributes:
        configured: the run's.
        stable: largest rate that was tried and is stable; None: none is.
        unstable: smallest rate above it that was tried and isn't; None: none was found.
        trials: all of them.
        said: why nothing, or not all, could be measured.
    """

    configured: float
    stable: float | None = None
    unstable: float | None = None
    trials: list[Trial] = field(default_factory=list)
    said: str = ""
    seconds: float = 0.0

    @property
    def facts(self) -> dict[str, Any]:
        """Plain values, for the report."""
        return dataclasses.asdict(self)


def examine_rate(subject: Subject, seconds: float = SECONDS) -> tuple[list[Finding], Range]:
    """Find the largest learning rate at which training begins well, and judge the run's by it.

    A rate is stable if loss and gradients stay finite over 32 updates and the loss of the last third isn't above that
    of the untrained model on the same batches by more than a tenth of its size. The trials have the run's optimizer and
    clipping, the first quarter as warm-up if the run has one, and compute in float32.

    Args:
        subject: the run; copies are trained.
        seconds: time for all trials; then what is known by then is returned.
    """
    found = find_range(subject, seconds)
    rate, stable = found.configured, found.stable
    if stable is None and found.unstable is None:
        return [], found
    if stable is None:
        return [_too_high(subject, found, LEAST)], found
    return ([_too_high(subject, found, stable)] if rate > stable else []), found


def find_range(subject: Subject, seconds: float = SECONDS) -> Range:
    """Find the largest stable rate and the smallest unstable one above it, within a factor of 2 of each other."""
    start = time.monotonic()
    configured = float(subject.run.optimizer.param_groups[0]["lr"])
    found = Range(configured)
    if configured <= 0:
        found.said = "the learning rate is 0"
        return found
    try:
        with keyed_all(key(subject.run.seed, "doctor", "rate")):
            _search(_Trainer(subject), found, start + seconds)
    except Exception as error:  # the user's code may raise anything
        found.said = f"not measured: {type(error).__name__}: {error}"
    found.seconds = round(time.monotonic() - start, 3)
    return found


def _search(trainer: _Trainer, found: Range, end: float) -> None:
    def try_rate(rate: float) -> bool:
        trial = trainer.trial(rate)
        found.trials.append(trial)
        if trial.stable and (found.stable is None or rate > found.stable):
            found.stable = rate
        if not trial.stable and (found.unstable is None or rate < found.unstable):
            found.unstable = rate
        return trial.stable

    rate = trainer.sweep()
    stable = try_rate(rate)
    while time.monotonic() < end:  # until it is between two
        if stable and found.unstable is None:
            if rate >= MOST:
                return
            rate = min(MOST, rate * STEP)
        elif not stable and found.stable is None:
            if rate <= LEAST:
                return
            rate = max(LEAST, rate / (2 * STEP))
        else:
            break
        stable = try_rate(rate)
    while found.stable is not None and found.unstable is not None and time.monotonic() < end:
        if found.unstable <= found.stable * STEP * 1.001:
            # The run's own rate between the two is settled by trying it.
            if found.stable < found.configured < found.unstable:
                try_rate(found.configured)
            return
        try_rate(math.sqrt(found.stable * found.unstable))
    if time.monotonic() >= end:
        found.said = "the time was over before it was narrowed down"


class _Trainer:
    """Trains copies of a run for a few updates."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        run = subject.run
        # On the CPU reduced formats are slower, and no rate is stable in one and not in the other.
        self.precision = Precision("float32", device=run.device)
        self.warm_up = UPDATES // 4 if run.schedule(0) < 0.9 else 0
        self.steps = list(itertools.islice(self._epochs(run), UPDATES))
        self.late = UPDATES - UPDATES // 3
        untrained = self._run_of(*subject.fresh_pair())
        self.baseline = _mean([self._losses(untrained, number)[0] for number in range(self.late, UPDATES)])
        if not math.isfinite(self.baseline):
            raise ValueError(f"the untrained model's loss is {self.baseline}")
        self.limit = self.baseline + RISE * abs(self.baseline)  # above it also where losses are negative

    def _epochs(self, run: Run) -> Iterator[list[Microbatch]]:
        for epoch in itertools.count():
            yield from run.loader.epoch(epoch, excluded=self.subject.bad_samples)

    def _run_of(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Run:
        # What a copy remembers is made anew, so each trial begins with nothing and the run's own is left alone.
        self.clipper = Clipper(copy.copy(self.subject.run.clipping), [model], [optimizer])
        return dataclasses.replace(
            self.subject.run,
            task=self.subject.fresh_task(),
            model=model,
            network=model,
            optimizer=optimizer,
            precision=self.precision,
            fault=NoFault(),
        )

    def _losses(self, run: Run, number: int) -> tuple[float, float]:
        """Run a step forward and backward; return its loss and the gradient's norm."""
        step = run.step(0, number, number, self.steps[number % len(self.steps)])
        losses = forward_backward(run, step, alone=True)
        loss = _mean([float(loss) for loss in losses])
        norm = float(global_norm(gradients([run.optimizer]), exact=True))
        return loss, norm

    def _update(self, run: Run, number: int, rate: float) -> float:
        """Make one update and return the loss before it; NaN where loss or gradient isn't finite."""
        base = run.optimizer.param_groups[0].get("initial_lr", run.optimizer.param_groups[0]["lr"])
        set_learning_rate(run.optimizer, rate / base)
        loss, norm = self._losses(run, number)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return math.nan
        self.clipper(norm)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        return loss

    def sweep(self) -> float:
        """Raise the rate from update to update, and return about where the loss begins to rise."""
        run = self._run_of(*self.subject.fresh_pair())
        best, smooth = math.inf, None
        for number in range(SWEEP):
            rate = math.exp(math.log(LEAST) + math.log(MOST / LEAST) * number / (SWEEP - 1))
            loss = self._update(run, number, rate)
            if not math.isfinite(loss):
                return rate / 4
            smooth = loss if smooth is None else 0.6 * smooth + 0.4 * loss
            best = min(best, smooth)
            if smooth > max(2.0 * best, self.limit) and loss > self.limit:
                return rate / 4
        return MOST

    def trial(self, rate: float) -> Trial:
        """Train from the initial weights at one rate."""
        run = self._run_of(*self.subject.fresh_pair())
        losses: list[float] = []
        for number in range(UPDATES):
            warm = min(1.0, 0.1 + 0.9 * number / self.warm_up) if self.warm_up else 1.0
            losses.append(self._update(run, number, rate * warm))
            if not math.isfinite(losses[-1]):
                return Trial(rate, False, f"loss or gradient isn't finite at update {number}")
            if losses[-1] > 1e3 * (abs(self.baseline) + 1.0):
                return Trial(rate, False, f"the loss is {losses[-1]:.3g} at update {number}")
        last = _mean(losses[self.late :])
        return Trial(rate, last <= self.limit, f"loss {last:.4g}, untrained {self.baseline:.4g}")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _too_high(subject: Subject, found: Range, limit: float) -> Finding:
    target = limit / 4
    config = subject.config
    scale = float(config.get("lr_scale") or 1.0)
    from_root = math.isclose(found.configured, float(config.get("base_lr", 0.0)) * scale, rel_tol=1e-6)
    choices = [f"base_lr={rounded_down(target / scale)}"] if from_root else []
    known_limit = (
        f"the largest stable one is {limit:.2g}" if found.stable is not None else f"none from {LEAST:g} on is stable"
    )
    worst = min((trial for trial in found.trials if not trial.stable), key=lambda trial: trial.rate)
    return Finding(
        severity="broken" if found.configured > 10 * limit else "warning",
        check="rate",
        where="settings",
        what="a learning rate that is too high",
        evidence=f"{found.configured:.3g}; in trainings of {UPDATES} updates {known_limit} (at {worst.rate:.2g}: "
        f"{worst.why})",
        remedy=first_known(config, *choices, f"optimizer.lr={rounded_down(target)}")
        if found.stable is not None
        else "",
        advice="" if found.stable is not None else "Look at the data, the initial weights and the loss first.",
    )
