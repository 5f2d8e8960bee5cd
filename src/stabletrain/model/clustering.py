"""Heads that assign embeddings to clusters, and a teacher of them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from stabletrain.checks import number, whole
from stabletrain.model.teacher import EMATeacher, check_whole_parameters


class Heads(nn.Module):
    """Several heads side by side, each a hidden layer with ReLU, if wanted, and a linear layer.

    All heads' first layers are one linear layer, and their last ones one convolution of as many groups, so that a step
    has few tensors to look at. What head h answers goes through the module `heads.h`, where a hook can reach it.

    A head with a number in its weights that isn't finite answers NaN, and gives no gradient to anything: the others go
    on.

    Args:
        in_features: numbers of an embedding, D.
        num_classes: number of clusters, C.
        heads: number of heads, H.
        hidden: width of each head's hidden layer; 0 = none.
        initial: factor on the last layer's first weights. Small ones begin without a preference, so that clusters grow
            along the largest groups of neighbours and not where chance put them.

    Example:
        >>> heads = Heads(4, 3, heads=2)
        >>> _ = heads.last.weight.data[0].fill_(float("nan"))
        >>> heads(torch.ones(1, 4)).isnan().any(-1)
        tensor([[ True, False]])
    """

    def __init__(
        self, in_features: int, num_classes: int, heads: int = 16, hidden: int = 64, initial: float = 0.01
    ) -> None:
        super().__init__()
        self.first = nn.Linear(in_features, heads * hidden) if hidden > 0 else None
        self.last: nn.Linear | nn.Conv1d
        if hidden > 0:
            self.last = nn.Conv1d(heads * hidden, heads * num_classes, 1, groups=heads)
        else:
            self.last = nn.Linear(in_features, heads * num_classes)
        self.heads = nn.ModuleList(nn.Identity() for _ in range(heads))
        with torch.no_grad():
            for parameter in self.last.parameters():
                parameter.mul_(initial)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return logits [..., H, C] of embeddings [..., D]."""
        count = len(self.heads)
        blocks = [parameter.view(count, -1, *parameter.shape[1:]) for parameter in self.parameters()]
        whole = torch.stack([torch.isfinite(block).flatten(1).all(1) for block in blocks]).all(0)
        # Zeros instead of bad weights, since backwards 0 times NaN would be NaN in the other layer.
        usable = [torch.where(whole.view(-1, *[1] * (block.dim() - 1)), block, 0.0) for block in blocks]
        weight, bias = usable[:2]
        answers = F.linear(embeddings, weight.flatten(0, 1), bias.flatten())
        logits = answers.view(*answers.shape[:-1], count, -1)
        if self.first is not None:
            weight, bias = usable[2:]
            logits = torch.einsum("...hi,hci->...hc", F.relu(logits), weight.flatten(2)) + bias
        logits = torch.where(whole[:, None], logits, math.nan)
        return torch.stack([head(own) for head, own in zip(self.heads, logits.unbind(-2), strict=True)], -2)


class ClusterModel(nn.Module):
    """Several heads on embeddings that stay as they are, and an EMA teacher of them all, for `loss=temi_heads`.

    Args:
        in_features: numbers of an embedding, D.
        num_classes: number of clusters, C.
        heads: number of heads, H, which begin differently.
        hidden: width of each head's hidden layer; 0 = linear heads.
        momentum: share of the teacher that stays at each forward in training, from 0 to below 1.
        initial: factor on the last layer's first weights.

    Raises:
        ConfigurationError: for numbers that can't be; in training under parallel=fsdp2.

    References:
        N. Adaloglou, F. Michels, H. Kalisch, M. Kollmann: Exploring the Limits of Deep Image Clustering using
        Pretrained Models, 2023.

    Example:
        >>> {name: logits.shape for name, logits in ClusterModel(5, 3, heads=2)(torch.zeros(4, 2, 5)).items()}
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
            whole(f"model.{name}", count, least)
        number("model.initial", initial, above=True)
        self.student = Heads(in_features, num_classes, heads, hidden, initial)
        self.teacher = EMATeacher(self.student, momentum)

    def forward(self, views: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the logits of student and teacher, [B, V, H, C] of views [B, V, D]; the teacher's have no history."""
        if self.training:
            check_whole_parameters(self)
            self.teacher.follow(self.student)
        return {"student": self.student(views), "teacher": self.teacher(views)}
