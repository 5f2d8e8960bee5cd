"""The tracker: what the trainer tells it goes to tables, TensorBoard, summary and console."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stabletrain.errors import ConfigurationError
from stabletrain.folder import json_text, write_whole, yaml_text
from stabletrain.state import Progress
from stabletrain.tracking.console import MUTE, Console, ProgressStyle
from stabletrain.tracking.environment import describe_environment
from stabletrain.tracking.table import Table

if TYPE_CHECKING:
    from stabletrain.tracking.events import EventFile

logger = logging.getLogger(__name__)

_STEP_COLUMNS = ("epoch", "step", "steps", "updates", "loss", "grad_norm", "lr", "applied", "reason")
_EPOCH_COLUMNS = ("epoch", "train_loss", "val_loss")
_LAST_EPOCH_COLUMNS = ("lr", "batch_size", "grad_norm", "applied", "rejected", "salvaged")
_TIMES = ("seconds", "samples_per_second")  # to TensorBoard only: the tables of two equal runs are equal
_COUNTS = ("rejected", "salvaged")  # over the whole run; to TensorBoard only
_POSITION = ("epoch", "step", "steps", "updates", "applied")  # not curves
_SHOWN_INDICES = 20


class Tracker:
    """Writes what a run leaves behind; one process of a run has one.

    A failure to write is said once, counted in `errors`, and never reaches the training loop.

    Args:
        folder: the run's folder; it exists. None: nothing is written, and what is said goes to the console alone.
        tensorboard: whether to write TensorBoard events.
        tables: whether to write `steps.csv` and `history.csv`.
        progress: "bar", "lines", "none", or "auto" for a bar in a terminal and plain lines elsewhere.
        log_every: steps between two logged ones, counted over the whole run; rejected steps are always logged.

    Raises:
        ConfigurationError: `progress` or `log_every` can't be used.
    """

    def __init__(
        self,
        folder: Path | str | None,
        *,
        tensorboard: bool = True,
        tables: bool = True,
        progress: ProgressStyle = "auto",
        log_every: int = 10,
    ) -> None:
        if isinstance(log_every, bool) or not isinstance(log_every, int) or log_every < 1:
            raise ConfigurationError(f"log_every={log_every!r}: give a whole number of steps, at least 1")
        if progress not in ("auto", "bar", "lines", "none"):
            raise ConfigurationError(f"tracking.progress={progress!r}: give auto, bar, lines or none")
        self.folder = None if folder is None else Path(folder)
        self.log_every = log_every
        self.errors = 0  # writes that failed
        self._tensorboard = tensorboard and self.folder is not None
        self._steps: Table | None = None
        self._history: Table | None = None
        if tables and self.folder is not None:
            self._steps = Table(self.folder / "steps.csv", columns=_STEP_COLUMNS, leave_out=(*_TIMES, *_COUNTS))
            self._history = Table(
                self.folder / "history.csv",
                columns=_EPOCH_COLUMNS,
                last=_LAST_EPOCH_COLUMNS,
                leave_out=(*_TIMES, "step", "steps", "updates"),
            )
        self._events: EventFile | None = None
        self._console = Console(progress)
        self._next_look = self._epoch_start = 0.0
        self._last_steps = 0
        self._logged = (0, 0.0)  # step and moment of the last one that was written

    def mute(self) -> None:
        """Say nothing from now on: another process of the run speaks for all."""
        self._console = Console(MUTE)

    def begin(
        self,
        settings: Mapping[str, Any],
        environment: Mapping[str, Any],
        total_steps: int | None,
        progress: Progress,
        *,
        overrides: Sequence[str] = (),
    ) -> None:
        """Write what is known before the first step, and drop what lies after `progress` from an earlier attempt.

        Args:
            settings: the resolved configuration, plain containers and values.
            environment: facts to add to those of `describe_environment` (which takes `device` and `seed` from here).
            total_steps: steps of the whole run, None when that isn't known.
            progress: where the run starts or goes on.
            overrides: what the user gave on the command line.
        """
        self._last_steps = progress.steps
        self.truncate(progress)
        config = yaml_text(settings)
        facts = describe_environment(device=environment.get("device", "cpu"), seed=environment.get("seed"))
        self._write("config.yaml", config)
        self._write("overrides.yaml", yaml_text(list(overrides)))
        self._write("environment.json", json_text({**facts, **environment}))
        if self._tensorboard:
            self._try(self._begin_events, progress, settings, config)
        self._try(self._console.begin, total_steps, progress.steps)
        now = time.monotonic()
        self._next_look, self._logged, self._epoch_start = now + self._console.interval, (progress.steps, now), now

    def _begin_events(self, progress: Progress, settings: Mapping[str, Any], config: str) -> None:
        from stabletrain.tracking.events import EventFile  # needs TensorBoard, which a run without it needn't load

        assert self.folder is not None
        self._events = EventFile(self.folder, progress.steps + 1 if progress.steps > 0 else 0)
        self._events.text(0, "config", "".join(f"    {line}\n" for line in config.splitlines()))
        self._events.begin_hparams(_flat(settings))

    def truncate(self, progress: Progress) -> None:
        """Drop the rows that lie after `progress`: steps later than its last one, epochs that it hasn't ended."""
        if self._steps is not None and self._history is not None:
            self._try(self._steps.truncate, "steps", progress.steps + 1)
            self._try(self._history.truncate, "epoch", progress.epoch)

    def wants(self, steps: int) -> bool:
        """Return whether the step that makes it `steps` is logged even if it is applied."""
        return steps % self.log_every == 0

    def step(self, record: Mapping[str, Any]) -> None:
        """Take note of a step: each `log_every`-th and each rejected one is written, the others cost next to nothing.

        Args:
            record: epoch, step, steps, updates, loss, grad_norm, lr, applied (whether it was), reason (None or why
                not), and if there is one the loss `scale`; `seconds` and `samples_per_second` go to TensorBoard only.
                The first written record fixes the columns.
        """
        self._last_steps = steps = record["steps"]
        if record["applied"] and steps % self.log_every:
            if time.monotonic() >= self._next_look:
                self._look(record)
            return
        if self._steps is not None:
            self._try(self._steps.add, record)
        now = time.monotonic()
        if self._events is not None:
            values = [*_curves("step", record), ("guard/rejected", float(steps - record["updates"]))]
            before, then = self._logged
            if steps > before and now > then:
                values.append(("time/steps_per_second", (steps - before) / (now - then)))
            self._logged = (steps, now)
            self._try(self._events.scalars, steps, values)
        if now >= self._next_look:
            self._look(record)

    def _look(self, record: Mapping[str, Any]) -> None:
        self._try(self._console.step, record)
        self._next_look = time.monotonic() + self._console.interval

    def rejected(self, record: Mapping[str, Any], indices: Sequence[int], detail: str = "") -> None:
        """Say that a step was rejected; `step` gets the same record besides.

        Args:
            record: as for `step`.
            indices: the samples of its batch, as positions in the data set.
            detail: what else is known about the reason.
        """
        numbers = [int(index) for index in indices]
        more = f" and {len(numbers) - _SHOWN_INDICES} more" if len(numbers) > _SHOWN_INDICES else ""
        reason = f"{record['reason']}: {detail}" if detail else record["reason"]
        line = (
            f"step {record['steps']} (epoch {record['epoch']}, step {record['step']}) rejected: {reason}; "
            f"loss {_number(record.get('loss'))}, gradient norm {_number(record.get('grad_norm'))}; "
            f"samples {numbers[:_SHOWN_INDICES]}{more}"
        )
        self._warn(line, "guard/rejected", record["steps"])

    def salvaged(self, record: Mapping[str, Any], samples: Sequence[int], detail: str = "") -> None:
        """Say that a rejected step was applied without its bad samples; `step` gets the same record besides.

        Args:
            record: as for `step`.
            samples: those that were left out, as positions in the data set.
            detail: why the step was rejected at first.
        """
        line = (
            f"step {record['steps']} (epoch {record['epoch']}, step {record['step']}) salvaged: {detail}; applied "
            f"without samples {[int(index) for index in samples]}, which are left out from the next epoch on"
        )
        self._warn(line, "guard/salvaged", record["steps"])

    def note(self, text: str) -> None:
        """Say something about the run that is no trouble; TensorBoard shows it as text.

        Args:
            text: one line.
        """
        if self._console.style not in ("none", MUTE):
            self._try(self._console.say, text)
        if self._events is not None:
            self._try(self._events.text, self._last_steps, "note", text)

    def warning(self, text: str) -> None:
        """Say loudly that something is wrong with the run; TensorBoard shows it as text.

        Args:
            text: one line.
        """
        self._warn(text, "warning", self._last_steps)

    def _warn(self, line: str, tag: str, steps: int) -> None:
        self._say(logging.WARNING, line)
        if self._events is not None:
            self._try(self._events.text, steps, tag, line)

    def _say(self, level: int, line: str) -> None:
        if self._console.style == MUTE:
            return
        self._try(self._console.clear)
        logger.log(level, "%s", line)
        self._try(self._console.redraw)

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Take note of an epoch that has ended: a row of `history.csv`, curves, a line.

        Args:
            record: epoch (from 0), train_loss, val_loss, val_<metric>…, lr, grad_norm, applied, rejected, salvaged;
                `steps`, `seconds` and `samples_per_second` go to TensorBoard only.
        """
        if self._history is not None:
            self._try(self._history.add, record)
        now = time.monotonic()
        if self._events is not None:
            values = [*_curves("epoch", record), ("time/epoch_seconds", now - self._epoch_start)]
            self._try(self._events.scalars, int(record.get("steps", self._last_steps)), values)
        self._epoch_start = now
        self._try(self._console.epoch, record)

    def summary(self, summary: Mapping[str, Any]) -> None:
        """Replace `summary.json`."""
        self._write("summary.json", json_text(dict(summary)))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the last summary, end the curves, and say how the run went; the last line counts the rejected steps.

        Args:
            summary: as in `summary.json`; `steps` and `rejected` at least.
        """
        self.summary(summary)
        metrics = summary.get("metrics") or {}
        if self._events is not None:
            values = [pair for name in metrics for pair in _curves(name, metrics[name] or {})]
            self._try(self._events.scalars, int(summary["steps"]), values)
            self._try(self._events.end_hparams, summary.get("status") == "completed")
        self._try(self._console.close)
        for name, found in metrics.items():
            if found:
                values_text = ", ".join(f"{metric} {_number(value)}" for metric, value in found.items())
                self._try(self._console.say, f"{name}: {values_text}")
        place = "" if self.folder is None else f": {self.folder}"
        self._try(self._console.say, f"{summary.get('status', 'ended')}{place}")
        self._try(self._console.say, f"{summary['rejected']} of {summary['steps']} steps were rejected")

    def close(self) -> None:
        """Close all files; a second time does nothing."""
        self._try(self._console.close)
        for file in (self._steps, self._history, self._events):
            if file is not None:
                self._try(file.close)
        self._events = None

    def state_dict(self) -> dict[str, Any]:
        """Return the count of failed writes, with the rows so far safe on disk, where a checkpoint wants them."""
        for table in (self._steps, self._history):
            if table is not None:
                self._try(table.sync)
        return {"errors": self.errors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the count."""
        self.errors = int(state["errors"])

    def _write(self, name: str, text: str) -> None:
        if self.folder is not None:
            self._try(write_whole, self.folder / name, text)

    def _try(self, action: Callable[..., object], *arguments: Any) -> None:
        """Do it; when disk or terminal refuse, say so the first time and go on."""
        try:
            action(*arguments)
        except OSError as error:
            self.errors += 1
            if self.errors == 1:
                logger.error(
                    "the run's records can't be written (%s); training goes on without; free space or rights in %s",
                    error,
                    self.folder,
                )


def _curves(prefix: str, record: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return the numbers of `record` that can be drawn: NaN and infinities can't."""
    found = []
    for name, value in record.items():
        if value is None or isinstance(value, str) or name in _POSITION:
            continue
        number = float(value)
        if math.isfinite(number):
            found.append((f"time/{name}" if name in _TIMES else f"{prefix}/{name}", number))
    return found


def _number(value: Any) -> str:
    return "unknown" if value is None else f"{float(value):.6g}"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the settings under dotted names, without those that begin with an underscore."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found.update(_flat(value, f"{prefix}{name}."))
        elif not name.startswith("_"):
            finite = not isinstance(value, float) or math.isfinite(value)
            found[f"{prefix}{name}"] = value if finite else str(value)
    return found
