"""Faults around the model: the process dies, the disk is full."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path

from stabletrain.fault.base import M, Planned, Surroundings
from stabletrain.folder import json_text, write_whole

KILL_RECORD = "fault.json"  # in the run's folder: at which step the process was killed last
ROOM = 64  # bytes that a file may have on a full disk: the semaphores of worker processes are files of 32


class Kill(Planned):
    """The process is killed (SIGKILL) before the step: nothing can be saved or said, as when memory runs out.

    The same command continues, and isn't killed at that step again: the run's folder remembers it in `fault.json`.
    A run without a folder can't be continued, and would be killed at that step each time.
    """

    def __init__(self, at: int | None = None, times: int = 1) -> None:
        super().__init__(at, times)
        self._record: Path | None = None

    def check(self, run: Surroundings) -> list[str]:
        """See whether the fault can happen in this run, and whether it did before; see `Fault.check`."""
        self._record = None if run.folder is None else run.folder / KILL_RECORD
        return super().check(run)

    def before_step(self, steps: int, microbatches: list[M]) -> list[M]:
        """Kill this process when it is time."""
        if self._in_time(steps) and self._record is not None and self._record.exists():
            self._last = max(self._last, int(json.loads(self._record.read_text())["killed_at"]))
        if self._happens(steps):
            if self._record is not None:
                write_whole(self._record, json_text({"killed_at": steps}))
            os.kill(os.getpid(), signal.SIGKILL)
        return microbatches


class DiskFull(Planned):
    """Next to nothing can be written for some steps, including the checkpoints and records that fall between them.

    The disk itself isn't filled: this process's limit on the size of files (RLIMIT_FSIZE) is set to 64 bytes, so that
    the kernel refuses what goes beyond them in any regular file, in the run's folder and elsewhere, as "File too large"
    rather than "No space left on device". Terminals and pipes still work, and so do worker processes. Afterwards the
    limit is what it was. A checkpoint that is written beside the training may find it so again: with
    `checkpoint.asynchronous=false` it is written within the step.
    """

    def __init__(self, at: int | None = None, times: int = 1) -> None:
        super().__init__(at, times)
        self._before: tuple[int, int] | None = None  # the limits as they were, while they are changed
        self._watched = False

    def before_step(self, steps: int, microbatches: list[M]) -> list[M]:
        """Let writes fail from here on, or work again."""
        if not self._in_time(steps):
            self.close()
        elif self._before is None:
            if not self._watched:  # what a worker shares with this process counts as a file as well
                os.register_at_fork(after_in_child=self.close)
                self._watched = True
            self._before = resource.getrlimit(resource.RLIMIT_FSIZE)
            # Python ignores the signal SIGXFSZ that comes with it, so the write itself reports the error.
            resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, self._before[1]))
        return microbatches

    def close(self) -> None:
        """Let writes work again; a second time does nothing."""
        if self._before is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, self._before)
            self._before = None
