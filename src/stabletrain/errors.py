"""The errors that users meet, one class for each exit code."""

from __future__ import annotations

from typing import Any


class ConfigurationError(ValueError):
    """What the user gave can't be used: names what was given, what is allowed and what to do (exit code 2)."""


class UnstableTraining(RuntimeError):
    """Training can't go on in a healthy way: a step was bad under `raise`, or the budget is spent (exit code 3).

    Args:
        message: what happened.
        verdict: the guard's decision about the last step, where there is one.
        more: what else helps whoever reads why it ended; a rollback, which goes on, leaves it out.
    """

    def __init__(self, message: str, verdict: Any = None, *, more: str = "") -> None:
        super().__init__(f"{message} {more}" if more else message)
        self.message = message
        self.verdict = verdict


class Interrupted(Exception):
    """A signal ended the run after its checkpoint was saved; the same command continues (exit code 75)."""
