"""Faults in a part of something: of a sample that is a set or a sequence, or of the model's forward pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stabletrain.errors import ConfigurationError
from stabletrain.fault.base import M, Planned, Surroundings, check_factor
from stabletrain.fault.samples import BadSamples, is_pair, rebuilt


class NanPart(BadSamples):
    """The inputs of some samples are NaN in their first place: one instance of a bag, one time step of a sequence."""

    def spoilt(self, sample: Tensor) -> Tensor:
        """Return the sample with its first entry NaN."""
        if sample.dim() == 0:
            return torch.full_like(sample, math.nan)
        return torch.cat([torch.full_like(sample[:1], math.nan), sample[1:]])


class EmptyInput(BadSamples):
    """The inputs of some samples are empty: a bag without instances, a sequence without time steps.

    Only samples of different length can be empty: a list of tensors, or padded ones with a bool tensor `mask`, one row
    for each sample, that is False where there is padding.
    """

    effect = "empty the inputs"
    needed = "list of floating tensors, one for each sample, and no bool tensor `mask`"

    def _spoil(self, data: Any, rows: list[int], count: int) -> Any:
        inputs = data[0] if is_pair(data) else data
        mask = inputs.get("mask") if isinstance(inputs, dict) else None
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() == 0 or len(mask) != count:
            return super()._spoil(data, rows, count)
        empty = mask.index_fill(0, torch.tensor(rows, device=mask.device), False)
        spoilt = {**inputs, "mask": empty}
        return rebuilt(data, [spoilt, data[1]]) if is_pair(data) else spoilt

    def spoilt(self, sample: Tensor) -> Tensor:
        """Return nothing of the sample, in its width."""
        return sample[:0] if sample.dim() > 0 else sample


class LargeOutput(Planned):
    """What one of the model's modules returns in training is far larger than usual, in every forward pass of the step.

    In a reduced format it overflows: in float16 above 65504.

    Args:
        at: the step, counted over the run from 0; None: step 100, or never in a run that is shorter.
        times: how many steps, from there on.
        module: path of the module in the model, such as `encoder.0`; None: the last one that has parameters of its own.
        factor: how many times larger; above 1.
    """

    def __init__(self, at: int | None = None, times: int = 1, module: str | None = None, factor: float = 1e9) -> None:
        super().__init__(at, times)
        self.module = module
        self.factor = check_factor("factor", factor)
        self._now = False
        self._hook: RemovableHandle | None = None

    def _check_possible(self, run: Surroundings) -> None:
        found = {name.removeprefix("module."): module for name, module in run.model.named_modules()}
        own = [name for name, module in found.items() if any(True for _ in module.parameters(recurse=False))]
        name = self.module if self.module is not None else own[-1] if own else None
        if name is None or name not in found:
            raise ConfigurationError(
                f"fault.module is {name!r}; the model's modules with parameters are {', '.join(own) or 'none'}. Choose "
                "one of these."
            )
        self.close()
        self._hook = found[name].register_forward_hook(self._enlarge)

    def _enlarge(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        return output * self.factor if self._now and module.training and isinstance(output, Tensor) else output

    def before_step(self, steps: int, microbatches: list[M]) -> list[M]:
        """Return the microbatches as they are, and note whether it is time."""
        self._now = self._happens(steps)
        return microbatches

    def after_update(self, steps: int, model: nn.Module, optimizer: Any) -> None:
        """Let what comes between the steps be as usual."""
        self._now = False

    def close(self) -> None:
        """Take the hook off the model."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
