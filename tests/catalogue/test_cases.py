"""Each case is what it says: bad for the stated reason and at the stated place, or healthy throughout."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest

from .case import Built, Case, batch_size, canonical, guilty_lines, right_operation, without
from .collection import CASES, CAUSES, FROZEN, HEALTHY
from .trace import first_bad, mend_sources, run

SEEDS = (0,)  # more were looked at when a case was written, and `test_diagnose` takes them too
SOURCES = [case for case in CASES if not case.operations]
OPERATIONS = [case for case in CASES if case.operations]


@pytest.fixture(autouse=True)
def _quiet_anomaly_mode() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Anomaly Detection has been enabled")
        yield


def each(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in cases])


def left(built: Built, samples: list[int]) -> bool:
    """Whether the step is healthy without some samples."""
    return run(Built(built.model, built.loss, without(built.batch, samples), [])).healthy


def test_there_are_enough_distinct_cases():
    names = [case.name for case in (*CASES, *HEALTHY)]
    assert len(set(names)) == len(names)
    assert len(FROZEN) >= 20 and len(CASES) >= 60 and len(HEALTHY) >= 30
    assert {case.name for case in FROZEN} <= {case.name for case in CASES}
    for case in CASES:
        assert 1 <= len(case.causes) <= 2 and case.causes <= CAUSES


@each(CASES)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_bad_case_is_bad(case: Case, seed: int):
    assert not run(case.build(seed)).healthy


@each(CASES)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_samples_are_the_smallest_set_to_blame(case: Case, seed: int):
    built = case.build(seed)
    size = batch_size(built.batch)
    assert built.samples == sorted(set(built.samples)) and len(built.samples) < size
    if built.samples:
        assert left(built, built.samples)
        for sample in built.samples:
            assert not left(case.build(seed), [other for other in built.samples if other != sample])
    else:
        for half in (range(size // 2), range(size // 2, size)):
            assert not left(case.build(seed), list(half))


@each(OPERATIONS)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_operation_to_blame_is_the_marked_one(case: Case, seed: int):
    found = first_bad(case.build, seed)
    assert found is not None
    file, lines = guilty_lines(case)
    assert right_operation(case, found.operation), found
    assert found.place[0] == file and found.place[1] in lines, found
    assert found.in_backward == case.in_backward


@each(SOURCES)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_bad_source_is_all_that_is_wrong(case: Case, seed: int):
    assert guilty_lines(case)[1] == frozenset()
    built = case.build(seed)
    assert mend_sources(built)
    assert run(built).healthy


@each(HEALTHY)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_healthy_case_is_healthy(case: Case, seed: int):
    assert run(case.build(seed)).healthy


@each(CASES)
def test_seeds_give_the_same_case_again(case: Case):
    assert case.build(1).samples == case.build(1).samples
    first, second = run(case.build(1)), run(case.build(1))
    assert (first.loss, first.gradients, first.buffers) == (second.loss, second.gradients, second.buffers)


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("SqrtBackward0", "sqrt"),
        ("aten::_softmax.int", "softmax"),
        ("__rtruediv__", "div"),
        ("CtcLossBackward0", "ctc_loss"),
    ],
)
def test_operations_have_one_name_however_spelled(spelled: str, name: str):
    assert canonical(spelled) == name
