"""A classifier for bags: samples that are sets of instances, with a label for the set alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from stabletrain.errors import ConfigurationError

Bags = Sequence[torch.Tensor] | torch.Tensor


class BagClassifier(nn.Module):
    """An encoder of instances, their mean weighted by gated attention over each bag, and a linear layer.

    The attention of instance k, with its encoding h_k, is the softmax over its bag of the score
    w^T (tanh(V h_k) * sigmoid(U h_k)), clamped before. BatchNorm sees the instances of all bags of the batch together.
    The order of the instances doesn't matter. A bag without instances has a mean of zeros, so its logits are the bias
    of the last layer. Scores, softmax and mean are computed in float32 at least, whatever the precision.

    Args:
        in_features: features of an instance.
        num_classes: number of logits.
        hidden: width of the encoder.
        attention: width of the attention, the rows of V and U.
        clamp: scores are clamped to [-clamp, clamp]; None = they are left as they are.
        dropout: share of values set to 0 before the last layer, from 0 to below 1.

    References:
        M. Ilse, J. M. Tomczak, M. Welling: Attention-based Deep Multiple Instance Learning, ICML 2018, equation 9.

    Example:
        >>> BagClassifier(in_features=2, num_classes=3)([torch.zeros(5, 2), torch.zeros(0, 2)]).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        hidden: int = 64,
        attention: int = 32,
        clamp: float | None = 10.0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if clamp is not None and (isinstance(clamp, bool) or not 0 < clamp < math.inf):
            raise ConfigurationError(
                f"the clamp of the attention's scores is {clamp!r}; a finite number above 0 is allowed, or null to "
                "leave them as they are."
            )
        self.in_features = in_features
        self.clamp = clamp
        self.encoder = nn.Sequential(
            *(nn.Linear(in_features, hidden, bias=False), BatchNormOfInstances(hidden), nn.ReLU()),
            *(nn.Linear(hidden, hidden, bias=False), BatchNormOfInstances(hidden), nn.ReLU()),
        )
        self.content = nn.Linear(hidden, attention)  # V
        self.gate = nn.Linear(hidden, attention)  # U
        self.score = nn.Linear(attention, 1, bias=False)  # w; the softmax doesn't feel a bias
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden, num_classes)

    def forward(self, bags: Bags) -> torch.Tensor:
        """Return the logits of some bags.

        Args:
            bags: list of B tensors [instances, in_features], or one tensor [B, instances, in_features].

        Returns:
            Logits [B, num_classes].

        Raises:
            ConfigurationError: for a bag that isn't a matrix with `in_features` columns.
        """
        encoded, weights, place = self._attended(bags)
        laid = encoded.new_zeros(weights.numel(), encoded.shape[1]).index_copy(0, place, encoded)
        mean = (laid.view(*weights.shape, -1) * weights.unsqueeze(2)).sum(1)
        logits: torch.Tensor = self.classifier(self.dropout(mean))
        return logits

    def attention(self, bags: Bags) -> list[torch.Tensor]:
        """Return how much each instance counts for its bag.

        Args:
            bags: as in `forward`.

        Returns:
            For each bag a tensor [instances], which adds up to 1 (without instances: empty).

        Raises:
            ConfigurationError: for a bag that isn't a matrix with `in_features` columns.
        """
        _, weights, place = self._attended(bags)
        return list(torch.split(weights.flatten()[place], [len(bag) for bag in bags]))

    def _attended(self, bags: Bags) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return encodings [N, hidden], attention [B, longest], and which place of that, laid flat, each of N has."""
        for position, bag in enumerate(bags):
            if bag.dim() != 2 or bag.shape[1] != self.in_features:
                raise ConfigurationError(
                    f"the bag at place {position} of the batch has the shape {list(bag.shape)}; [instances, "
                    f"{self.in_features}] is needed (model.in_features)."
                )
        lengths = torch.tensor([len(bag) for bag in bags])
        longest = max(1, int(lengths.max()))
        # The bags side by side, the shorter ones padded: unlike sums into bags, that is the same in each run on a GPU.
        used = torch.arange(longest) < lengths.unsqueeze(1)
        instances = torch.cat(list(bags))
        place = used.flatten().nonzero().squeeze(1).to(instances.device, non_blocking=True)
        encoded = self.encoder(instances)
        scores = self.score(torch.tanh(self.content(encoded)) * torch.sigmoid(self.gate(encoded))).squeeze(1)
        encoded, scores = (item if item.dtype == torch.float64 else item.float() for item in (encoded, scores))
        if self.clamp is not None:
            scores = scores.clamp(-self.clamp, self.clamp)
        laid = scores.new_full((used.numel(),), -math.inf).index_copy(0, place, scores).view_as(used)
        # Of a bag without instances the largest score is -Inf, and -Inf less -Inf is NaN.
        largest = laid.detach().amax(1, keepdim=True).clamp_min(torch.finfo(laid.dtype).min)
        powers = (laid - largest).exp()
        weights = powers / powers.sum(1, keepdim=True).clamp_min(torch.finfo(laid.dtype).tiny)
        return encoded, weights, place


class BatchNormOfInstances(nn.modules.batchnorm._NormBase):
    """BatchNorm over the instances of all bags of a batch; fewer than 2 of them are taken by the running statistics.

    It isn't a torch `BatchNorm1d`, which needs two samples: here one bag is enough. So a step may be salvaged with a
    single bag that is left of it. Statistics are those of the process's own bags.

    Example:
        >>> BatchNormOfInstances(2)(torch.zeros(0, 2)).shape
        torch.Size([0, 2])
    """

    def forward(self, instances: torch.Tensor) -> torch.Tensor:
        """Return the instances [N, F], normalised."""
        by_batch = self.training and len(instances) >= 2
        if by_batch and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        momentum = 0.0 if self.momentum is None else self.momentum
        mean, variance = self.running_mean, self.running_var
        return F.batch_norm(instances, mean, variance, self.weight, self.bias, by_batch, momentum, self.eps)
