"""One job at a time in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from stabletrain.sealed import Cancelled

Job = Callable[[Callable[[], bool]], Path | None]  # it gets a function that says whether it is to give up


class Writer:
    """Runs one job at a time beside the caller. A process that ends waits for it.

    Args:
        asynchronous: False: a job is done before `start` returns.

    Example:
        >>> writer = Writer(asynchronous=True)
        >>> writer.start(lambda cancelled: Path("done"))
        >>> writer.wait().name
        'done'
    """

    def __init__(self, *, asynchronous: bool) -> None:
        self._asynchronous = asynchronous
        self._thread: threading.Thread | None = None
        self._cancelled = threading.Event()
        self._result: Path | None = None
        self._error: BaseException | None = None

    def start(self, job: Job) -> None:
        """Begin a job, after the one before; see `wait` for what that one may raise."""
        self.wait()
        self._result = None
        if not self._asynchronous:
            self._result = job(self._cancelled.is_set)
            return
        # Not a daemon: Python waits for it before a process ends.
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint writer")
        self._thread.start()

    def wait(self) -> Path | None:
        """Wait for the job that was begun last.

        Returns:
            What it returned.

        Raises:
            BaseException: what it raised, once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._result

    def cancel(self) -> None:
        """Let the job give up, and wait for that; later ones give up too."""
        self._cancelled.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, job: Job) -> None:
        try:
            self._result = job(self._cancelled.is_set)
        except Cancelled:
            pass
        except BaseException as error:  # it is raised where somebody waits for it
            self._error = error
