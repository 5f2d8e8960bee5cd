"""A forward and backward pass under watch: the first operation that makes a NaN or Inf which reaches the loss.

Or else a gradient, or a buffer. From there the way leads back to where it began; what `watch` follows is told there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from stabletrain.doctor.origin import Kind, Traced
from stabletrain.doctor.watch import Watch
from stabletrain.finite import is_finite


def trace(
    run: Callable[[], Sequence[Tensor]], modules: Sequence[nn.Module], batch: Iterable[tuple[str, Tensor]]
) -> Traced:
    """Watch a forward and backward pass.

    Args:
        run: does both, and returns the losses; gradients are looked for at the modules' parameters.
        modules: all that take part.
        batch: the tensors of the batch, with their names.
    """
    names = list(_named(modules))
    mode = Watch([("batch", name, tensor) for name, tensor in batch] + names)
    with ExitStack() as stack:
        # It records each node's line; its own check, which stops at any NaN, is not wanted.
        stack.enter_context(torch.autograd.set_detect_anomaly(True, check_nan=False))
        for module in modules:
            stack.enter_context(mode.inside(module))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Anomaly Detection has been enabled")  # that it is slow
        losses: list[Tensor] = []
        error: Exception | None = None
        with mode:
            try:
                losses = list(run())
            except (RuntimeError, ValueError, IndexError) as caught:
                error = caught
    bad = first_bad(losses, modules)
    return Traced(
        reached=bad and bad[0],
        origins=tuple(mode.origins_of(bad[1])) if bad is not None else (),
        operations=mode.number,
        losses=tuple(float(loss.detach()) for loss in losses),
        error=error,
        shown=frozenset(mode.shown),
    )


def first_bad(losses: Sequence[Tensor], modules: Sequence[nn.Module]) -> tuple[str, Tensor] | None:
    """Return what isn't finite first, of losses, gradients and buffers, and its tensor."""
    names = list(_named(modules))
    for loss in losses:
        if not is_finite(loss):
            return "loss", loss
    for kind, name, tensor in names:
        if kind == "parameter" and tensor.grad is not None and not is_finite(tensor.grad):
            return f"gradient of {name}", tensor.grad
    for kind, name, tensor in names:
        if kind == "buffer" and not is_finite(tensor):
            return f"buffer {name}", tensor
    return None


def _named(modules: Sequence[nn.Module]) -> Iterator[tuple[Kind, str, Tensor]]:
    for module in modules:
        for name, parameter in module.named_parameters():
            yield "parameter", name, parameter
        for name, buffer in module.named_buffers():
            yield "buffer", name, buffer
