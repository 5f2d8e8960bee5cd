"""From float32 to a reduced format once training is stable, and back if that goes wrong: `precision=ladder`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from stabletrain.checks import whole
from stabletrain.errors import ConfigurationError
from stabletrain.precision.formats import Precision, available
from stabletrain.precision.products import Products
from stabletrain.precision.scaler import LossScaler

FULL, WATCHED, HELD = 0, 1, 2  # the rungs: float32; reduced, on trial; reduced, for good


class Plan:
    """Says when to go up or back, from what happened; it stands outside the transaction of a step, like a ledger.

    In float32, `wait` stable epochs in a row lead up: epochs without a rejected step or a rollback whose validation
    loss is below that of the epoch before (where there is one to compare). Then the first `watch_updates` updates are
    watched: any rejected step among them leads back and makes the wait longer. After them the format is held, and only
    a rollback, or a validation that isn't finite, leads back.

    Args:
        stable_epochs: the first wait.
        watch_updates: applied steps that are watched.
        wait_factor: how many times longer the wait gets whenever it goes back.

    Example:
        >>> plan = Plan(stable_epochs=2, watch_updates=2, wait_factor=2)
        >>> plan.after_epoch(0.9), plan.after_epoch(0.7), plan.rung
        (None, '2 stable epochs', 1)
        >>> plan.after_step("a step was rejected for its loss"), plan.rung, plan.wait
        ('a step was rejected for its loss', 0, 4)
    """

    def __init__(self, stable_epochs: int = 2, watch_updates: int = 100, wait_factor: int = 2) -> None:
        self.watch_updates, self.wait_factor = watch_updates, wait_factor
        self.rung = FULL
        self.wait = stable_epochs  # stable epochs before it goes up
        self.stable = 0  # epochs in a row so far
        self.watched = 0  # updates so far
        self.moves: list[dict[str, Any]] = []
        self.said = False  # that there is no validation loss
        self._disturbed = False  # in this epoch
        self._loss: float | None = None  # of the last validation

    def after_step(self, trouble: str | None) -> str | None:
        """Take note of a step.

        Args:
            trouble: in words, that it was rejected; None: it was applied.

        Returns:
            Why it goes to another rung; None if it stays.
        """
        if trouble is not None:
            self._disturbed = True
            return self.back(trouble) if self.rung == WATCHED else None
        if self.rung != WATCHED:
            return None
        self.watched += 1
        if self.watched < self.watch_updates:
            return None
        self.rung = HELD
        return f"{self.watched} updates without a rejected step"

    def after_epoch(self, loss: float | None, *, more: bool = True) -> str | None:
        """Take note of the end of an epoch.

        Args:
            loss: of the validation; None: there was none.
            more: whether another epoch follows.

        Returns:
            Why it goes to another rung; None if it stays.
        """
        if loss is not None and not math.isfinite(loss) and self.rung != FULL:
            why = self.back("the validation isn't finite")
            self._disturbed = False
            return why
        falling = loss is None or self._loss is None or loss < self._loss  # False for NaN
        calm = falling and not self._disturbed and (loss is None or math.isfinite(loss))
        self._disturbed = False
        if loss is not None and math.isfinite(loss):
            self._loss = loss
        if self.rung != FULL:
            return None
        self.stable = self.stable + 1 if calm else 0
        if self.stable < self.wait or not more:
            return None
        self.rung, self.watched = WATCHED, 0
        return f"{self.stable} stable epoch{'s' if self.stable > 1 else ''}"

    def back(self, why: str) -> str | None:
        """Go back to float32, from any rung; the epoch isn't a stable one.

        Returns:
            Why; None where it is in float32 already.
        """
        self._disturbed = True
        if self.rung == FULL:
            return None
        self.rung, self.wait, self.stable = FULL, self.wait * self.wait_factor, 0
        return why

    def state_dict(self) -> dict[str, Any]:
        """Return rung, counts and moves."""
        return {
            "rung": self.rung,
            "wait": self.wait,
            "stable": self.stable,
            "watched": self.watched,
            "moves": [dict(move) for move in self.moves],
            "said": self.said,
            "disturbed": self._disturbed,
            "loss": self._loss,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.rung, self.wait = int(state["rung"]), int(state["wait"])
        self.stable, self.watched = int(state["stable"]), int(state["watched"])
        self.moves = [dict(move) for move in state["moves"]]
        self.said, self._disturbed = bool(state["said"]), bool(state["disturbed"])
        self._loss = None if state["loss"] is None else float(state["loss"])


class Ladder(Precision):
    """A precision that is float32 until training is stable, then a reduced format with a careful loss scale.

    The state of this object is that of a step: which format, and the loss scaler. When it changes is the plan's
    business, whose state is apart: a rollback brings back the former and not the latter.

    Args:
        dtype: the reduced format, `float16` or `bfloat16`; only float16 has a loss scale.
        stable_epochs: stable epochs in float32 before the first try.
        watch_updates: updates that are watched after going up.
        wait_factor: how many times longer the wait gets whenever it goes back.
        initial_scale: loss scale to go up with.
        growth_interval: updates without overflow after which the scale doubles.
        raised_scale: what the scale is raised to once the format holds; one that has grown further stays.
        hysteresis: as for `Precision`.
        matmul: as for `Precision`.
        fallback: format to take where the device has no bfloat16.
        device: where the model is.

    Raises:
        ConfigurationError: for a format, scale or count that can't be used.

    Example:
        >>> ladder = Ladder(stable_epochs=1, watch_updates=1)
        >>> ladder.dtype, ladder.scaler
        (torch.float32, None)
        >>> ladder.end_epoch(0.5, update=10, epoch=0)["scale"], ladder.dtype
        (1024.0, torch.float16)
        >>> ladder.end_step(None, update=11, epoch=1)["scale"]
        4096.0
    """

    def __init__(
        self,
        dtype: str = "float16",
        *,
        stable_epochs: int = 2,
        watch_updates: int = 100,
        wait_factor: int = 2,
        initial_scale: float = 1024.0,
        growth_interval: int = 1000,
        raised_scale: float = 4096.0,
        hysteresis: int = 2,
        matmul: Products = "ieee",
        fallback: str = "float16",
        device: torch.device | str = "cpu",
    ) -> None:
        reduced = ("bfloat16", "float16")
        for name, value in (("dtype", dtype), ("fallback", fallback)):
            if value not in reduced:
                raise ConfigurationError(f"precision.{name} is {value!r}; the ladder leads to {' or '.join(reduced)}.")
        for name, count in (
            ("stable_epochs", stable_epochs),
            ("watch_updates", watch_updates),
            ("wait_factor", wait_factor),
        ):
            whole(f"precision.{name}", count)
        if not initial_scale <= raised_scale < math.inf:
            raise ConfigurationError(
                f"precision.raised_scale is {raised_scale}; it must be a finite number of at least "
                f"precision.initial_scale, {initial_scale}."
            )
        # Checks the rest.
        Precision("float16", initial_scale=initial_scale, growth_interval=growth_interval, hysteresis=hysteresis)
        super().__init__("float32", matmul=matmul, device=device)
        self.plan = Plan(stable_epochs, watch_updates, wait_factor)
        self.reduced = available(dtype, fallback, self.device)
        self._raised = float(raised_scale)
        self._make_scaler: Callable[[], LossScaler] = lambda: LossScaler(
            self.device.type,
            init_scale=float(initial_scale),
            growth_interval=int(growth_interval),
            hysteresis=hysteresis,
        )

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled sooner or later."""
        return self.reduced == torch.float16

    @property
    def notes(self) -> list[str]:
        """What the user should know about these settings on this device."""
        slow = self.device.type == "cpu" and self.scales_loss
        return [
            *super().notes,
            *(["most CPUs compute float16 very slowly; precision.dtype=bfloat16 is made for them"] if slow else []),
        ]

    def end_step(self, trouble: str | None, *, update: int, epoch: int) -> dict[str, Any] | None:
        """Take note of a step; see `Plan.after_step`.

        Returns:
            The move that follows, as in `plan.moves`, already made; what was computed since has to be computed again.
            None: none.
        """
        before = self.plan.rung
        return self._moved(self.plan.after_step(trouble), before, update, epoch)

    def end_epoch(self, loss: float | None, *, update: int, epoch: int, more: bool = True) -> dict[str, Any] | None:
        """Take note of the end of an epoch; see `Plan.after_epoch` and `end_step`."""
        before = self.plan.rung
        return self._moved(self.plan.after_epoch(loss, more=more), before, update, epoch)

    def rolled_back(self, *, update: int, epoch: int) -> dict[str, Any] | None:
        """Take note of a rollback, after the state of that time was loaded: whatever that was, this is float32 now."""
        before = self.plan.rung
        move = self._moved(self.plan.back("a rollback"), before, update, epoch)
        self._use(reduced=False)
        return move

    def state_dict(self) -> dict[str, Any]:
        """Return whether the format is the reduced one, and the loss scaler's state where there is one."""
        return {"reduced": self.dtype != torch.float32, **super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; from another precision, nothing."""
        self._use(reduced=bool(state.get("reduced", False)))
        super().load_state_dict(state)

    def _use(self, *, reduced: bool) -> None:
        self.dtype = self.reduced if reduced else torch.float32
        if self.dtype != torch.float16:
            self.scaler = None
        elif self.scaler is None:
            self.scaler = self._make_scaler()

    def _moved(self, reason: str | None, before: int, update: int, epoch: int) -> dict[str, Any] | None:
        """Make the move and write it down; None: there is none."""
        if reason is None:
            return None
        rung = self.plan.rung
        self._use(reduced=rung != FULL)
        if rung == HELD and isinstance(self.scaler, LossScaler):
            self.scaler.raise_to(self._raised)
        names = ["float32" if one == FULL else str(self.reduced).removeprefix("torch.") for one in (before, rung)]
        move = {
            "update": update,
            "epoch": epoch,
            "from": names[0],
            "to": names[1],
            "rung": rung,
            "reason": reason,
            "scale": self.scaler.get_scale() if self.scaler is not None else None,
        }
        self.plan.moves.append(move)
        return move
