"""Trees of tensors: mapping, visiting, moving."""

from __future__ import annotations

from collections import namedtuple

import torch

from stabletrain.tree import map_tensors, tensors, to_device

Pair = namedtuple("Pair", ["left", "right"])


def a_tree() -> dict[str, object]:
    one, two, three, four = (torch.full((2,), float(value)) for value in range(4))
    return {"list": [one, (two, "text")], "pair": Pair(three, None), "number": 7, "tensor": four}


def test_mapping_keeps_the_shape_of_the_tree_and_what_is_no_tensor() -> None:
    tree = map_tensors(lambda tensor: tensor + 10, a_tree())
    assert tree["number"] == 7
    assert tree["list"][1][1] == "text"
    assert isinstance(tree["list"], list)
    assert isinstance(tree["list"][1], tuple)
    assert isinstance(tree["pair"], Pair)
    assert tree["pair"].right is None
    assert torch.equal(tree["pair"].left, torch.full((2,), 12.0))


def test_mapping_leaves_the_tree_that_was_given_alone() -> None:
    tree = {"tensor": torch.zeros(2)}
    map_tensors(lambda tensor: tensor + 1, tree)
    assert torch.equal(tree["tensor"], torch.zeros(2))


def test_tensors_come_from_left_to_right() -> None:
    assert [float(tensor[0]) for tensor in tensors(a_tree())] == [0.0, 1.0, 2.0, 3.0]
    assert list(tensors("text")) == []


def test_moving_changes_the_device_of_every_tensor() -> None:
    moved = to_device(a_tree(), "meta")
    assert {tensor.device.type for tensor in tensors(moved)} == {"meta"}
