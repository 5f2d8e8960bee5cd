"""Data in memory, views of it, and class numbers found without reading samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from stabletrain.data import ArrayDataset, Part, class_targets
from stabletrain.errors import ConfigurationError


def test_gathering_is_indexing() -> None:
    data = ArrayDataset(torch.randn(9, 2, 3), torch.arange(9))
    indices = torch.tensor([4, 0, 4])
    inputs, targets = data.gather(indices)
    assert torch.equal(inputs, torch.stack([data[index][0] for index in (4, 0, 4)]))
    assert torch.equal(targets, torch.tensor([4, 0, 4]))


def test_lists_and_dictionaries_are_gathered_too() -> None:
    bags = [torch.full((length,), float(length)) for length in (1, 2, 3)]
    data = ArrayDataset({"bag": bags, "identity": torch.arange(3)}, torch.tensor([0, 1, 0]))
    inputs, targets = data.gather(torch.tensor([2, 0]))
    assert [len(bag) for bag in inputs["bag"]] == [3, 1]
    assert inputs["identity"].tolist() == [2, 0]
    assert targets.tolist() == [0, 0]
    sample, target = data[1]
    assert torch.equal(sample["bag"], bags[1])
    assert int(sample["identity"]) == int(target) == 1


@pytest.mark.parametrize(
    "inputs", [torch.zeros(3, 2), [torch.zeros(2)] * 3, {"a": torch.zeros(4), "b": torch.zeros(3)}]
)
def test_inputs_and_targets_must_agree(inputs: Any) -> None:
    with pytest.raises(ConfigurationError, match="3 inputs were given with 4 targets"):
        ArrayDataset(inputs, torch.zeros(4))


def test_one_index_operation_for_each_tensor() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[str] = []

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls.append(str(function))
            return function(*args, **(kwargs or {}))

    data = ArrayDataset(torch.randn(50, 3), torch.arange(50))
    indices = torch.arange(32)
    with Count() as count:
        data.gather(indices)
    assert count.calls == ["aten.index_select.default"] * 2


def test_a_copy_on_another_device_holds_everything() -> None:
    data = ArrayDataset([torch.zeros(2), torch.zeros(3)], torch.tensor([0, 1])).to("meta")
    assert data.targets.device.type == "meta"
    assert {item.device.type for item in data.inputs} == {"meta"}


class Squares(Dataset[Any]):
    random = True

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        assert index in range(4)
        return index * index


def test_a_part_passes_on_what_loaders_ask_for() -> None:
    part = Part(Squares(collate=sum), torch.tensor([3, 1]))
    assert [part[index] for index in range(len(part))] == [9, 1]
    assert part.random
    assert part.collate([1, 2]) == 3
    assert not hasattr(part, "gather")
    whole = ArrayDataset(torch.arange(5.0), torch.arange(5))
    view = Part(whole, torch.tensor([4, 2, 0]))
    assert view.gather(torch.tensor([1, 2]))[1].tolist() == [2, 0]
    assert not view.random


NUMBERS = [0, 2, 1, 1]


@pytest.mark.parametrize(
    "dataset",
    [
        ArrayDataset(torch.zeros(4, 1), torch.tensor(NUMBERS)),
        TensorDataset(torch.zeros(4, 1), torch.tensor(NUMBERS)),
        Squares(targets=NUMBERS),
        Squares(targets=np.array(NUMBERS)),
        Squares(labels=torch.tensor(NUMBERS, dtype=torch.uint8)),
        Squares(targets=["a", "b", "c", "d"], labels=NUMBERS),
    ],
)
def test_class_numbers_are_found_in_a_data_set_and_its_parts(dataset: Any) -> None:
    found = class_targets(dataset)
    assert found is not None
    assert found.tolist() == NUMBERS
    chosen = torch.tensor([3, 1])
    for part in (
        Part(dataset, chosen),
        Subset(dataset, [3, 1]),
        Part(Subset(dataset, [0, 3, 1]), torch.tensor([1, 2])),
    ):
        found = class_targets(part)
        assert found is not None
        assert found.tolist() == [1, 2]


@pytest.mark.parametrize(
    "dataset",
    [
        Squares(),
        Squares(targets=[0.5, 1.0, 2.0, 3.0]),
        Squares(targets=[0, 1]),
        Squares(targets=torch.zeros(4, 2, dtype=torch.int64)),
        TensorDataset(torch.zeros(4), torch.zeros(4)),
    ],
)
def test_what_is_no_class_number_is_not_taken_for_one(dataset: Any) -> None:
    assert class_targets(dataset) is None
    assert class_targets(Part(dataset, torch.tensor([1]))) is None
