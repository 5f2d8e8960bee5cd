"""Programs that a test runs: there is an end to waiting for them, and nobody is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

import stabletrain

LIMIT = 300.0  # seconds for a program
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(stabletrain.__file__).parents[1])}
_MARK = "STABLETRAIN_STARTED_BY"  # a variable that all descendants inherit, also those whose parents have gone


@contextmanager
def started(
    words: Sequence[str | Path],
    folder: Path | None = None,
    environment: Mapping[str, str] = ENVIRONMENT,
    **options: Any,
) -> Iterator[subprocess.Popen[str]]:
    """Start a program in a session of its own; at the end of the block it and all that it started are killed.

    Args:
        words: the command.
        folder: where it runs; None = here.
        environment: its variables.
        options: for `subprocess.Popen`.
    """
    mark = uuid.uuid4().hex
    options = {"text": True, "start_new_session": True, **options}
    process = subprocess.Popen(words, cwd=folder, env={**environment, _MARK: mark}, **options)
    try:
        yield process
    finally:
        for other in psutil.process_iter(["environ"]):
            if (other.info["environ"] or {}).get(_MARK) == mark:
                with suppress(psutil.NoSuchProcess):
                    other.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)  # closes its pipes; nobody holds their other ends any more


def run(
    words: Sequence[str | Path],
    folder: Path | None = None,
    environment: Mapping[str, str] = ENVIRONMENT,
    limit: float = LIMIT,
    **options: Any,
) -> subprocess.CompletedProcess[Any]:
    """Run a program to its end, which has to come within `limit` seconds, and return what it printed."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    with started(words, folder, environment, **options) as process:
        output, errors = process.communicate(timeout=limit)
    return subprocess.CompletedProcess(words, process.returncode, output, errors)
