"""Contrastive losses: what belongs together is to be more alike than anything else in the microbatch.

Each sample is compared with the others of its microbatch. So the number of negatives is that of a microbatch, not of a
step: `accumulate=4` gives a quarter of them, and each process has its own. A sample that is left out, because it is bad
or quarantined, is missing among the others' negatives too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from stabletrain import safe
from stabletrain.errors import ConfigurationError
from stabletrain.loss.base import Loss, Values, pair_of, wide
from stabletrain.loss.ignoring import by_sample, checked_index
from stabletrain.loss.probability import log_softmax, margin

LEAST_TEMPERATURE, LARGEST_TEMPERATURE = 0.01, 100.0
SHORTEST = 1e-3  # vectors below this length are not stretched to 1, since their gradient would be stretched likewise


class InfoNCE(Loss):
    """InfoNCE: `-log exp(s_ii / T) / sum_j exp(s_ij / T)` with the cosine s_ij of the embeddings a_i and b_j.

    Called with two embeddings of each sample, of two views of it say: a pair of tensors [B, D], or one [B, 2, D].
    Targets aren't looked at. The temperature is bounded: cosines are multiplied by 100 at most, as in CLIP.

    Args:
        temperature: T, from 0.01 to 100.
        symmetric: true: the mean of a against all b and b against all a; false: the first alone.
        learnable: true: log T is trained, from `temperature` on, and held within the same bounds; false: T is fixed.

    References:
        A. van den Oord et al.: Representation Learning with Contrastive Predictive Coding, 2018; A. Radford et al.:
        Learning Transferable Visual Models From Natural Language Supervision, 2021 (symmetry, bound of 100).

    Example:
        >>> views = torch.eye(3)
        >>> InfoNCE(temperature=1.0)((views, views), None)[0]
        tensor([0.5514, 0.5514, 0.5514])
    """

    tasks = ("supervised",)

    def __init__(self, temperature: float = 0.1, symmetric: bool = True, learnable: bool = False) -> None:
        super().__init__()
        self.temperature = _temperature(temperature)
        self.symmetric = symmetric
        self.log_temperature = nn.Parameter(torch.tensor(math.log(self.temperature))) if learnable else None

    def forward(self, outputs: Any, targets: Any = None) -> Values:
        """Return the loss of each sample, and no weights."""
        first, second = pair_of(outputs, "two embeddings of each sample")
        if first.dim() != 2 or first.shape != second.shape:
            raise ConfigurationError(
                f"the embeddings have the shapes {list(first.shape)} and {list(second.shape)}; this loss compares "
                "vectors, so both must be [samples, dimensions]."
            )
        alike = cosines(first, second) * self._scale(first)
        own = torch.arange(len(first), device=first.device)
        values = -nn.functional.logsigmoid(-margin(alike, own))
        if self.symmetric:
            values = 0.5 * (values - nn.functional.logsigmoid(-margin(alike.T, own)))
        return by_sample(values)

    def _scale(self, like: torch.Tensor) -> torch.Tensor | float:
        """Return 1 / T within its bounds; beyond one the gradient goes on, so that a learned T can come back."""
        if self.log_temperature is None:
            return 1 / self.temperature
        log = self.log_temperature.to(like.dtype)
        held = log.detach().clamp(math.log(LEAST_TEMPERATURE), math.log(LARGEST_TEMPERATURE))
        return torch.exp(-(log - log.detach() + held))


class SupervisedContrastive(Loss):
    """Supervised contrastive loss: `-mean_{p in P(i)} log exp(s_ip / T) / sum_{a != i} exp(s_ia / T)`.

    P(i) are the other embeddings of the same label, s their cosines. Called with embeddings [B, D], or [B, V, D] for V
    views of each sample, and labels int64 [B]. An anchor without a positive has nothing to be drawn to and the weight
    0; a sample to be ignored is no anchor, no positive and no negative.

    Args:
        temperature: T, from 0.01 to 100.
        ignore_index: label that doesn't count; None: every label does.

    References:
        P. Khosla et al.: Supervised Contrastive Learning, 2020 (L_out; T = 0.1).

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> SupervisedContrastive(temperature=1.0)(embeddings, torch.tensor([0, 0, 1]))
        (tensor([0.3133, 0.3133, 0.0000]), tensor([1., 1., 0.]))
    """

    tasks = ("supervised",)

    def __init__(self, temperature: float = 0.1, ignore_index: int | None = None) -> None:
        super().__init__()
        self.temperature = _temperature(temperature)
        self.ignore_index = checked_index(ignore_index)

    def forward(self, embeddings: torch.Tensor, targets: torch.Tensor) -> Values:
        """Return the loss and the weight of each sample."""
        if embeddings.dim() not in (2, 3) or targets.shape != embeddings.shape[:1] or targets.is_floating_point():
            raise ConfigurationError(
                f"the model returned {list(embeddings.shape)} for {targets.dtype} labels of the shape "
                f"{list(targets.shape)}; this loss needs embeddings [samples, dimensions] or [samples, views, "
                "dimensions], and class numbers [samples]."
            )
        if len(embeddings) == 0:
            return wide(embeddings).flatten(1).sum(1), None
        views = wide(embeddings) if embeddings.dim() == 3 else wide(embeddings).unsqueeze(1)
        left_out = torch.zeros_like(targets, dtype=torch.bool)
        if self.ignore_index is not None:
            left_out = targets == self.ignore_index
        labels, out = (part.repeat_interleave(views.shape[1]) for part in (targets, left_out))
        vectors = torch.where(left_out[:, None, None], 0.0, views).flatten(0, 1)
        itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
        alike = cosines(vectors, vectors) / self.temperature
        log_p = log_softmax(torch.where(itself | out, torch.finfo(alike.dtype).min, alike))
        positive = (labels[:, None] == labels) & ~itself & ~out & ~out[:, None]
        count = positive.sum(1)
        values = -torch.where(positive, log_p, 0.0).sum(1) / count.clamp_min(1)
        shape = views.shape[:2]
        per_sample, weights = by_sample(values.view(shape), ignored=(count == 0).view(shape))
        return per_sample, weights


def cosines(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the cosine of every vector of one tensor with every one of another, whatever autocast says.

    Args:
        first: [N, D], float32 or float64.
        second: [M, D].

    Example:
        >>> cosines(torch.tensor([[3e30, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        tensor([[1., 0.]])
    """
    with torch.autocast(first.device.type, enabled=False):
        return _unit(first) @ _unit(second).T


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return vectors / safe.norm(vectors, dim=1, keepdim=True).clamp_min(SHORTEST)


def _temperature(value: float) -> float:
    if (
        not isinstance(value, (int, float))
        or isinstance(value, bool)
        or not (LEAST_TEMPERATURE <= value <= LARGEST_TEMPERATURE)
    ):
        raise ConfigurationError(
            f"temperature is {value!r}; a number from {LEAST_TEMPERATURE:g} to {LARGEST_TEMPERATURE:g} is allowed."
        )
    return float(value)
