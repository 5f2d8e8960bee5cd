"""Heads that assign embeddings to clusters, each with a teacher."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from stabletrain.errors import ConfigurationError
from stabletrain.model.teacher import EMATeacher, check_whole_parameters


class ClusterHead(nn.Module):
    """A hidden layer with ReLU, if wanted, and a linear layer: logits of the clusters.

    A head with a number in its weights that isn't finite answers NaN, and gives no gradient to anything: others that
    are trained with it go on.

    Args:
        in_features: numbers of an embedding.
        num_classes: number of clusters.
        hidden: width of the hidden layer; 0 = none.
        initial: factor on the last layer's first weights. Small ones begin without a preference, so that clusters grow
            along the largest groups of neighbours and not where chance put them.

    Example:
        >>> head = ClusterHead(4, 3)
        >>> _ = head.layers[0].weight.data.fill_(float("nan"))
        >>> head(torch.ones(1, 4)).isnan().all()
        tensor(True)
    """

    def __init__(self, in_features: int, num_classes: int, hidden: int = 64, initial: float = 0.01) -> None:
        super().__init__()
        widths = [in_features, *([hidden] if hidden > 0 else []), num_classes]
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))
        with torch.no_grad():
            for parameter in self.layers[-1].parameters():
                parameter.mul_(initial)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return logits [..., num_classes] of embeddings [..., in_features]."""
        whole = torch.stack([torch.isfinite(parameter).all() for parameter in self.parameters()]).all()
        values = embeddings
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, nn.Linear)
            values = F.relu(values) if number > 0 else values
            # Zeros instead of bad weights, since backwards 0 times NaN would be NaN in the other layer.
            values = F.linear(values, torch.where(whole, layer.weight, 0.0), torch.where(whole, layer.bias, 0.0))
        return torch.where(whole, values, math.nan)


class _SideBySide(nn.ModuleList):
    """Heads that see the same."""

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the logits of all heads [..., H, C]."""
        return torch.stack([head(embeddings) for head in self], -2)


class ClusterHeads(nn.Module):
    """Several heads on embeddings that stay as they are, and an EMA teacher of them all, for `loss=temi_heads`.

    Args:
        in_features: numbers of an embedding, D.
        num_classes: number of clusters, C.
        heads: number of heads, H, which begin differently.
        hidden: width of each head's hidden layer; 0 = linear heads.
        momentum: share of the teacher that stays at each forward in training, from 0 to below 1.
        initial: factor on the last layers' first weights.

    Raises:
        ConfigurationError: for numbers that can't be; in training under parallel=fsdp2.

    References:
        N. Adaloglou, F. Michels, H. Kalisch, M. Kollmann: Exploring the Limits of Deep Image Clustering using
        Pretrained Models, 2023.

    Example:
        >>> {name: logits.shape for name, logits in ClusterHeads(5, 3, heads=2)(torch.zeros(4, 2, 5)).items()}
        {'student': torch.Size([4, 2, 2, 3]), 'teacher': torch.Size([4, 2, 2, 3])}
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        heads: int = 16,
        hidden: int = 64,
        momentum: float = 0.99,
        initial: float = 0.01,
    ) -> None:
        super().__init__()
        for name, count, least in (("num_classes", num_classes, 2), ("heads", heads, 1), ("hidden", hidden, 0)):
            if isinstance(count, bool) or not isinstance(count, int) or count < least:
                raise ConfigurationError(f"model.{name} is {count!r}; a whole number from {least} is allowed.")
        if isinstance(initial, bool) or not 0 < initial < math.inf:
            raise ConfigurationError(f"model.initial is {initial!r}; a finite number above 0 is allowed.")
        self.heads = _SideBySide(ClusterHead(in_features, num_classes, hidden, initial) for _ in range(heads))
        self.teacher = EMATeacher(self.heads, momentum)

    def forward(self, views: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the logits of student and teacher, [B, V, H, C] of views [B, V, D]; the teacher's have no history."""
        if self.training:
            check_whole_parameters(self)
            self.teacher.follow(self.heads)
        return {"student": self.heads(views), "teacher": self.teacher(views)}
