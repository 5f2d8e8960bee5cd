"""A teacher that follows its student slowly: the same module, an exponential moving average of its weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from stabletrain.errors import ConfigurationError
from stabletrain.tree import is_distributed

MESSAGE = (
    "an EMA teacher was asked to follow a student whose parameters are divided among processes (parallel=fsdp2), where "
    "what it takes over would be lost. Choose parallel=ddp or parallel=none."
)


class EMATeacher(nn.Module):
    """A frozen copy of a module that follows it: teacher = momentum * teacher + (1 - momentum) * student.

    The model that holds it calls `follow` at the beginning of each forward in training mode. So the teacher is part of
    what a forward changes: it lies in checkpoints, and a rejected step leaves no trace in it. At the first call the
    student is copied whole, however it was initialised.

    With `accumulate=n` a step has n forwards: within it the student stays, and of the teacher's distance to it
    momentum ** n is left, as if the momentum were that much lower.

    What isn't finite in the student isn't followed. It is put back from the teacher, so that a part that went bad
    begins again where the teacher is. That writes to the student's parameters: let each forward in training be followed
    by its backward before the next one.

    Args:
        student: module to copy.
        momentum: share of the teacher that stays at each forward, from 0 to below 1.

    Attributes:
        copy: the teacher itself, called like the student.
        mended: buffer, how many numbers of the student were put back so far.

    Raises:
        ConfigurationError: for another momentum; in `follow` for a student that is divided among processes.

    References:
        A. Tarvainen, H. Valpola: Mean teachers are better role models, NeurIPS 2017.

    Example:
        >>> student = nn.Linear(1, 1, bias=False)
        >>> teacher = EMATeacher(student, momentum=0.5)
        >>> for value in (2.0, 4.0):
        ...     _ = student.weight.data.fill_(value)
        ...     teacher.follow(student)
        >>> teacher(torch.ones(1))
        tensor([3.])
    """

    started: torch.Tensor
    mended: torch.Tensor

    def __init__(self, student: nn.Module, momentum: float = 0.99) -> None:
        super().__init__()
        if isinstance(momentum, bool) or not isinstance(momentum, (int, float)) or not 0 <= momentum < 1:
            raise ConfigurationError(f"momentum is {momentum!r}; a number from 0 to below 1 is allowed.")
        self.momentum = float(momentum)
        self.copy = copy.deepcopy(student).requires_grad_(False)
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self.register_buffer("mended", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def follow(self, student: nn.Module) -> None:
        """Move towards the student, and put back what isn't finite in it.

        Args:
            student: of the same shape as the one that was copied.
        """
        for own, its in zip(self.copy.parameters(), student.parameters(), strict=True):
            if is_distributed(own) or is_distributed(its):
                raise ConfigurationError(MESSAGE)
            # A selection, not a product: 0 times a NaN of the other side would be NaN.
            known = torch.isfinite(its)
            moved = torch.where(self.started, self.momentum * own + (1 - self.momentum) * its, its)
            own.copy_(torch.where(known, moved, own))
            self.mended += (~known).sum()
            its.copy_(torch.where(known, its, own))
        for buffer, current in zip(self.copy.buffers(), student.buffers(), strict=True):
            buffer.copy_(current)
        self.started.fill_(True)

    @torch.no_grad()
    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """Return what the teacher makes of it, without a gradient."""
        return self.copy(*arguments, **keywords)


def check_whole_parameters(model: nn.Module) -> None:
    """Refuse a model that holds an `EMATeacher` where its parameters are divided among processes.

    Within a forward these look whole, so that the teacher alone can't tell.

    Raises:
        ConfigurationError: under parallel=fsdp2.

    Example:
        >>> check_whole_parameters(nn.Linear(1, 1))
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule

    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ConfigurationError(MESSAGE)
