"""A learning rate 100 times too high on digits: without a guard, with `skip`, with `rollback`, against the right rate.

    python benchmarks/too_high_rate.py find [--seeds 0 1] [--epochs 20]
    python benchmarks/too_high_rate.py compare [--seeds 0 1 2 3 4] [--epochs 20] [--rates adamw,norm=3e-3 ...]

`find` looks for the right rate of each optimizer, with and without clipping: the one of the best validation accuracy,
at equality the best validation loss. `compare` trains at 100 times that rate. Runs in one process, one after another.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from stabletrain import UnstableTraining
from stabletrain.build import build
from stabletrain.config import conf_folder, settings
from stabletrain.trainer import evaluate, train

GRID = {"adamw": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "sgd": (1e-2, 3e-2, 0.1, 0.3, 1.0)}
CLIPPINGS = ("norm", "none")
TOO_HIGH = 100.0


def trained(*given: str) -> tuple[dict[str, float], dict[str, float], str]:
    """Train one run; return its validation and test metrics with the last weights, and how it ended."""
    fixed = ["precision=fp32", "tracking=none", "checkpoint=none", "log_every=1000000", "device=cpu"]
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())), tempfile.TemporaryDirectory() as at:
        run = build(settings(compose("config", overrides=[*fixed, *given])), Path(at, "run"))
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                train(run)
            ended = "completed"
        except UnstableTraining:
            ended = "stopped"
        ended += f", {run.rollback.count} rollbacks" if run.rollback is not None else ""
        ended += f", {run.guard.ledger.rejected} rejected"
        assert run.validation is not None and run.test is not None
        return evaluate(run, run.validation), evaluate(run, run.test), ended


def variants() -> Iterator[tuple[str, str]]:
    """Go through the optimizers, each with and without clipping."""
    for optimizer in GRID:
        for clipping in CLIPPINGS:
            yield optimizer, clipping


def find(seeds: list[int], epochs: int) -> None:
    """Print the validation accuracy of each rate, and which is the right one."""
    for optimizer, clipping in variants():
        found = []
        for rate in GRID[optimizer]:
            measured = [
                trained(f"optimizer={optimizer}", f"clipping={clipping}", "guard=none", f"base_lr={rate}",
                        f"seed={seed}", f"epochs={epochs}")[0]
                for seed in seeds
            ]  # fmt: skip
            accuracy, loss = (statistics.median(one[name] for one in measured) for name in ("accuracy", "loss"))
            found.append((accuracy, -loss, rate))
            print(f"{optimizer:6s} {clipping:5s} {rate:8.0e}  {accuracy:7.2%}  loss {loss:.4f}", flush=True)
        print(f"right: {optimizer},{clipping}={max(found)[2]:g}", flush=True)


def compare(seeds: list[int], epochs: int, rates: list[str]) -> None:
    """Print test accuracies at the right rate and at 100 times it."""
    print("test accuracy, median (least to most) of the seeds")
    for given in rates:
        name, _, right = given.partition("=")
        optimizer, _, clipping = name.partition(",")
        chosen = [f"optimizer={optimizer}", f"clipping={clipping}", f"epochs={epochs}"]
        for factor, guard in ((1.0, "none"), *((TOO_HIGH, guard) for guard in ("none", "skip", "rollback"))):
            results = [
                trained(*chosen, f"guard={guard}", f"base_lr={factor * float(right)}", f"seed={seed}") for seed in seeds
            ]
            found = [test["accuracy"] for _, test, _ in results]
            print(
                f"{optimizer} {clipping:5s} rate {factor * float(right):<8g} {guard:9s} "
                f"{statistics.median(found):7.2%} ({min(found):.2%} to {max(found):.2%})  "
                f"{'; '.join(ended for _, _, ended in results)}",
                flush=True,
            )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("find", "compare"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument(
        "--rates", nargs="+", default=["adamw,norm=3e-3", "adamw,none=3e-3", "sgd,norm=0.1", "sgd,none=0.1"]
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    if arguments.what == "find":
        find(arguments.seeds, arguments.epochs)
    else:
        compare(arguments.seeds, arguments.epochs, arguments.rates)


if __name__ == "__main__":
    main()
