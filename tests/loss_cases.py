"""Every loss with outputs and targets that it can be called with, for tests that ask the same of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from composed import Clusters, EachStep, Samples
from stabletrain.assembly import assemble
from stabletrain.data import ArrayDataset, Splits
from stabletrain.errors import ConfigurationError
from stabletrain.loss import (
    BPR,
    CTC,
    TEMI,
    BinaryCrossEntropy,
    BinaryFocalLoss,
    CrossEntropy,
    Dice,
    FocalLoss,
    GaussianNLL,
    Huber,
    InfoNCE,
    KLDivergence,
    Loss,
    MeanSquaredError,
    SupervisedContrastive,
    WeightedCrossEntropy,
    ZLoss,
)
from stabletrain.parallel import DataParallel
from stabletrain.task import Supervised
from stabletrain.tracking import Tracker
from stabletrain.trainer import Run, train
from stabletrain.trainer.step import begin_step

IGNORED = 9
Draw = Callable[..., Tensor]


@dataclass
class Case:
    """A loss and what it is called with.

    Attributes:
        loss: made anew for each call, as it may have a memory.
        outputs: the shape of each output tensor, without the samples.
        targets: from (samples, generator), how targets are drawn; None: the loss looks at none.
        ignores: whether a label may be ignored.
    """

    loss: Callable[[], Loss]
    outputs: tuple[tuple[int, ...], ...]
    targets: Callable[[int, torch.Generator], Any]
    ignores: bool = False

    def call(self, tensors: list[Tensor], targets: Any, loss: Loss | None = None) -> tuple[Tensor, Tensor | None]:
        """Return what the loss returns for these outputs."""
        outputs = tensors[0] if len(tensors) == 1 else tuple(tensors)
        return (loss or self.loss())(outputs, targets)


def labels(classes: int, *places: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda samples, generator: torch.randint(classes, (samples, *places), generator=generator)


def shares(classes: int) -> Callable[[int, torch.Generator], Tensor]:
    """Distributions, every second one certain: probabilities of exactly 0 and 1."""

    def draw(samples: int, generator: torch.Generator) -> Tensor:
        soft = torch.rand(samples, classes, generator=generator, dtype=torch.float64).softmax(1)
        hard = torch.nn.functional.one_hot(labels(classes)(samples, generator), classes).double()
        return torch.where(torch.arange(samples)[:, None] % 2 == 0, hard, soft)

    return draw


def numbers(*places: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda samples, generator: torch.randn(samples, *places, generator=generator, dtype=torch.float64)


def nothing(samples: int, generator: torch.Generator) -> None:
    return None


def spoken(samples: int, generator: torch.Generator) -> Tensor:
    words = 1 + labels(3, 3)(samples, generator)
    return torch.where(torch.arange(3) < 1 + labels(3)(samples, generator)[:, None], words, -1)


CASES: dict[str, Case] = {
    "cross_entropy": Case(lambda: CrossEntropy(ignore_index=IGNORED), ((4,),), labels(4), ignores=True),
    "cross_entropy of shares": Case(CrossEntropy, ((4,),), shares(4)),
    "cross_entropy of places": Case(
        lambda: CrossEntropy(ignore_index=IGNORED), ((4, 3, 2),), labels(4, 3, 2), ignores=True
    ),
    "smoothed": Case(lambda: CrossEntropy(0.1, IGNORED), ((4,),), labels(4), ignores=True),
    "weighted": Case(
        lambda: WeightedCrossEntropy([5, 1, 0, 2], ignore_index=IGNORED), ((4,),), labels(4), ignores=True
    ),
    "focal": Case(lambda: FocalLoss(2.0, [1, 2, 3, 4], ignore_index=IGNORED), ((4,),), labels(4), ignores=True),
    "mild focal": Case(lambda: FocalLoss(0.3), ((4,),), labels(4)),
    "focal of shares": Case(lambda: FocalLoss(1.5), ((4,),), shares(4)),
    "bce": Case(lambda: BinaryCrossEntropy(2.0, ignore_index=IGNORED), ((3,),), labels(2, 3), ignores=True),
    "binary_focal": Case(lambda: BinaryFocalLoss(0.5, 0.25, ignore_index=IGNORED), ((1,),), labels(2), ignores=True),
    "dice": Case(lambda: Dice(ignore_index=IGNORED), ((3, 5),), labels(3, 5), ignores=True),
    "binary dice": Case(lambda: Dice(ignore_index=IGNORED), ((1, 5),), labels(2, 5), ignores=True),
    "mse": Case(MeanSquaredError, ((3,),), numbers(3)),
    "huber": Case(Huber, ((1,),), numbers()),
    "gaussian_nll": Case(GaussianNLL, ((), ()), numbers()),
    "gaussian_nll of variances": Case(lambda: GaussianNLL(log_variance=False), ((2, 3),), numbers(3)),
    "bpr": Case(BPR, ((), (5,)), nothing),
    "info_nce": Case(InfoNCE, ((6,), (6,)), nothing),
    "supervised_contrastive": Case(
        lambda: SupervisedContrastive(ignore_index=IGNORED), ((2, 6),), labels(2), ignores=True
    ),
    "kl": Case(KLDivergence, ((4,),), shares(4)),
    "kl of logits": Case(lambda: KLDivergence(2.0, target_logits=True), ((4,),), numbers(4)),
    "ctc": Case(CTC, ((7, 4),), spoken),
    "temi": Case(lambda: TEMI(4, heads=3), ((2, 3, 4), (2, 3, 4)), nothing),
    "z_loss": Case(lambda: ZLoss(FocalLoss(ignore_index=IGNORED), 1e-2), ((4,),), labels(4), ignores=True),
}


def memory_on_ranks(folder: str) -> dict[str, Any]:
    """Train TEMI on this rank, and say what its marginal is where all ranks must have one; for `run_ranks`."""
    data = Splits(ArrayDataset(Samples("views").inputs, Samples("views").answers))

    def made(loss: Loss, model: nn.Module) -> Run:
        task, quiet = Supervised(loss), partial(Tracker, tables=False, tensorboard=False, progress="none")
        return assemble(model, data, epochs=1, batch_size=12, task=task, parallel=DataParallel(), tracking=quiet)

    run = made(TEMI(3, heads=2), Clusters())
    train(run)
    found = {"after training": run.objective.marginal.clone()}
    begin_step(run)
    found["in a step"] = run.objective.marginal.clone()
    run.objective.marginal.mul_(1 + run.ranks.rank)
    run.same_buffers()
    found["to be saved"] = run.objective.marginal.clone()
    try:
        made(InfoNCE(learnable=True), EachStep())
    except ConfigurationError as error:
        found["said"] = str(error)
    return found
