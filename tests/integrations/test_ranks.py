"""Two ranks, one of which has a NaN: both leave the step out, and no trace of it is left on either."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from guard.worlds import differences, nonfinite
from integrations.rank_runs import RANKS, STEPS, Run, train
from ranks import run_ranks

RUNS = [Run(library, accumulate) for library in ("lightning", "huggingface", "accelerate") for accumulate in (1, 4)]
RUNS.append(Run("accelerate", precision="fp16"))


@functools.cache
def outcomes() -> dict[Run, list[dict[str, Any]]]:
    runs = [replace(run, hole=hole) for run in RUNS for hole in (False, True)]
    return dict(zip(runs, run_ranks(train, RANKS, runs), strict=True))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.library}-{run.accumulate}-{run.precision}")
def test_a_step_that_is_bad_on_one_rank_never_happened(run: Run) -> None:
    bad, hole = outcomes()[run], outcomes()[replace(run, hole=True)]
    for one, other in zip(bad, hole, strict=True):
        assert one["reasons"] == {"loss": 1} and other["reasons"] == {}
        assert one["applied"] == other["applied"] == STEPS - 1
        assert not nonfinite(one["end"])
        assert not differences(one["end"], other["end"])
    common = [name for name in bad[0]["end"] if name.startswith(("model", "optimizer")) and "running" not in name]
    assert len(common) > 10
    for name in common:
        one, other = (rank["end"][name] for rank in bad)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, name
