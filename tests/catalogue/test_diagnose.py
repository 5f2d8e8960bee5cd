"""How well the doctor does on the catalogue; the shares are bars, and each case says what it got wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from stabletrain import Diagnosis, diagnose

from .case import Case
from .collection import CASES, HEALTHY
from .experiments import EXPERIMENTS, PRESETS, step_of
from .judge import Judged, judged

SEEDS = (0, 1)  # `benchmarks/catalogue.py` goes through three


@pytest.fixture(scope="module")
def results() -> list[Judged]:
    return [judged(case, seed) for case in CASES for seed in SEEDS]


@pytest.mark.parametrize(
    ("what", "least"), [("operation", 0.97), ("line", 0.97), ("samples", 0.95), ("cause", 0.9), ("cured", 0.85)]
)
def test_the_share_that_is_right(what: str, least: float, results: list[Judged]) -> None:
    wrong = [one.said for one in results if not getattr(one, what)]
    assert len(wrong) <= (1 - least) * len(results), "\n\n".join(wrong)


def test_few_are_wrong_and_sure(results: list[Judged]) -> None:
    wrong = [one.said for one in results if one.sure_and_wrong]
    assert len(wrong) <= 0.05 * len(results), "\n\n".join(wrong)


@pytest.mark.parametrize("case", HEALTHY, ids=lambda case: case.name)
@pytest.mark.parametrize("seed", SEEDS)
def test_no_false_alarm(case: Case, seed: int) -> None:
    built = case.build(seed)
    found: Diagnosis = diagnose(built.model, built.loss, built.batch)
    assert found.cause is None, found


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_no_false_alarm_in_an_experiment(experiment: str, preset: str, tmp_path: Path) -> None:
    built = step_of(experiment, preset, 0, tmp_path)
    found = diagnose(built.model, built.loss, built.batch)
    assert found.cause is None, found
