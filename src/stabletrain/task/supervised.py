"""Any outputs and any targets, judged by the loss alone."""

from __future__ import annotations

from stabletrain.task.base import AdditiveTask


class Supervised(AdditiveTask):
    """Whatever the loss can compare; reports the loss alone.

    The data is the pair (inputs, targets), or inputs alone, where the loss needs no targets. Outputs and targets are
    any trees of tensors.

    Args:
        loss: any of `stabletrain.loss`, or a module that is called like them.

    Example:
        >>> import torch
        >>> from stabletrain.loss import BPR
        >>> output = Supervised(BPR()).step(torch.nn.Identity(), (torch.tensor([[3.0, 1.0], [0.0, 0.0]]), None))
        >>> output.loss_sum, output.weight
        (tensor(0.8201), 2.0)
    """

    name = "supervised"
