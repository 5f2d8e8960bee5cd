"""What the commands say when something went wrong: one message, no traceback, and an exit code."""

from __future__ import annotations

import errno
import os
import site
import sys
import sysconfig
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from stabletrain.errors import ConfigurationError, Interrupted, UnstableTraining

COMPLETED, FAILED, MISCONFIGURED, UNSTABLE, INTERRUPTED = 0, 1, 2, 3, 75
_HEAD_START = 6.0  # seconds that the first of several processes has to speak for all, also on a loaded machine

# What the file system may refuse: a matter of the folder or the disk, not of the program.
_DISK = {
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
}


def report(error: BaseException, debug: bool) -> int:
    """Write one message for an error to stderr, with its traceback under `debug`, and return the exit code."""
    message, code = message_of(error)
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        if code in (UNSTABLE, INTERRUPTED):
            return code  # common to all processes, and told by the first
        # The first process says what concerns all, and the launcher ends the others; what is left is this one's own.
        time.sleep(_HEAD_START)
        message = f"process {rank}: {message}"
    if debug:
        traceback.print_exception(type(error), error, error.__traceback__)
    hint = "; debug=true shows the traceback" if code == FAILED and not debug else ""
    print(f"stabletrain: {message}{hint}", file=sys.stderr, flush=True)
    return code


def message_of(error: BaseException) -> tuple[str, int]:
    """Return what to tell about an error, and the exit code that stands for it."""
    if isinstance(error, ConfigurationError):
        return str(error), MISCONFIGURED
    if isinstance(error, UnstableTraining):
        return str(error), UNSTABLE
    if isinstance(error, Interrupted):
        return str(error), INTERRUPTED
    if isinstance(error, KeyboardInterrupt):
        return (
            "interrupted at once, without saving; the same command continues from the last checkpoint, if there is one",
            FAILED,
        )
    if isinstance(error, OSError) and error.errno in _DISK and _users_line(error) is None:
        return (
            f"can't write {error.filename or 'to disk'}: {error.strerror}. Give room or another folder.",
            MISCONFIGURED,
        )
    cause = error.__cause__ if type(error).__name__ == "PartFailed" and error.__cause__ is not None else error
    line = _users_line(cause) or _last_line(cause)
    what = str(error) if cause is not error else f"{type(error).__name__}: {error}"
    return f"{what} ({line})", FAILED


def report_composition(error: Exception, overrides: Sequence[str], flags: Sequence[str], debug: bool) -> int:
    """Write one message for what went wrong while a config was composed, and return the exit code."""
    from stabletrain.config.explain import COMPOSITION_ERRORS, explain

    if isinstance(error, COMPOSITION_ERRORS) and not isinstance(error, ConfigurationError):
        said = ConfigurationError(explain(error, overrides, flags))
        return report(said.with_traceback(error.__traceback__), debug)
    return report(error, debug)


def _users_line(error: BaseException) -> str | None:
    """Return file:line of the innermost frame that is neither ours nor an installed package's, if there is one."""
    installed = {
        *site.getsitepackages(),
        *(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib")),
    }
    places = [str(Path(__file__).parent), *installed, "<"]
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not any(frame.filename.startswith(place) for place in places)]
    return f"{theirs[-1].filename}:{theirs[-1].lineno}" if len(theirs) > 0 else None


def _last_line(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if len(frames) > 0 else "no traceback"


def refused_value(error: Exception) -> Exception:
    """Return the error of a part as one of the settings, where it is a value that the part refused."""
    cause = error.__cause__
    refused = isinstance(cause, (TypeError, ValueError)) and _users_line(cause) is None
    return ConfigurationError(str(error)) if refused else error
