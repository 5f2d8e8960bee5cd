"""One decision for all ranks: whatever goes bad on one of them, the step is rejected everywhere and leaves no trace."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rank_cases import BAD_STEP, STEPS, Case, train
from ranks import run_ranks
from stabletrain.collectives import Ranks

PLACES = ("input", "forward", "loss", "gradient", "buffer", "spike")
VALUES = {"spike": 1e7}
REASONS = {
    "overflow": "overflow",
    "input": "loss",
    "forward": "loss",
    "loss": "loss",
    "gradient": "gradient",
    "buffer": "buffer",
    "spike": "spike",
}
CASES = [
    *((2, Case(place, VALUES.get(place, math.nan))) for place in PLACES),
    *((2, Case(place, VALUES.get(place, math.nan), wrapper="fsdp2")) for place in PLACES),
    *((4, Case(place, VALUES.get(place, math.inf), rank=2, accumulate=2)) for place in PLACES),
    *((2, Case(place, VALUES.get(place, math.nan), rank=0, on_device=True)) for place in PLACES),
    (4, Case("loss", rank=3, wrapper="fsdp2", accumulate=2)),
    (4, Case("gradient", rank=1, wrapper="fsdp2", on_device=True)),
    (2, Case("loss", precision="fp16")),
    (2, Case("loss", precision="fp16", on_device=True)),
    (2, Case("input", precision="fp16", wrapper="fsdp2")),
    (2, Case("buffer", precision="bf16", rank=0)),
    *((2, Case("overflow", 1e38, precision="fp16", wrapper=wrapper)) for wrapper in ("ddp", "fsdp2")),
    (2, Case("overflow", 1e38, precision="fp16", on_device=True)),
    (2, Case("overflow", 1e38, precision="fp16", wrapper="fsdp2", on_device=True)),
]


@functools.cache
def outcomes(size: int) -> dict[Case, list[dict[str, Any]]]:
    """Return what every case of so many ranks left behind, with the fault and with a hole in its place."""
    cases = [case for ranks, case in CASES if ranks == size]
    cases += [replace(case, hole=True) for case in cases]
    return dict(zip(cases, run_ranks(train, size, cases), strict=True))


def name_of(case: Any) -> str:
    if isinstance(case, Case):
        options = [case.place, str(case.value), f"rank {case.rank}", case.wrapper, case.precision]
        return "-".join([*options, f"x{case.accumulate}", "device" if case.on_device else "host"])
    return f"{case} ranks"


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    return bool(one == other)


@pytest.mark.parametrize(("size", "case"), CASES, ids=name_of)
def test_a_step_that_is_bad_on_one_rank_never_happened(size: int, case: Case) -> None:
    bad, hole = outcomes(size)[case], outcomes(size)[replace(case, hole=True)]

    for number, (left, never) in enumerate(zip(bad, hole, strict=True)):
        assert left["reasons"] == [None] * BAD_STEP + [REASONS[case.place]] + [None] * (STEPS - BAD_STEP - 1), number
        assert never["reasons"] == [None] * (STEPS - 1)
        same_scale = [] if case.place == "overflow" else ["scaler"]
        assert same(left["scaler"], bad[0]["scaler"])
        assert not left["scaler"] or left["scaler"]["scale"] == (128.0 if same_scale else 64.0)
        for part in ("model", "optimizer", "rate", *same_scale, "applied"):
            assert same(left[part], never[part]), (part, number)
        # Running statistics are each rank's own between two forwards; all else is common.
        names = [name for name in left["model"] if "running" not in name]
        assert all(torch.equal(left["model"][name], bad[0]["model"][name]) for name in names)
        assert same(left["optimizer"], bad[0]["optimizer"])
        assert all(torch.isfinite(tensor).all() for tensor in left["model"].values())
    if REASONS[case.place] in ("loss", "buffer") and not case.on_device:
        assert all(left["details"][BAD_STEP].startswith(f"rank {case.rank}: ") for left in bad)


def test_the_loss_that_is_reported_is_the_mean_over_the_ranks() -> None:
    on_host, on_device = run_ranks(train, 2, [Case("none"), Case("none", on_device=True)])
    for left in (on_host, on_device):
        assert left[0]["losses"] == left[1]["losses"]
        own = torch.tensor([rank["own losses"] for rank in left])
        assert torch.allclose(torch.tensor(left[0]["losses"]), own.mean(0), rtol=1e-6)
        assert not torch.equal(own[0], own[1])


@given(st.lists(st.booleans(), min_size=6, max_size=6), st.floats(width=32))
def test_alone_what_is_agreed_is_what_was_found(faults: list[bool], loss: float) -> None:
    mean, found = Ranks().agree(torch.tensor(loss), torch.tensor(faults))
    assert found.tolist() == faults
    assert float(mean) == (loss if math.isfinite(loss) else 0.0)


class Recorded(Ranks):
    """Ranks of which only the packets are known."""

    def __init__(self, packets: list[torch.Tensor], size: int) -> None:
        super().__init__()
        self.size, self.packets = size, packets

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        self.packets.append(tensor)
        return torch.stack(self.packets).sum(0)


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=40), st.integers(1, 100))
def test_counts_of_many_ranks_stay_apart(flags: list[list[bool]], repeated: int) -> None:
    many = flags * repeated
    packets: list[torch.Tensor] = []
    ranks = Recorded(packets, len(many))
    found = torch.zeros(0)
    for rank in many:
        _, found = ranks.agree(torch.tensor(1.0), torch.tensor(rank))
    assert packets[0].numel() * packets[0].element_size() == 16
    assert found.tolist() == [any(column) for column in zip(*many, strict=True)]
