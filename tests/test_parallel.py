"""The trainer on several ranks: the same run as on one, whatever goes bad and wherever it goes on."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from processes import ENVIRONMENT, started
from rank_cases import Training, run_training
from ranks import run_ranks
from stabletrain.checkpoint import CheckpointStore
from stabletrain.errors import ConfigurationError
from stabletrain.fault import NanGradient, NanWeight, Spike
from stabletrain.guard import Policy
from stabletrain.parallel import DataParallel, FullySharded, SingleProcess
from stabletrain.precision import Ladder

LADDER = partial(Ladder, stable_epochs=1, watch_updates=6)
SALVAGE = Policy(on_rejection="salvage", spikes=True)
ROLLBACK = Policy(on_rejection="rollback", spikes=True, snapshot_every=3, rewarm=3)
# What one process does with two microbatches, two ranks do with one each; bit for bit, since halving is exact. Where
# the weights aren't known before (class weights, and what a salvage leaves), the gradients are corrected once they are:
# from the weight of the first microbatch in one process, from the number of samples on several. That rounds otherwise.
SAME_AS_ONE_PROCESS = {
    "plain": Training(),
    "class weights": Training(weighted=True),
    "average of weights": Training(ema=True),
    "bfloat16": Training(precision="bfloat16"),
    "float16": Training(precision="float16"),
    "a ladder of precision": Training(ladder=LADDER, epochs=6, fault=NanGradient(at=10)),
    "bad inputs are salvaged": Training(guard=SALVAGE, bad=(3, 40)),
    "hidden ones too": Training(guard=SALVAGE, hidden=(5, 41)),
    "both, in the same microbatches": Training(guard=SALVAGE, bad=(3, 40), hidden=(5, 41), accumulate=2),
    "skipped": Training(bad=(3, 40)),
    "a spike": Training(guard=SALVAGE, epochs=4, fault=Spike(at=15)),
    "a gradient that passes": Training(guard=SALVAGE, fault=NanGradient(at=4)),
    "ruined weights are rolled back": Training(guard=ROLLBACK, epochs=3, fault=NanWeight(at=8)),
    "scanned": Training(guard=replace(ROLLBACK, scan=True), bad=(3, 40)),
}


def equal(one: Any, other: Any, tolerance: float = 0.0) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) if tolerance == 0 else torch.allclose(one, other, rtol=tolerance, atol=tolerance)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name], tolerance) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other, [tolerance] * len(one)))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=max(tolerance, 1e-9)) or (math.isnan(one) and math.isnan(other))
    return bool(one == other)


@pytest.fixture(scope="module")
def two_ranks() -> dict[str, list[dict[str, Any]]]:
    names = list(SAME_AS_ONE_PROCESS)
    return dict(zip(names, run_ranks(run_training, 2, [SAME_AS_ONE_PROCESS[name] for name in names]), strict=True))


@pytest.mark.parametrize("name", SAME_AS_ONE_PROCESS)
def test_two_ranks_are_one_process_with_twice_the_microbatches(
    name: str, two_ranks: dict[str, list[dict[str, Any]]]
) -> None:
    training = SAME_AS_ONE_PROCESS[name]
    alone = run_training(replace(training, parallel="none", accumulate=2 * training.accumulate))
    tolerance = 1e-5 if training.weighted or alone["summary"]["salvaged"] else 0.0
    for rank, left in enumerate(two_ranks[name]):
        assert equal(left["model"], two_ranks[name][0]["model"])
        for part in ("model", "optimizer", "ema", "progress", "ledger", "quarantined", "summary", "moves"):
            assert equal(left[part], alone[part], tolerance), (rank, part, left[part], alone[part])


def test_what_the_cases_are_about(two_ranks: dict[str, list[dict[str, Any]]]) -> None:
    summaries = {name: left[0]["summary"] for name, left in two_ranks.items()}
    assert all(summary["status"] == "completed" for summary in summaries.values())
    assert [summaries[name]["salvaged"] for name in SAME_AS_ONE_PROCESS if "salvaged" in name or "hidden" in name]
    assert two_ranks["bad inputs are salvaged"][0]["quarantined"] == [3, 40]
    assert two_ranks["hidden ones too"][0]["quarantined"] == [5, 41]
    assert two_ranks["both, in the same microbatches"][0]["quarantined"] == [3, 5, 40, 41]
    assert two_ranks["scanned"][0]["quarantined"] == [3, 40]
    assert summaries["skipped"]["rejected"] > 0
    assert [move["rung"] for move in two_ranks["a ladder of precision"][0]["moves"]] == [1, 0, 1]
    assert summaries["a spike"]["rejected"] == 1
    assert summaries["ruined weights are rolled back"]["rolled_back"] == 1


def test_sharded_ranks_learn_the_same_and_salvage_what_can_be_seen() -> None:
    cases = [
        Training(parallel="fsdp2"),
        Training(parallel="fsdp2", guard=SALVAGE, bad=(3, 40)),
        Training(parallel="fsdp2", guard=SALVAGE, hidden=(41,), epochs=1),
        Training(parallel="fsdp2", guard=ROLLBACK, epochs=3, fault=NanWeight(at=8)),
    ]
    plain, seen, hidden, back = run_ranks(run_training, 2, cases)
    alone = run_training(Training(parallel="none", accumulate=2))
    whole = run_ranks(run_training, 2, [replace(cases[1], parallel="ddp"), replace(cases[3], parallel="ddp")])
    for rank in (0, 1):
        for part in ("model", "optimizer", "summary"):
            assert equal(plain[rank][part], alone[part], tolerance=1e-5), part
            assert equal(plain[rank][part], plain[0][part])
        assert seen[rank]["quarantined"] == [3, 40]
        assert seen[rank]["summary"]["rejected"] == 0
        assert equal(seen[rank]["model"], whole[0][rank]["model"], tolerance=1e-5)
        # No rank can try samples alone there, so the step is skipped.
        assert (hidden[rank]["summary"]["rejected"], hidden[rank]["summary"]["salvaged"]) == (1, 0)
        assert back[rank]["summary"]["rolled_back"] == 1
        assert equal(back[rank]["model"], whole[1][rank]["model"], tolerance=1e-5)


def test_every_clipping_clips_the_same_on_ranks_and_shards() -> None:
    names = ("agc", "autoclip", "zclip", "adagc")
    ways = [Training(clipping=name, parallel=way, bad=(3,)) for name in names for way in ("ddp", "fsdp2")]
    found = iter(run_ranks(run_training, 2, ways))
    for name in names:
        alone = run_training(Training(clipping=name, parallel="none", accumulate=2, bad=(3,)))
        assert alone["summary"]["rejected"] > 0
        for exact, ranks in ((True, next(found)), (False, next(found))):
            for left in ranks:
                for part in ("model", "optimizer", "ledger", "clipping"):
                    tolerance = 0.0 if exact else 1e-4
                    assert equal(left[part], alone[part], tolerance), (name, exact, part)
                assert equal(left["clipping"], ranks[0]["clipping"])  # bit for bit: they decide together


def test_four_ranks_with_batch_norm_stay_together() -> None:
    training = Training(guard=SALVAGE, bad=(3, 40), hidden=(5, 41), batch_norm=True, epochs=4)
    [ranks] = run_ranks(run_training, 4, [training])
    for left in ranks:
        assert left["quarantined"] == [3, 5, 40, 41]
        assert left["summary"] == ranks[0]["summary"]
        assert equal(left["model"], ranks[0]["model"])
        assert equal(left["optimizer"], ranks[0]["optimizer"])


@pytest.mark.parametrize(("before", "after", "exact"), [
    (("ddp", 2), ("none", 1), True),
    (("none", 1), ("ddp", 2), True),
    (("fsdp2", 2), ("ddp", 4), False),
    (("ddp", 2), ("fsdp2", 2), False),
])  # fmt: skip
def test_a_run_goes_on_with_another_number_of_ranks(
    before: tuple[str, int], after: tuple[str, int], exact: bool, tmp_path: Path
) -> None:
    most = max(before[1], after[1])
    whole = Training(parallel="none", accumulate=most, ema=True, folder=str(tmp_path / "whole"), every_updates=2)
    run_training(whole)

    def under(parallel: str, size: int, **options: Any) -> list[dict[str, Any]]:
        training = replace(whole, parallel=parallel, accumulate=most // size, folder=str(tmp_path / "parts"), **options)
        return [run_training(training)] if parallel == "none" else run_ranks(run_training, size, [training])[0]

    stopped = under(*before, stop_at=5)
    assert all(left["said"].startswith("Interrupted: SIGTERM") for left in stopped)
    assert CheckpointStore(tmp_path / "parts").latest() is not None
    resumed = under(*after)
    uninterrupted = run_training(replace(whole, folder=None))
    for left in resumed:
        assert left["summary"]["status"] == "completed"
        for part in ("model", "optimizer", "ema", "progress", "ledger"):
            assert equal(left[part], uninterrupted[part], tolerance=0.0 if exact else 1e-4), part
    if exact:
        for table in ("history.csv", "steps.csv"):
            assert (tmp_path / "parts" / table).read_bytes() == (tmp_path / "whole" / table).read_bytes()


def test_one_rank_writes_and_each_step_is_rejected_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    [ranks] = run_ranks(run_training, 2, [Training(hidden=(5, 41), folder=str(folder))])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["rejected"] == ranks[0]["summary"]["rejected"] == ranks[1]["summary"]["rejected"] > 0
    incidents = sorted((folder / "incidents").iterdir())
    assert len(incidents) == summary["incidents"] == summary["rejected"]
    for incident in incidents:  # written by the process that has the bad sample, and names what that one saw
        verdict = json.loads((incident / "verdict.json").read_text())
        assert {5, 41} & {index for indices in verdict["indices"] for index in indices}, verdict["indices"]
    rejected = [line for line in (folder / "steps.csv").read_text().splitlines() if line.endswith("loss")]
    assert len(rejected) == summary["rejected"]


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match=r"timeout_minutes is 0; give a number above 0"):
        DataParallel(timeout_minutes=0)
    with pytest.raises(ConfigurationError, match=r"min_parameters is -1; give a whole number from 0"):
        FullySharded(min_parameters=-1)
    with pytest.raises(ConfigurationError, match=r"sync_batchnorm=true needs GPUs"):
        DataParallel(sync_batchnorm=True).join(torch.device("cpu"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match=r"parallel=none under a launcher with 2 processes.*parallel=ddp"):
        SingleProcess().join(torch.device("cpu"))


MEETS = """
import os, sys, time
import torch, torch.distributed as dist
from stabletrain.parallel import DataParallel
time.sleep(float(sys.argv[1]))
group = DataParallel(timeout_minutes=0.5)
group.join(torch.device("cpu"))
total = torch.ones(())
dist.all_reduce(total)
print(int(total), flush=True)
if sys.argv[2] == "dies":
    os.kill(os.getpid(), 9)
group.leave()
"""


def test_ranks_that_are_started_again_do_not_meet_those_that_died() -> None:
    """Torchrun keeps its store over restarts, with the addresses of the processes before in it."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launcher = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    for attempt, late in enumerate((0, 1, 0)):
        with ExitStack() as stack:
            ranks = []
            for rank in range(2):
                variables = {"RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": str(attempt)}
                environment = {**ENVIRONMENT, **launcher, **variables, "TORCHELASTIC_USE_AGENT_STORE": "True"}
                words = [sys.executable, "-c", MEETS, "2" if rank == late else "0", "dies" if attempt < 2 else "ends"]
                ranks.append(stack.enter_context(started(words, environment=environment, stdout=subprocess.PIPE)))
            assert [process.communicate(timeout=60)[0] for process in ranks] == ["2\n", "2\n"]
