"""What the doctor says about a case, against what is true."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from stabletrain import diagnose

from .case import Case, guilty_lines, right_operation


@dataclass(frozen=True)
class Judged:
    """Which answers are right.

    Args:
        said: the diagnosis in words, with the case's name and seed before it.
        operation: the operation, forward or backward.
        line: the file and the line.
        samples: exactly those to blame.
        cause: one of the causes that an expert would accept.
        sure: the doctor said that it is sure.
        cured: it found a change with which the step is healthy.
    """

    said: str
    operation: bool
    line: bool
    samples: bool
    cause: bool
    sure: bool
    cured: bool

    @property
    def sure_and_wrong(self) -> bool:
        return self.sure and not self.cause


def judged(case: Case, seed: int) -> Judged:
    """Let the doctor look at a case."""
    built = case.build(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the cases do is their affair
        found = diagnose(built.model, built.loss, built.batch)
    file, lines = guilty_lines(case)
    operation = found.operation
    if operation is None or not case.operations:
        right_place = right_line = operation is None and not case.operations
    else:
        right_place = right_operation(case, operation.name) and operation.in_backward == case.in_backward
        right_line = operation.file == file and operation.line in lines
    return Judged(
        said=f"{case.name}-{seed}: {found}",
        operation=right_place,
        line=right_line,
        samples=sorted(found.samples) == built.samples,
        cause=found.cause in case.causes,
        sure=found.confidence == "high",
        cured=any(remedy.held for remedy in found.remedies),
    )
