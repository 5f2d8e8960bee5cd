"""One decision for all ranks: one that skipped alone would average the wrong step, or wait for the others for ever."""

from __future__ import annotations

import math

import torch

from stabletrain.collectives import Ranks
from stabletrain.guard.verdict import FAULTS, Facts


def agreed(facts: Facts, ranks: Ranks, device: torch.device) -> Facts:
    """Return what all ranks together have found: the first fault in the order of decision, whichever rank has it.

    Args:
        facts: found by this rank; the gradients, and so their norm, are common to all ranks already. The loss is NaN
            where none was seen.
        ranks: all of them have to ask at once.
        device: where the ranks can reduce tensors.

    Returns:
        The same on all ranks: the mean loss for a healthy step, else the loss and the words of the rank that found it.

    Example:
        >>> agreed(Facts(None, 0.5, 1.0, ""), Ranks(), torch.device("cpu"))
        Facts(reason=None, loss=0.5, grad_norm=1.0, detail='', scale_held=False, rank=0)
    """
    if not ranks.together:
        return facts
    found = torch.tensor([facts.reason == fault for fault in FAULTS], device=device)
    mean, anywhere = ranks.agree(torch.tensor(facts.loss, device=device), found)
    reasons = [fault for fault, flag in zip(FAULTS, anywhere.tolist(), strict=True) if flag]
    if not reasons:
        return facts._replace(loss=float(mean)) if math.isfinite(facts.loss) else facts  # no rank has seen a loss
    everybody = ranks.gather(facts)  # only now, and only then: rejections are rare
    rank = next(number for number, other in enumerate(everybody) if other.reason == reasons[0])
    return everybody[rank]._replace(detail=f"rank {rank}: {everybody[rank].detail}", rank=rank)
