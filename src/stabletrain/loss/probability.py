"""Logarithms of probabilities from logits, whose values and gradients keep their digits where a probability nears 1.

`torch.log_softmax` rounds the logarithm of a probability within 6e-8 of 1 to 0 in float32, and its gradient p - 1 with
it, while the other classes' gradients stay: the direction is off by up to 45 degrees. Here everything begins with the
margin of a class, log sum of the others' exponentials minus its own logit, of which p = sigmoid(-margin).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return how far the other classes together are ahead of the label: log sum_{c != y} exp(x_c) - x_y.

    Args:
        logits: [B, C, ...].
        labels: int64 [B, ...].

    Returns:
        [B, ...]; with a single class the lowest number there is, as there is no other.

    Example:
        >>> margin(torch.tensor([[0.0, 0.0, 0.0], [9.0, 0.0, -90.0]]), torch.tensor([1, 0]))
        tensor([ 0.6931, -9.0000])
    """
    if labels.dtype != torch.int64:
        raise RuntimeError(f"labels of the type {labels.dtype}")
    index = labels.unsqueeze(1)
    others = logits.scatter(1, index, torch.finfo(logits.dtype).min)
    return others.logsumexp(1) - logits.gather(1, index).squeeze(1)


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Return log p of every class.

    Args:
        logits: [B, C, ...].

    Example:
        >>> log_softmax(torch.tensor([[0.0, 20.0]])).tolist()
        [[-20.0, -2.06115369216775e-09]]
    """
    return log_probabilities(logits)[0]


def log_probabilities(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log p and log(1 - p) of every class.

    The most probable class has both from its margin; no other has a p above 1/2, where either way is exact.

    Args:
        logits: [B, C, ...].
    """
    top = logits.argmax(1)
    ahead = margin(logits, top)
    index, log_top = top.unsqueeze(1), F.logsigmoid(-ahead).unsqueeze(1)
    # Writing it again where it stands already parts its gradient from that of the others.
    log_p = (logits - logits.gather(1, index) + log_top).scatter(1, index, log_top)
    rest = torch.log1p(-torch.exp(log_p.clamp_max(-0.5)))
    return log_p, rest.scatter(1, index, F.logsigmoid(ahead).unsqueeze(1))
