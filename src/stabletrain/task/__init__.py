"""Tasks: how a model and a microbatch become a loss, and how a model is judged."""

from stabletrain.task.balanced import BalancedClassification, balanced_metrics
from stabletrain.task.base import Batch, Output, Task, memory_of
from stabletrain.task.binary import Binary
from stabletrain.task.classification import Classification
from stabletrain.task.clustering import Clustering, agreement
from stabletrain.task.next_item import NextItem
from stabletrain.task.next_token import NextToken
from stabletrain.task.ranking import RankedClassification
from stabletrain.task.ranks import Ranks
from stabletrain.task.recommendation import Recommendation
from stabletrain.task.regression import Regression
from stabletrain.task.segmentation import Segmentation
from stabletrain.task.supervised import Supervised

__all__ = [
    "BalancedClassification",
    "Batch",
    "Binary",
    "Classification",
    "Clustering",
    "NextItem",
    "NextToken",
    "Output",
    "RankedClassification",
    "Ranks",
    "Recommendation",
    "Regression",
    "Segmentation",
    "Supervised",
    "Task",
    "agreement",
    "balanced_metrics",
    "memory_of",
]
