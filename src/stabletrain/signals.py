"""Signals that ask a run to end: noted when they come, acted upon when the step is done."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Signals:
    """Notes SIGTERM, SIGINT and SIGUSR1 inside the block.

    A second one ends the process at once, also where it was ignored before, as SIGINT is in a shell's background jobs.

    Outside the main thread, where Python delivers no signals, nothing is noted.

    Example:
        >>> with Signals() as signals:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     signals.received, signals.name
        (True, 'SIGTERM')
    """

    def __init__(self) -> None:
        self.received = False
        self.name = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        """Begin to listen."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in ASKED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received, self.name = True, signal.Signals(number).name
        for asked in ASKED:
            before = self._before[asked]
            if before is signal.SIG_IGN:
                before = signal.default_int_handler if asked == signal.SIGINT else signal.SIG_DFL
            signal.signal(asked, before)
