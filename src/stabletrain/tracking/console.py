"""What a run shows while it goes: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Literal

from tqdm import tqdm  # type: ignore[import-untyped]

ProgressStyle = Literal["auto", "bar", "lines", "none"]
MUTE: Literal["mute"] = "mute"  # not even what happens once


# What matters fits in 80 columns; the bar takes what is left.
_BAR_FORMAT = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix} |{bar}|"


class _QuietBar(tqdm):  # type: ignore[misc]
    monitor_interval = 0  # no thread of its own: it is redrawn by time, from the training loop


class Console:
    """Shows steps, epochs and messages.

    Args:
        style: "bar", "lines", "none", "mute", or "auto" for a bar in a terminal and lines elsewhere.
    """

    def __init__(self, style: ProgressStyle | Literal["mute"]) -> None:
        if style == "auto":
            style = "bar" if sys.stderr.isatty() else "lines"
        self.style = style
        self.interval = {"bar": 0.2, "lines": 10.0}.get(style, float("inf"))  # seconds between two looks at a step
        self._bar: Any = None
        self._total: int | None = None

    def begin(self, total_steps: int | None, steps: int) -> None:
        """Start to show a run that has `steps` of `total_steps` behind it."""
        self._total = total_steps
        if self.style == "bar":
            self._bar = _QuietBar(
                total=total_steps, initial=steps, file=sys.stderr, dynamic_ncols=True, bar_format=_BAR_FORMAT
            )

    def step(self, record: Mapping[str, Any]) -> None:
        """Show where the run stands."""
        counts = f"applied {record['updates']} rejected {record['steps'] - record['updates']}"
        values = _values({"loss": record.get("loss"), "norm": record.get("grad_norm"), "lr": record.get("lr")})
        if self._bar is not None:
            self._bar.n = record["steps"]
            self._bar.set_postfix_str(f"{values} {counts}", refresh=False)
            self._bar.refresh()
        elif self.style == "lines":
            total = "" if self._total is None else f"/{self._total}"
            print(f"epoch {record['epoch']} step {record['steps']}{total} {values} {counts}", flush=True)

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Say how an epoch went."""
        if self.style in ("none", MUTE):
            return
        values = _values({name: value for name, value in record.items() if name != "epoch"})
        self.say(f"epoch {record['epoch']} {values}")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self.style == MUTE:
            return
        self.clear()
        print(line, flush=True)
        self.redraw()

    def clear(self) -> None:
        """Take the bar away for a moment, for somebody else's line."""
        if self._bar is not None:
            self._bar.clear()

    def redraw(self) -> None:
        """Show the bar again."""
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        """End the bar and leave it standing."""
        if self._bar is not None:
            bar, self._bar = self._bar, None
            bar.close()


def _values(record: Mapping[str, Any]) -> str:
    # Values that still lie on an accelerator (tensors) are not waited for.
    return " ".join(f"{name} {_short(value)}" for name, value in record.items() if isinstance(value, (int, float)))


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"
