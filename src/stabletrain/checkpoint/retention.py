"""Which checkpoints are kept, and which one is best."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from stabletrain.checkpoint.files import Checkpoint
from stabletrain.checkpoint.occasions import require_count
from stabletrain.errors import ConfigurationError


@dataclass(frozen=True)
class Retention:
    """The newest ones, the best, and some for good.

    Args:
        keep_last: how many of the newest to keep, at least 1.
        keep_every: keep each checkpoint whose number of updates is a multiple of this; None for none.
        metric: name of the validation metric that says which one is best.
        mode: "min" if less is better, "max" if more is.

    Raises:
        ConfigurationError: a number or mode that can't be used.
    """

    keep_last: int = 2
    keep_every: int | None = None
    metric: str = "loss"
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        """Refuse what can't be used."""
        require_count("checkpoint.keep_last", self.keep_last, 1)
        if self.keep_every is not None:
            require_count("checkpoint.keep_every", self.keep_every, 1)
        if self.mode not in ("min", "max"):
            raise ConfigurationError(
                f"checkpoint.mode={self.mode!r}: give min (less is better) or max (more is better)"
            )

    def best(self, checkpoints: Iterable[Checkpoint]) -> Checkpoint | None:
        """Return the best of those that were validated, the oldest of equals; None when none was.

        The manifests are the record: the best is never removed, so it is always among them. NaN is null there.
        """
        sign = 1.0 if self.mode == "min" else -1.0
        rated = [
            (sign * value, checkpoint.serial, checkpoint)
            for checkpoint in checkpoints
            if (value := checkpoint.metrics.get(self.metric)) is not None
        ]
        return min(rated, key=lambda item: item[:2])[2] if rated else None

    def superfluous(self, checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
        """Return those that are not to be kept, the newest first."""
        newest_first = sorted(checkpoints, key=lambda checkpoint: -checkpoint.serial)
        best = self.best(newest_first)
        return [
            checkpoint
            for checkpoint in newest_first[self.keep_last :]
            if checkpoint is not best and not self._kept_for_good(checkpoint)
        ]

    def _kept_for_good(self, checkpoint: Checkpoint) -> bool:
        return self.keep_every is not None and checkpoint.updates > 0 and checkpoint.updates % self.keep_every == 0
