"""Healthy steps with infinities and NaN in them, which must not raise an alarm."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .case import Built, Draw, Family

HEALTHY = Family()


@HEALTHY.add()
def causal_mask(seed: int) -> Built:
    """Self-attention in which later places are masked by -inf."""
    draw = Draw(seed)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(6, 18)

        def forward(self, x: Tensor) -> Tensor:
            query, key, value = self.project(x).chunk(3, -1)
            scores = query @ key.transpose(1, 2)
            mask = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
            return torch.softmax(scores.masked_fill(mask, -math.inf), -1) @ value

    return Built(Attention(), lambda model, batch: model(batch).square().mean(), draw.normal(4, 5, 6), [])


@HEALTHY.add()
def empty_row_put_right(seed: int) -> Built:
    """A row of the softmax has no entry left, and its NaN is replaced by 0."""
    draw = Draw(seed)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[draw.one(4)] = True

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, hidden = batch
        weights = torch.softmax(model(x).masked_fill(hidden, -math.inf), -1).nan_to_num(0.0)
        return (weights * x[:, :5]).sum()

    return Built(nn.Linear(6, 5), loss, (draw.normal(4, 6), mask), [])


@HEALTHY.add()
def padding_left_out(seed: int) -> Built:
    """NaN in the padding, which is never selected."""
    draw = Draw(seed)
    x, real = draw.normal(4, 5, 3), torch.ones(4, 5, dtype=torch.bool)
    row = draw.one(4)
    x[row, 3:], real[row, 3:] = math.nan, False
    return Built(nn.Linear(3, 1), lambda model, batch: model(batch[0][batch[1]]).square().mean(), (x, real), [])


@HEALTHY.add()
def guarded_root(seed: int) -> Built:
    """The root of what is positive only, with the other places kept away from it before."""
    draw = Draw(seed)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        values = model(batch)
        positive = values > 0
        return torch.where(positive, torch.where(positive, values, 1.0).sqrt(), 0.0).sum()

    return Built(nn.Linear(3, 4), loss, draw.normal(6, 3), [])


@HEALTHY.add()
def best_so_far(seed: int) -> Built:
    """A minimum that begins at infinity."""
    draw = Draw(seed)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        best = torch.full((6,), math.inf)
        for _ in range(3):
            best = torch.minimum(best, model(batch).square().sum(1))
        return best.mean()

    return Built(nn.Linear(3, 4), loss, draw.normal(6, 3), [])


@HEALTHY.add()
def masked_maximum(seed: int) -> Built:
    """Pooling by the largest of the values that count."""
    draw = Draw(seed)
    counts = torch.arange(5) < 1 + draw.integers(5, 4)[:, None]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model(batch[0]).squeeze(-1).masked_fill(~batch[1], -math.inf).amax(1).square().mean()

    return Built(nn.Linear(3, 1), loss, (draw.normal(4, 5, 3), counts), [])


@HEALTHY.add()
def masked_log_sum(seed: int) -> Built:
    """logsumexp over entries of which some are -inf."""
    draw = Draw(seed)
    hidden = draw.uniform(4, 5) < 0.4
    hidden[:, 0] = False

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model(batch[0]).masked_fill(batch[1], -math.inf).logsumexp(1).mean()

    return Built(nn.Linear(6, 5), loss, (draw.normal(4, 6), hidden), [])


@HEALTHY.add()
def norm_of_zero(seed: int) -> Built:
    """The norm of a vector of zeros, for which torch gives a gradient of 0."""
    draw = Draw(seed)
    x = draw.normal(5, 3)
    x[draw.one(5)] = 0.0
    return Built(nn.Linear(3, 4, bias=False), lambda model, batch: model(batch).norm(dim=1).sum(), x, [])


@HEALTHY.add()
def impossible_alignment(seed: int) -> Built:
    """CTC with an input that is too short, told to count it as 0."""
    draw = Draw(seed)
    lengths = torch.tensor([8, 8, 8])
    lengths[draw.one(3)] = 2

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        frames, targets, sizes = batch
        logits = model(frames).log_softmax(-1).transpose(0, 1)
        return F.ctc_loss(logits, targets, sizes, torch.full((3,), 4), zero_infinity=True)

    return Built(nn.Linear(5, 6), loss, (draw.normal(3, 8, 5), 1 + draw.integers(5, 3, 4), lengths), [])


@HEALTHY.add()
def padded_attention(seed: int) -> Built:
    """A transformer layer of torch's with a padding mask."""
    draw = Draw(seed)
    padded = torch.arange(5) >= (2 + draw.integers(4, 4))[:, None]
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model(batch[0], src_key_padding_mask=batch[1])[~batch[1]].square().mean()

    return Built(layer, loss, (draw.normal(4, 5, 8), padded), [])
