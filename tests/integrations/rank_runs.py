"""What each of two ranks does: the libraries' own data parallel training, with a NaN on one rank only."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from integrations.loops import Module, train_accelerate, train_huggingface, train_lightning
from integrations.parts import batches
from stabletrain.integrations import huggingface, lightning

STEPS, BAD_STEP, RANKS = 5, 2, 2


@dataclass(frozen=True)
class Run:
    """One training."""

    library: str
    accumulate: int = 1
    precision: str = "no"
    hole: bool = False  # whether the bad step is left out, as if it had never been


def train(run: Run) -> dict[str, Any]:
    """Train and return everything that this rank has in the end, and what it decided."""
    rank = dist.get_rank()
    # What torchrun would say.
    os.environ.update({"GROUP_RANK": "0", "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1"})
    os.environ.setdefault("MASTER_PORT", "29500")  # nothing listens there: the group is formed already
    each = RANKS * run.accumulate  # batches of a step on all ranks; they take them in turn
    window = range(BAD_STEP * each, (BAD_STEP + 1) * each)
    data = {"without": window} if run.hole else {"bad": [window[-1]]}  # the last one is rank 1's
    made = batches(STEPS * each, **data)
    with tempfile.TemporaryDirectory() as folder:
        if run.library == "lightning":
            callback = lightning.GuardCallback(max_norm=0.5)
            _, end = train_lightning(
                made[rank::RANKS],
                Module(),
                callback,
                strategy="ddp",
                devices=RANKS,
                use_distributed_sampler=False,
                accumulate_grad_batches=run.accumulate,
            )
            guard = callback.guard
        elif run.library == "huggingface":
            trained = huggingface.GuardCallback(max_norm=0.5)
            _, end = train_huggingface(Path(folder), made, trained, gradient_accumulation_steps=run.accumulate)
            assert trained.guard is not None
            guard = trained.guard
        else:
            guard, end = train_accelerate(made, norm=True, accumulate=run.accumulate, precision=run.precision)
    return {"reasons": dict(guard.stats.reasons), "applied": guard.stats.applied, "end": end}
