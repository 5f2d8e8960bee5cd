"""Loaders: the position is data, so workers, restarts and what was read before change nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from stabletrain.data import ArrayDataset, Loader, Microbatch, OrderedLoader, Part, collate, digits
from stabletrain.errors import ConfigurationError
from stabletrain.randomness import uniform
from stabletrain.tree import tensors

# Python 3.12 and later warn about fork with threads, which is how workers start on Linux.
pytestmark = pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")


class Augmented(Dataset[Any]):
    """Samples that differ with each reading unless somebody seeds all three generators; remembers what was read."""

    random = True

    def __init__(self, count: int = 20) -> None:
        self.count = count
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.read.append(index)
        draws = [index, float(torch.rand(())), np.random.rand(), random.random()]
        return torch.tensor(draws, dtype=torch.float64), index % 3


def numbered(count: int) -> ArrayDataset:
    return ArrayDataset(torch.arange(count, dtype=torch.float32), torch.arange(count))


def indices(steps: Any) -> list[list[list[int]]]:
    return [[microbatch.indices.tolist() for microbatch in step] for step in steps]


def same(first: list[list[Microbatch]], second: list[list[Microbatch]]) -> bool:
    if indices(first) != indices(second):
        return False
    one, other = (list(tensors([[part.data for part in step] for step in steps])) for steps in (first, second))
    return len(one) == len(other) and all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 40),
    size=st.integers(1, 10),
    accumulate=st.integers(1, 4),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
    start=st.integers(0, 50),
)
def test_an_epoch_is_a_function_of_seed_and_epoch(
    count: int, size: int, accumulate: int, drop_last: bool, shuffle: bool, seed: int, epoch: int, start: int
) -> None:
    batch_size = min(size * accumulate, count - count % accumulate)
    if batch_size == 0:
        return
    data = numbered(count)
    loader = Loader(data, batch_size=batch_size, accumulate=accumulate, seed=seed, shuffle=shuffle, drop_last=drop_last)
    steps = list(loader.epoch(epoch))
    seen = [index for step in indices(steps) for part in step for index in part]
    assert len(steps) == loader.steps_per_epoch
    assert len(set(seen)) == len(seen)
    assert len(seen) == (count - count % batch_size if drop_last else count)
    assert seen == (loader.order(epoch).tolist() if shuffle else list(range(count)))[: len(seen)]
    for step in steps[: count // batch_size]:
        assert [len(microbatch.indices) for microbatch in step] == [batch_size // accumulate] * accumulate
    for step in steps:
        for microbatch in step:
            assert torch.equal(microbatch.data[1], microbatch.indices)
            assert torch.equal(microbatch.data[0], microbatch.indices.float())
    start = min(start, len(steps))
    again = Loader(data, batch_size=batch_size, accumulate=accumulate, seed=seed, shuffle=shuffle, drop_last=drop_last)
    assert same(list(again.epoch(epoch, start)), steps[start:])


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    loader, other = (Loader(numbered(50), batch_size=5, seed=seed) for seed in (0, 1))
    orders = [tuple(order.tolist()) for order in (loader.order(0), loader.order(1), other.order(0))]
    assert len(set(orders)) == 3
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_the_order_does_not_touch_the_default_generator_nor_depend_on_it() -> None:
    loader = Loader(numbered(30), batch_size=3)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = indices(loader.epoch(2))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert indices(loader.epoch(2)) == first


@pytest.mark.parametrize("accumulate", [1, 2])
def test_workers_and_restarts_change_no_byte_of_random_samples(accumulate: int) -> None:
    reference = list(Loader(Augmented(), batch_size=4, accumulate=accumulate, seed=7).epoch(1))
    with_workers = Loader(Augmented(), batch_size=4, accumulate=accumulate, seed=7, workers=2)
    assert same(list(with_workers.epoch(1)), reference)
    assert same(list(with_workers.epoch(1, start=3)), reference[3:])
    without = Loader(Augmented(), batch_size=4, accumulate=accumulate, seed=7)
    torch.rand(5), np.random.rand(), random.random()
    assert same(list(without.epoch(1, start=3)), reference[3:])
    assert not same(list(without.epoch(2)), reference)


def test_a_sample_has_other_randomness_in_each_epoch_and_seed() -> None:
    def draw(seed: int, epoch: int) -> torch.Tensor:
        steps = Loader(Augmented(4), batch_size=4, seed=seed, shuffle=False).epoch(epoch)
        data: torch.Tensor = next(iter(steps))[0].data[0]
        return data

    results = [draw(0, 0), draw(0, 1), draw(1, 0)]
    for one in range(3):
        for other in range(one):
            assert bool((results[one][:, 1:] != results[other][:, 1:]).all())
    assert len(set(results[0][:, 1].tolist())) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_samples_leaves_the_default_generators_alone(workers: int) -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    list(Loader(Augmented(), batch_size=4, workers=workers).epoch(0))
    list(OrderedLoader(Augmented(), batch_size=8, workers=workers))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[index]
    assert random.getstate() == states[2]


def test_nothing_before_the_start_is_read() -> None:
    data = Augmented()
    loader = Loader(data, batch_size=4, seed=3)
    steps = list(loader.epoch(0, start=3))
    assert data.read == [index for step in indices(steps) for part in step for index in part]
    assert len(data.read) == 8


def test_batches_are_read_when_they_are_asked_for() -> None:
    data = Augmented(40)
    steps = Loader(data, batch_size=4).epoch(0)
    next(steps)
    assert len(data.read) == 4


def test_parts_of_a_random_data_set_stay_random_and_keyed() -> None:
    part = Part(Augmented(), torch.arange(5, 15))
    first, second = (list(Loader(part, batch_size=5, seed=1).epoch(0)) for _ in range(2))
    assert same(first, second)


class Drawn(Dataset[torch.Tensor]):
    """Whole batches, with something drawn for each sample."""

    random = True

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.rand(2)

    def gather(self, indices: torch.Tensor, seed: int) -> torch.Tensor:
        return uniform(seed, indices, 2)


@pytest.mark.parametrize("make", [Drawn, lambda: Part(Drawn(), torch.arange(20))])
def test_what_whole_batches_draw_depends_on_seed_epoch_and_sample_alone(make: Callable[[], Any]) -> None:
    loader = Loader(make(), batch_size=5, seed=1)

    def by_sample(steps: Iterable[list[Microbatch]]) -> dict[int, list[float]]:
        parts = [part for step in steps for part in step]
        return {i: row for part in parts for i, row in zip(part.indices.tolist(), part.data.tolist(), strict=True)}

    first = by_sample(loader.epoch(0))
    assert by_sample(Loader(make(), batch_size=4, accumulate=2, seed=1).epoch(0)) == first
    assert loader.read([7, 3], 0).data.tolist() == [first[7], first[3]]
    others = by_sample(loader.epoch(1)), by_sample(Loader(make(), batch_size=5, seed=2).epoch(0))
    numbers = [number for found in (first, *others) for row in found.values() for number in row]
    assert len(set(numbers)) == len(numbers) == 120


def test_evaluation_sees_every_sample_once_in_order() -> None:
    loader = OrderedLoader(numbered(10), batch_size=4)
    assert [batch.indices.tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [batch.data[1].tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(loader) == 3
    sampled, parallel = (OrderedLoader(Augmented(), batch_size=6, workers=workers) for workers in (0, 2))
    assert same([list(sampled)], [list(parallel)])
    assert same([list(sampled)], [list(sampled)])


def test_sequences_of_different_length_are_a_list() -> None:
    class Ragged(Dataset[Any]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.zeros(index + 1, 2), index

    inputs, targets = next(iter(OrderedLoader(Ragged(), batch_size=4))).data
    assert [len(item) for item in inputs] == [1, 2, 3, 4]
    assert targets.tolist() == [0, 1, 2, 3]


def test_collate_follows_the_structure_of_a_sample() -> None:
    samples = [({"a": np.zeros(2), "b": torch.zeros(index + 1)}, 0.5) for index in range(2)]
    batch, numbers = collate(samples)
    assert batch["a"].shape == (2, 2)
    assert [len(item) for item in batch["b"]] == [1, 2]
    assert numbers.tolist() == [0.5, 0.5]


def test_a_collate_function_wins_and_the_data_sets_own_is_used() -> None:
    class Own(Augmented):
        @staticmethod
        def collate(samples: list[Any]) -> int:
            return len(samples)

    assert [batch.data for batch in OrderedLoader(Own(5), batch_size=3)] == [3, 2]
    assert [batch.data for batch in OrderedLoader(Own(5), batch_size=3, collate=lambda samples: "mine")] == ["mine"] * 2


def test_batches_in_memory_go_to_the_device() -> None:
    steps = Loader(numbered(6), batch_size=3, device="meta").epoch(0)
    microbatch = next(steps)[0]
    assert {tensor.device.type for tensor in tensors(microbatch.data)} == {"meta"}
    assert microbatch.indices.device.type == "cpu"


def test_the_digits_come_in_whole_steps() -> None:
    loader = Loader(digits().train, batch_size=32, accumulate=4)
    steps = list(loader.epoch(0))
    assert len(steps) == loader.steps_per_epoch == 39
    assert all(microbatch.data[0].shape == (8, 1, 8, 8) for step in steps for microbatch in step)


class Stream(torch.utils.data.IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter([1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": 0}, ["batch_size", "0", "from 1"]),
        ({"batch_size": -3}, ["batch_size", "-3"]),
        ({"batch_size": 2.5}, ["batch_size", "2.5", "whole number"]),
        ({"batch_size": True}, ["batch_size", "True"]),
        ({"batch_size": 11}, ["batch_size", "11", "10 samples", "1 to 10"]),
        ({"batch_size": 6, "accumulate": 4}, ["batch_size 6", "accumulate 4", "divides"]),
        ({"batch_size": 6, "accumulate": 0}, ["accumulate", "0", "from 1"]),
        ({"batch_size": 2, "workers": -1}, ["workers", "-1", "from 0"]),
        ({"batch_size": 2, "dataset": numbered(0)}, ["empty", "0 samples"]),
        ({"batch_size": 1, "dataset": Stream()}, ["Stream", "map-style", "__getitem__"]),
    ],
)
def test_bad_arguments_get_one_message(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as error:
        Loader(**{"dataset": numbered(10), **arguments})
    assert all(word in str(error.value) for word in words), error.value
