"""The quarantine: what is left out and when, what is written down about it, and lists from other runs."""

from __future__ import annotations

import json
import os
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from stabletrain import ConfigurationError
from stabletrain.data import ArrayDataset, Loader
from stabletrain.quarantine import Quarantine, what_is_odd
from stabletrain.state import Stateful

NAN, INF = float("nan"), float("inf")


def test_what_is_found_is_left_out_from_the_next_epoch_on() -> None:
    quarantine = Quarantine()
    quarantine.begin_epoch()
    quarantine.add(3, epoch=0, step=2)
    quarantine.add(14, epoch=0, step=5)
    assert quarantine.frozen == frozenset()
    assert sorted(quarantine.found) == [3, 14]
    quarantine.begin_epoch()
    quarantine.add(15, epoch=1, step=0)
    assert quarantine.frozen == {3, 14}


def test_the_loader_leaves_out_what_is_frozen() -> None:
    loader = Loader(ArrayDataset(torch.arange(12.0), torch.arange(12)), batch_size=2, seed=1)
    quarantine = Quarantine()
    quarantine.add(3, epoch=0, step=2)
    quarantine.add(4, epoch=0, step=2)
    quarantine.begin_epoch()
    seen = [index for step in loader.epoch(1, excluded=quarantine.frozen) for index in step[0].indices.tolist()]
    assert seen == [index for index in loader.order(1).tolist() if index not in (3, 4)]


def test_the_first_note_about_a_sample_stays() -> None:
    quarantine = Quarantine()
    quarantine.add(3, epoch=0, step=2, sample=torch.tensor([NAN, 1.0]))
    quarantine.add(3, epoch=1, step=7, sample=torch.tensor([INF, 1.0]))
    assert list(quarantine.found.values()) == [
        {"index": 3, "epoch": 0, "step": 2, "odd": "sample: 1 of 2 elements NaN"}
    ]


def test_the_limit_is_on_what_this_run_found(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[0, 1, 2, 3]")
    quarantine = Quarantine()
    quarantine.take(tmp_path / "list.json", total=100)
    assert quarantine.share(100) == 0.0
    for index in range(10, 15):
        quarantine.add(index, epoch=0, step=0)
    quarantine.add(2, epoch=0, step=0)
    assert quarantine.share(100) == 0.05
    assert not quarantine.exceeds(0.05, 100)
    quarantine.add(15, epoch=0, step=0)
    assert quarantine.exceeds(0.05, 100)


def test_state_comes_back_through_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text('{"indices": [1]}')
    quarantine = Quarantine()
    quarantine.take(tmp_path / "list.json", total=20)
    quarantine.begin_epoch()
    quarantine.add(9, epoch=0, step=4, sample=torch.tensor([INF]))
    torch.save(quarantine.state_dict(), tmp_path / "state.pt")
    other = Quarantine()
    assert isinstance(other, Stateful)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (other.found, other.frozen, other.share(20)) == (quarantine.found, {1}, 0.05)
    other.begin_epoch()
    assert other.frozen == {1, 9}
    assert quarantine.frozen == {1}


def test_a_list_goes_from_run_to_run(tmp_path: Path) -> None:
    quarantine = Quarantine()
    quarantine.add(14, epoch=0, step=4, sample=(torch.tensor([NAN, 0.0]), torch.tensor(1)))
    quarantine.add(3, epoch=1, step=0, sample=(torch.tensor([1.0, 0.0]), torch.tensor(NAN)))
    quarantine.write(tmp_path / "quarantine.json")
    assert json.loads((tmp_path / "quarantine.json").read_text()) == {
        "indices": [3, 14],
        "samples": [
            {"index": 14, "epoch": 0, "step": 4, "odd": "inputs: 1 of 2 elements NaN"},
            {"index": 3, "epoch": 1, "step": 0, "odd": "label: NaN"},
        ],
    }
    other = Quarantine()
    other.take(tmp_path / "quarantine.json", total=15)
    assert other.found == {index: quarantine.found[index] for index in (3, 14)}
    other.add(5, epoch=0, step=1)
    other.write(tmp_path / "other.json")
    assert json.loads((tmp_path / "other.json").read_text())["indices"] == [3, 5, 14]
    assert sorted(os.listdir(tmp_path)) == ["other.json", "quarantine.json"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "isn't JSON"),
        ("3", "no list of whole numbers"),
        ('{"samples": []}', "no list of whole numbers"),
        ('{"indices": [1.5]}', "no list of whole numbers"),
        ("[-1]", "no list of whole numbers"),
        ("[true]", "no list of whole numbers"),
        ('{"indices": [1], "samples": [{"odd": ""}]}', "`samples` without an `index`"),
        ('{"indices": [1], "samples": {"1": ""}}', "`samples` without an `index`"),
        ("[1, 20]", "names sample 20, but the training part has 20 samples"),
        (None, "can't be read: No such file"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused(content: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    if content is not None:
        path.write_text(content)
    quarantine = Quarantine()
    with pytest.raises(ConfigurationError, match=said):
        quarantine.take(path, total=20)
    assert quarantine.found == {}


Pair = namedtuple("Pair", ["image", "text"])
ODD = torch.tensor([NAN, 1.0, 1.0, 1e7])
BIG = torch.tensor([1.0, 2.0, 1.0, 1e7])


@pytest.mark.parametrize(
    ("sample", "odd"),
    [
        ((torch.tensor([[1.0, NAN, -INF]]), torch.tensor([0])), "inputs: 1 of 3 elements NaN, 1 of 3 Inf"),
        ((torch.tensor([INF]), torch.tensor(NAN)), "inputs: Inf; label: NaN"),
        (([torch.tensor([NAN, 1.0])], torch.tensor([1])), "inputs: 1 of 2 elements NaN"),
        (([torch.ones(2), torch.tensor([NAN, 1.0])], 1), "inputs[1]: 1 of 2 elements NaN"),
        ({"a": {"b": torch.tensor([NAN, NAN])}, "c": 1.0}, "a.b: 2 of 2 elements NaN"),
        (Pair(torch.tensor([NAN, 1.0]), "text"), "image: 1 of 2 elements NaN"),
        ((Pair(torch.tensor([NAN, 1.0]), "text"), 1), "inputs.image: 1 of 2 elements NaN"),
        (torch.tensor([1.0, NAN], dtype=torch.float16), "sample: 1 of 2 elements NaN"),
        (torch.sparse_coo_tensor([[1]], [NAN], (4,), check_invariants=True), "sample: NaN"),
        ((BIG, 0), "inputs: largest magnitude 1e+07, 1e+07 times the median"),
        ((-1e6 * torch.ones(4), 0), "inputs: largest magnitude 1e+06"),
        ({"x": ODD}, "x: 1 of 4 elements NaN, largest magnitude 1e+07, 1e+07 times the median"),
        (torch.tensor([[0.0, 0.0, 0.0, 5.0]]), "nothing can be seen in the sample itself"),
        (torch.arange(100), "nothing can be seen in the sample itself"),
        (torch.zeros(0), "nothing can be seen in the sample itself"),
        (None, "nothing can be seen in the sample itself"),
        ("text", "nothing can be seen in the sample itself"),
    ],
)  # fmt: skip
def test_what_is_odd_is_said(sample: Any, odd: str) -> None:
    assert what_is_odd(sample) == odd


def test_a_normal_sample_is_not_odd() -> None:
    assert what_is_odd((torch.randn(3, 64, 64), 3)) == "nothing can be seen in the sample itself"
