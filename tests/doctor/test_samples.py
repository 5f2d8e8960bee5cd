"""Which samples are found to blame, and how batches are divided."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from stabletrain.doctor.samples import chosen, count_of, guilty, smallest_failing


@given(st.data(), st.integers(2, 40))
def test_exactly_the_samples_that_are_bad_by_themselves_are_found(data: st.DataObject, count: int) -> None:
    bad = data.draw(st.sets(st.integers(0, count - 1), max_size=(count - 1) // 2))
    hints = data.draw(st.one_of(st.just(set()), st.just(bad), st.sets(st.integers(0, count - 1))))
    assert guilty(lambda some: bool(bad & set(some)), count, hints) == sorted(bad)


@given(st.integers(5, 40), st.data())
def test_two_that_are_bad_together_only_are_both_found(count: int, data: st.DataObject) -> None:
    pair = data.draw(st.sets(st.integers(0, count - 1), min_size=2, max_size=2))
    assert guilty(lambda some: pair <= set(some), count) == sorted(pair)


def test_nobody_is_blamed_where_any_samples_are_bad() -> None:
    tried = []

    def is_bad(some: object) -> bool:
        tried.append(some)
        return True

    assert guilty(is_bad, 256) == []
    assert len(tried) < 1500


def test_nobody_is_blamed_where_only_most_of_the_batch_is_bad() -> None:
    assert guilty(lambda some: len(some) > 20, 32) == []


def test_a_step_that_fails_with_few_samples_blames_none_of_the_good_ones() -> None:
    """As the spread of a single sample does."""
    for hints in ([3], [3, 5]):
        assert guilty(lambda some: 3 in some or len(some) == 1, 16, hints) == [3]


@given(st.sets(st.integers(0, 30), min_size=1, max_size=5))
def test_the_smallest_failing_set_fails_and_none_of_its_parts_does(needed: set[int]) -> None:
    assert set(smallest_failing(lambda some: needed <= set(some), range(31))) == needed


def test_batches_of_many_forms_are_counted_and_cut() -> None:
    inputs, labels = torch.arange(12.0).reshape(4, 3), torch.arange(4)
    assert count_of((inputs, labels)) == 4
    cut = chosen({"x": inputs, "y": labels, "scale": torch.tensor(2.0)}, 4, [1, 3])
    assert torch.equal(cut["x"], inputs[[1, 3]]) and cut["y"].tolist() == [1, 3] and float(cut["scale"]) == 2.0
    bags = [torch.zeros(n, 2) for n in (1, 2, 3, 4)]
    assert count_of((bags, labels)) == 4
    assert [len(bag) for bag in chosen((bags, labels), 4, [0, 2])[0]] == [1, 3]
    time_first = torch.zeros(9, 4, 2)
    assert chosen((time_first, labels), 4, [0])[0].shape == (9, 1, 2)
    adjacency = torch.eye(4)
    assert torch.equal(chosen((inputs, adjacency, labels), 4, [0, 2])[1], torch.eye(2))
