"""What may change between a run and its continuation, and what may not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# What is refused, and why; everything inside a name counts.
STRUCTURAL = {
    "model": "the weights are those of this model",
    "data": "the position in the epoch counts these samples",
    "seed": "it decides the order of the samples and every random draw",
    "batch_size": "the position in the epoch counts steps of this size",
    "ramp": "it decides how many samples a step has",
    "schedule.ramp": "it decides how many samples a step has",
    "optimizer class": "the optimizer's state is this optimizer's",
}
# Refused besides, where the model normalises over a batch.
WITH_BATCH_NORM = {"microbatch": "the model's running statistics are of microbatches of this size"}
# Exceptions to it: the same data may lie in another place. Its fingerprint is compared besides.
ELSEWHERE = ("data.path",)
# What says how to start and what to call it, not what is done; not worth a word.
SILENT = ("name", "resume", "init_from", "init_strict", "initialisation", "debug", "doctor")
# What changes the scale of losses, so that those before and after can't be compared.
OBJECTIVE = ("loss", "loss_mode", "task")
ABSENT = "(absent)"
_SHOWN = 12


@dataclass(frozen=True)
class Change:
    """A setting that isn't what it was."""

    key: str  # dotted
    before: Any
    after: Any

    def __str__(self) -> str:
        """Say what it was and what it is."""
        return f"{self.key} {self.before} -> {self.after}"

    def reason(self, structural: Mapping[str, str] = STRUCTURAL) -> str | None:
        """Return why it is refused; None for one that is taken.

        Example:
            >>> Change("model.hidden", 64, 32).reason()
            'the weights are those of this model'
            >>> Change("optimizer.lr", 0.1, 0.2).reason()
        """
        if _within(self.key, ELSEWHERE):
            return None
        return next((why for name, why in structural.items() if _within(self.key, (name,))), None)

    @property
    def of_the_objective(self) -> bool:
        """Whether losses before and after it can't be compared."""
        return _within(self.key, OBJECTIVE)


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Return the settings that differ, without those that say nothing about the training.

    Args:
        before: the stored settings.
        after: the current ones. Where either is empty, nothing can be said. A key that is absent in one of them and
            empty in the other makes no difference: a later version may have added it.

    Example:
        >>> before, after = {"seed": 0, "guard": {"window": 100}}, {"seed": 0, "guard": {"window": 50}}
        >>> listed(changes(before, after))
        'guard.window 100 -> 50'
    """
    if not before or not after:
        return []
    old, new = dict(_leaves(before)), dict(_leaves(after))
    keys = [*new, *(key for key in old if key not in new)]
    found = [Change(key, old.get(key, ABSENT), new.get(key, ABSENT)) for key in keys if not _within(key, SILENT)]
    return [change for change in found if not same(change.before, change.after)]


def listed(found: list[Change]) -> str:
    """Return the changes in one line."""
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(map(str, found[:_SHOWN])) + more


def same(one: Any, other: Any) -> bool:
    """Return whether two values are equal; NaN equals NaN, and absent equals empty."""
    if ABSENT in (one, other):
        return all(value in (ABSENT, None, [], {}, "") for value in (one, other))
    return bool(one == other) or (one != one and other != other)


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _within(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)
