"""How well the doctor does on the catalogue; the shares are bars, and each case says what it got wrong."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import pytest

from stabletrain import Diagnosis, diagnose

from .case import Case, guilty_lines, right_operation
from .collection import CASES, HEALTHY

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Judged:
    name: str
    operation: bool
    line: bool
    samples: bool
    cause: bool
    sure: bool
    cured: bool


def judged(case: Case, seed: int) -> Judged:
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
        name=f"{case.name}-{seed}: {found}",
        operation=right_place,
        line=right_line,
        samples=sorted(found.samples) == built.samples,
        cause=found.cause in case.causes,
        sure=found.confidence == "high",
        cured=any(remedy.held for remedy in found.remedies),
    )


@pytest.fixture(scope="module")
def results() -> list[Judged]:
    return [judged(case, seed) for case in CASES for seed in SEEDS]


@pytest.mark.parametrize(
    ("what", "least"), [("operation", 0.97), ("line", 0.97), ("samples", 0.95), ("cause", 0.9), ("cured", 0.85)]
)
def test_the_share_that_is_right(what: str, least: float, results: list[Judged]) -> None:
    wrong = [one.name for one in results if not getattr(one, what)]
    assert len(wrong) <= (1 - least) * len(results), "\n\n".join(wrong)


def test_few_are_wrong_and_sure(results: list[Judged]) -> None:
    wrong = [one.name for one in results if one.sure and not one.cause]
    assert len(wrong) <= 0.05 * len(results), "\n\n".join(wrong)


@pytest.mark.parametrize("case", HEALTHY, ids=lambda case: case.name)
@pytest.mark.parametrize("seed", SEEDS)
def test_no_false_alarm(case: Case, seed: int) -> None:
    built = case.build(seed)
    found: Diagnosis = diagnose(built.model, built.loss, built.batch)
    assert found.cause is None, found
