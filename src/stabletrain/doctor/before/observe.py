"""One forward and backward pass on fresh copies, with what each module put out and what gradient came back to it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stabletrain.doctor.before.subject import Subject
from stabletrain.finite import is_finite
from stabletrain.precision import Precision
from stabletrain.randomness import key, keyed_all
from stabletrain.tree import tensors


@dataclass
class Seen:
    """What one module put out.

    Attributes:
        kind: its class.
        dtype: of its outputs.
        finite: whether all of them are.
        largest: magnitude of the largest finite one.
        zero: share of units (second dimension) that are 0 for the whole batch.
        gradient: Euclidean norm of the loss's gradient by its outputs; NaN before a backward pass.
    """

    kind: str
    dtype: torch.dtype
    finite: bool = True
    largest: float = 0.0
    zero: float = 0.0
    gradient: float = math.nan

    @property
    def headroom(self) -> float:
        """By what factor the outputs may grow before they leave their format."""
        return float(torch.finfo(self.dtype).max) / self.largest if self.largest > 0 else math.inf


@dataclass
class Observation:
    """What one pass showed.

    Attributes:
        error: what the model, the loss or the backward pass raised.
        loss: mean loss of the batch.
        output: the model's output, without a graph.
        modules: by name, in the order of their first call.
        gradients: by name of the parameter, in the loss's unit; None where none came.
        scale: loss scale at which the gradients were finite; 1 but in float16.
    """

    error: Exception | None = None
    loss: float = math.nan
    output: Any = None
    modules: dict[str, Seen] = field(default_factory=dict)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    scale: float = 1.0

    def bad_gradients(self) -> list[str]:
        """Return the parameters whose gradient isn't finite."""
        return [name for name, gradient in self.gradients.items() if gradient is not None and not is_finite(gradient)]

    def first_bad_module(self) -> str | None:
        """Return the first module that put out something that isn't finite."""
        return next((name for name, seen in self.modules.items() if not seen.finite), None)

    @property
    def said(self) -> str:
        """`ok`, or in a few words what went wrong."""
        if self.error is not None:
            return f"refused: {type(self.error).__name__}: {self.error}"
        if not math.isfinite(self.loss):
            return f"the loss is {self.loss}"
        bad = self.bad_gradients()
        return f"the gradient of {bad[0]} isn't finite" if bad else "ok"

    @property
    def finite(self) -> bool:
        """Whether loss and gradients are finite, or the batch was refused by an error."""
        return self.error is not None or self.said == "ok"


def observe(
    subject: Subject,
    data: Any,
    precision: Precision,
    *,
    model: nn.Module | None = None,
    backward: bool = True,
) -> Observation:
    """Run a batch forward and backward on a fresh copy of the model, in training mode.

    Nothing of the run changes: model, data, and the global random numbers are as before.

    Args:
        subject: the run.
        data: a batch; it is given to the model as it is.
        precision: what to compute in.
        model: a copy to use instead; its gradients are left on it.
        backward: whether to compute gradients too.
    """
    result = Observation()
    run = subject.run
    model = model if model is not None else subject.fresh_model()
    passes = precision.active(), precision.lowered(model)
    with keyed_all(key(run.seed, "doctor")), passes[0], passes[1], _quiet(), _watched(model, result) as roots:
        try:
            with torch.set_grad_enabled(backward), precision.autocast():
                output = subject.fresh_task().step(model, data)
            weight = float(output.weight)
            loss = output.loss_sum / (weight if weight > 0 else 1.0)
            result.loss = float(loss.detach())
            result.output = roots[0] if roots else None
            if backward:
                result.scale = _backward(model, loss, precision)
        except Exception as error:  # the user's code may raise anything
            result.error = error
    if backward and result.error is None:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                result.gradients[name] = parameter.grad
        for seen in result.modules.values():
            seen.gradient /= result.scale
    return result


def _backward(model: nn.Module, loss: Tensor, precision: Precision) -> float:
    """Backpropagate; in float16 with the largest loss scale, up to the first one, at which nothing overflows."""
    scale = float(precision.scaler.get_scale()) if precision.scaler is not None else 1.0
    while True:
        model.zero_grad(set_to_none=True)
        (loss * scale).backward(retain_graph=True)  # type: ignore[no-untyped-call]
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if scale <= 1.0 or all(is_finite(gradient) for gradient in gradients):
            break
        scale = max(1.0, scale / 16)
    for gradient in gradients:
        gradient.div_(scale)
    return scale


@contextmanager
def _watched(model: nn.Module, result: Observation) -> Iterator[list[Any]]:
    """Note what each module that computes by itself puts out; yields a list that gets the model's own output."""
    roots: list[Any] = []
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def after(_: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in tensors(output):
                if tensor.is_floating_point() and tensor.numel() > 0:
                    _note(result.modules, name, module, tensor)

        handles.append(module.register_forward_hook(after))

    for name, module in model.named_modules():
        own = next(module.parameters(recurse=False), None) is not None
        if own or next(module.children(), None) is None:
            watch(name or "model", module)
    handles.append(model.register_forward_hook(lambda _, inputs, output: roots.append(_detached(output))))
    try:
        yield roots
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's warnings back: what it warns of here is what is looked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _detached(output: Any) -> Any:
    return output.detach() if isinstance(output, Tensor) else output


def _note(modules: dict[str, Seen], name: str, module: nn.Module, tensor: Tensor) -> None:
    seen = modules.setdefault(name, Seen(type(module).__name__, tensor.dtype))
    values = tensor.detach()
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        seen.finite = False
        values = values[finite]
    if values.numel() > 0:
        seen.largest = max(seen.largest, float(values.abs().max()))
    if tensor.dim() > 1 and len(tensor) > 1:
        nonzero = (tensor.detach() != 0).transpose(0, 1).flatten(1).any(1)
        seen.zero = 1.0 - float(nonzero.float().mean())
    if tensor.requires_grad:

        def backward(gradient: Tensor) -> None:
            seen.gradient = float(torch.linalg.vector_norm(gradient.detach().double()))

        tensor.register_hook(backward)  # type: ignore[no-untyped-call]
