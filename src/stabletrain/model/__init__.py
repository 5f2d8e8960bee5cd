"""Models: the options of the group `model`."""

from __future__ import annotations

from stabletrain.model.bags import BagClassifier
from stabletrain.model.clustering import ClusterModel
from stabletrain.model.convnet import ConvNet
from stabletrain.model.direction import DirectionClassifier
from stabletrain.model.mlp import MLP
from stabletrain.model.mmgcn import MMGCN
from stabletrain.model.pooling import AttentionPooling
from stabletrain.model.recurrent import RecurrentClassifier
from stabletrain.model.semantic import SemanticRecommender
from stabletrain.model.teacher import EMATeacher
from stabletrain.model.transformer import Transformer

__all__ = [
    "MLP",
    "MMGCN",
    "AttentionPooling",
    "BagClassifier",
    "ClusterModel",
    "ConvNet",
    "DirectionClassifier",
    "EMATeacher",
    "RecurrentClassifier",
    "SemanticRecommender",
    "Transformer",
]
