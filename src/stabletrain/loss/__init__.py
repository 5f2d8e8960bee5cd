"""Losses: each returns one value a sample and one weight a sample, computed in float32 whatever comes in.

Whoever calls a loss sums both and divides, so that microbatches and ranks of unequal weight still give the exact mean.
Samples to be ignored have the loss 0 and the weight 0, so that they, and an empty batch, have no gradient.
"""

from stabletrain.loss.base import MODES, Loss
from stabletrain.loss.binary import BinaryCrossEntropy
from stabletrain.loss.contrastive import InfoNCE, SupervisedContrastive
from stabletrain.loss.cross_entropy import CrossEntropy, WeightedCrossEntropy
from stabletrain.loss.ctc import CTC
from stabletrain.loss.dice import Dice
from stabletrain.loss.focal import BinaryFocalLoss, FocalLoss
from stabletrain.loss.gaussian import GaussianNLL
from stabletrain.loss.kl import KLDivergence
from stabletrain.loss.ranking import BPR
from stabletrain.loss.regression import Huber, MeanSquaredError
from stabletrain.loss.temi import TEMI
from stabletrain.loss.z_loss import ZLoss

__all__ = [
    "BPR",
    "CTC",
    "MODES",
    "TEMI",
    "BinaryCrossEntropy",
    "BinaryFocalLoss",
    "CrossEntropy",
    "Dice",
    "FocalLoss",
    "GaussianNLL",
    "Huber",
    "InfoNCE",
    "KLDivergence",
    "Loss",
    "MeanSquaredError",
    "SupervisedContrastive",
    "WeightedCrossEntropy",
    "ZLoss",
]
