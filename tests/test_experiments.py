"""What holds for each experiment: two processes train it together, and interrupted it ends at the same bits."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from catalogue.experiments import SMALL
from composed import checked
from rank_cases import Experiment, run_experiment
from ranks import run_ranks
from stabletrain.build import build
from stabletrain.errors import Interrupted
from stabletrain.trainer import Run, train
from trees import differences

# The experiments with parts of their own; of the others the parts are tested one by one.
EXPERIMENTS = ("direction", "bags", "clustering", "recommendation", "semantic_recommendation")
STOP = 3


def words(experiment: str, *more: str) -> tuple[str, ...]:
    batch = () if experiment == "bags" else ("batch_size=16",)
    small = ("epochs=1", "seed=5", "device=cpu", "tracking=none", "name=mine", *batch)
    return (f"experiment={experiment}", "preset=stable", *small, *SMALL.get(experiment, ()), *more)


def test_two_processes_train_each_experiment_and_agree_on_what_was_bad() -> None:
    faults = {name: "nan_part" if name == "bags" else "nan_input" for name in EXPERIMENTS}
    at = ("fault.at=2", "fault.samples=1")
    cases = [
        Experiment(words(name, "parallel=ddp", "checkpoint=none", f"fault={faults[name]}", *at)) for name in EXPERIMENTS
    ]
    for name, (first, second) in zip(EXPERIMENTS, run_ranks(run_experiment, 2, cases), strict=True):
        assert not list(differences(first, second)), name
        assert (first["status"], first["rejected"], first["salvaged"]) == ("completed", 0, 1), name
        assert len(first["quarantined"]) == 2, name  # one sample of each process's microbatch


def everything(run: Run) -> dict[str, Any]:
    parts = {"model": run.model, "optimizer": run.optimizer, "guard": run.guard, "progress": run.progress}
    parts |= {"loss": run.objective} if run.objective is not None else {}
    return {name: part.state_dict() for name, part in parts.items()}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_interrupted_experiment_ends_at_the_same_bits(experiment: str, tmp_path: Path) -> None:
    def built(folder: str) -> Run:
        return build(checked(*words(experiment)), tmp_path / folder)

    whole = built("whole")
    train(whole)

    run = built("halves")
    after = run.fault.after_update

    def stop(steps: int, model: Any, optimizer: Any) -> None:
        after(steps, model, optimizer)
        if run.progress.updates == STOP:
            signal.raise_signal(signal.SIGTERM)

    run.fault.after_update = stop  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        train(run)
    assert run.progress.updates < whole.progress.updates
    again = built("halves")
    train(again)
    assert not list(differences(everything(again), everything(whole)))
