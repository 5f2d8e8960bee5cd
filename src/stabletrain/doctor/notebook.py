"""A diagnosis of anybody's step: `stabletrain.diagnose(model, loss, batch)`."""

from __future__ import annotations

import inspect
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stabletrain.doctor.cause import Facts, classify
from stabletrain.doctor.diagnosis import Diagnosis
from stabletrain.doctor.mend import code_remedies
from stabletrain.doctor.origin import Traced
from stabletrain.doctor.samples import chosen, count_of, guilty
from stabletrain.doctor.trace import first_bad, trace
from stabletrain.errors import ConfigurationError
from stabletrain.guard.snapshot import Snapshot
from stabletrain.incident.statistics import named_tensors

Loss = Callable[[Any, Any], Tensor]


def diagnose(model: nn.Module, loss: Loss, batch: Any, *, time_limit: float = 60.0) -> Diagnosis:
    """Run a step forward and backward, and say why it isn't healthy.

    The model's parameters, gradients and buffers and the global random numbers are left as they were; every try starts
    from the same ones.

    Args:
        model: in the mode in which it is used, in training usually.
        loss: called with the model and the batch; returns the loss, shape [].
        batch: any tree of tensors.
        time_limit: seconds after which no more is tried.

    Returns:
        A diagnosis that prints itself; `cause` is None if loss, gradients and buffers are finite.

    Raises:
        ConfigurationError: the loss returned no scalar.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> batch = (torch.tensor([[1.0, 2.0], [float("nan"), 0.0]]), torch.ones(2, 1))
        >>> found = diagnose(model, lambda model, batch: (model(batch[0]) - batch[1]).square().mean(), batch)
        >>> found.cause, found.samples
        ('data', [1])
    """
    begun = time.monotonic()
    with _Trials(model, loss) as trials:
        traced = trials.traced(batch)
        if traced.error is not None and traced.reached is None:
            found = _of_error(traced.error)
            if found is None:
                raise traced.error
            return found
        if traced.reached is None:
            return Diagnosis(reproduced="yes", cause=None, seconds=time.monotonic() - begun)
        count = count_of(batch)
        samples: list[int] = []
        if count > 1 and traced.may_be_samples:

            def is_bad(some: Sequence[int]) -> bool:
                if time.monotonic() - begun > time_limit:
                    raise TimeoutError
                return trials.is_bad(chosen(batch, count, some))

            with suppress(TimeoutError):
                hints = next((origin.rows for origin in traced.origins if origin.has_rows_of(count)), ())
                samples = guilty(is_bad, count, hints)
        facts = Facts(traced=traced, batch=batch, count=count, samples=samples, modules=trials.modules)
        cause, confidence, evidence = classify(facts)
        remedies = code_remedies(trials, batch, traced, samples, count, begun + time_limit)
    return Diagnosis(
        reproduced="yes",
        cause=cause,
        confidence=confidence,
        evidence=evidence,
        reached=traced.reached,
        operation=traced.operation,
        source=traced.source,
        samples=samples,
        odd=facts.odd,
        remedies=remedies,
        seconds=time.monotonic() - begun,
    )


class _Trials:
    """Runs of the same step, each from the same state; everything is put back in the end."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self.model, self.loss = model, loss
        self.modules = list(dict.fromkeys([model, *_modules_in(loss)]))
        self._parameters = [parameter for module in self.modules for parameter in module.parameters()]
        self._gradients = [parameter.grad for parameter in self._parameters]
        self._random = random.getstate(), np.random.get_state()
        self._snapshot = Snapshot(self.modules)
        self._snapshot.take()

    def __enter__(self) -> _Trials:
        return self

    def __exit__(self, *_: object) -> None:
        self._begin()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def _begin(self) -> None:
        self._snapshot.restore()
        random.setstate(self._random[0])
        np.random.set_state(self._random[1])
        for parameter in self._parameters:
            parameter.grad = None

    def run(self, batch: Any) -> list[Tensor]:
        """Forward and backward, from the state that everything starts from."""
        self._begin()
        with torch.enable_grad():
            value = self.loss(self.model, batch)
            if not isinstance(value, Tensor) or value.numel() != 1:
                what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ConfigurationError(
                    f"loss(model, batch) returned {what}; return the loss as a tensor of one element."
                )
            if value.requires_grad:
                value.backward()  # type: ignore[no-untyped-call]
        return [value.detach()]

    @contextmanager
    def finite_state(self) -> Iterator[None]:
        """Let parameters and buffers be 0 inside the block where they are not finite."""
        self._begin()
        tensors = [*self._parameters, *(buffer for module in self.modules for buffer in module.buffers())]
        kept, before = self._snapshot, [tensor.detach().clone() for tensor in tensors]
        with torch.no_grad():
            for tensor in tensors:
                if tensor.is_floating_point():
                    tensor.nan_to_num_(0.0, 0.0, 0.0)
        self._snapshot = Snapshot(self.modules)
        self._snapshot.take()
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, copy in zip(tensors, before, strict=True):
                    tensor.copy_(copy)
            self._snapshot = kept

    def traced(self, batch: Any) -> Traced:
        """Run under the trace."""
        return trace(lambda: self.run(batch), self.modules, named_tensors(batch))

    def is_bad(self, batch: Any) -> bool:
        """Whether a run is not finite; one that fails with an error is none."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of operations that get fewer samples than usual
                return first_bad(self.run(batch), self.modules) is not None
        except (RuntimeError, ValueError, IndexError):  # too few samples for its operations
            return False


def _modules_in(loss: Loss) -> Iterator[nn.Module]:
    """Modules that a loss brings along: its own, its closure's, a partial's."""
    found: list[Any] = [loss, getattr(loss, "__self__", None), *getattr(loss, "args", ())]
    found += list(getattr(loss, "keywords", {}).values())
    with_closure = inspect.unwrap(loss) if callable(loss) else loss
    try:
        variables = inspect.getclosurevars(with_closure)
        found += [*variables.nonlocals.values(), *variables.globals.values()]
    except TypeError:
        pass
    for item in found:
        if isinstance(item, nn.Module):
            yield item


def _of_error(error: Exception) -> Diagnosis | None:
    """A diagnosis of an error that torch raises for a bad label; None: it says itself what is wrong."""
    said = str(error)
    beyond = isinstance(error, (IndexError, RuntimeError)) and ("out of bounds" in said or "out of range" in said)
    if beyond and "target" in said.lower():
        return Diagnosis(reproduced="yes", cause="label", evidence=(f"torch refuses the label: {said}",))
    return None
