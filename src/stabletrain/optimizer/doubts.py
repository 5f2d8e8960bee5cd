"""Settings of an optimizer that are known to go wrong, whatever the data: for the run's notes and for the doctor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch.optim import Optimizer


class Doubt(NamedTuple):
    """One setting that goes wrong."""

    kind: Literal["eps", "weight_decay", "rate"]
    broken: bool  # else it may turn out well
    what: str
    evidence: str
    dtype: torch.dtype | None = None  # for `eps`: the parameters' format


def doubts(optimizer: Optimizer) -> list[Doubt]:
    """Return what is doubtful, at most one of each kind.

    An eps is too small for a format in which it is 0: a gradient of 0 then gives 0/0. A learning rate times a weight
    decay of 1 or more takes away more than there is, so that weights change their sign, and grow without limit from 2.

    Example:
        >>> weight = torch.zeros(2, dtype=torch.float16, requires_grad=True)
        >>> [doubt.what for doubt in doubts(torch.optim.AdamW([weight], lr=1.0, weight_decay=2.0))]
        ["an optimizer eps that is 0 in the parameters' format", 'weight decay that takes away more than there is']
    """
    found: dict[str, Doubt] = {}
    for doubt in _all(optimizer):
        found.setdefault(doubt.kind, doubt)
    return list(found.values())


def _all(optimizer: Optimizer) -> Iterator[Doubt]:
    for group in optimizer.param_groups:
        eps = group.get("eps")
        formats = {parameter.dtype for parameter in group["params"] if parameter.is_floating_point()}
        for dtype in sorted(formats, key=str):
            if isinstance(eps, (int, float)) and float(torch.tensor(float(eps), dtype=dtype)) == 0.0:
                yield Doubt(
                    kind="eps",
                    broken=dtype not in (torch.float32, torch.float64),
                    what="an optimizer eps that is 0 in the parameters' format",
                    evidence=f"optimizer.eps is {eps:g}, the parameters are {str(dtype).removeprefix('torch.')}: a "
                    "gradient of 0 gives 0/0",
                    dtype=dtype,
                )
        decay = group.get("weight_decay")
        rate = group.get("initial_lr", group.get("lr"))
        if not isinstance(rate, (int, float)):
            continue
        if isinstance(decay, (int, float)) and rate * decay >= 1:
            yield Doubt(
                kind="weight_decay",
                broken=True,
                what="weight decay that takes away more than there is",
                evidence=f"learning rate {rate:g} * weight_decay {decay:g} = {rate * decay:g}: each update multiplies "
                f"the weights by {1 - rate * decay:.3g}",
            )
        if rate == 0:
            yield Doubt(
                kind="rate",
                broken=False,
                what="a learning rate of 0",
                evidence="no update changes anything (base_lr times lr_scale)",
            )
