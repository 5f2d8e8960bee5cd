"""Remedies in the code and the batch, tried on the same step: without the samples, or with the operation made safe."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from stabletrain.doctor.diagnosis import Remedy
from stabletrain.doctor.origin import Traced
from stabletrain.doctor.places import place_of_operation
from stabletrain.doctor.samples import chosen
from stabletrain.finite import is_finite

HALF = (torch.float16, torch.bfloat16)
SAFE = {  # what stands in for what
    "log": "stabletrain.safe.log",
    "log2": "stabletrain.safe.log",
    "log10": "stabletrain.safe.log",
    "sqrt": "stabletrain.safe.sqrt",
    "rsqrt": "1 / stabletrain.safe.sqrt, through stabletrain.safe.div",
    "div": "stabletrain.safe.div",
    "reciprocal": "stabletrain.safe.div",
    "exp": "stabletrain.safe.exp",
    "norm": "stabletrain.safe.norm",
    "acos": "stabletrain.safe.acos",
    "pow": "stabletrain.safe.pow",
}
_OTHER = {
    "softmax": "give each row of the mask an entry that is left, or set the rows without one to 0",
    "log_softmax": "give each row of the mask an entry that is left",
    "nll_loss": "leave the mean out where no label counts: reduction='sum', divided by the count or 1",
    "ctc_loss": "zero_infinity=True",
    "layer_norm": "a larger eps",
    "batch_norm": "a larger eps, or GroupNorm",
    "std": "add an eps to the variance before the root",
}


class Trials(Protocol):
    """What runs the step again."""

    def is_bad(self, batch: Any) -> bool:
        """Run it and say whether anything is not finite."""
        ...

    def finite_state(self) -> AbstractContextManager[None]:
        """Let parameters and buffers be 0 inside the block where they are not finite."""
        ...


def code_remedies(
    trials: Trials, batch: Any, traced: Traced, samples: Sequence[int], count: int, end: float
) -> tuple[Remedy, ...]:
    """Try what can be tried without knowing the training: precision, data, the operation.

    Args:
        trials: runs the step.
        batch: its data.
        traced: what the trace showed.
        samples: to blame, as positions.
        count: samples of the batch.
        end: by `time.monotonic`; nothing is begun after it.
    """
    found: list[Remedy] = []
    operation = traced.operation
    half = operation is not None and any(
        isinstance(item, dict) and item["dtype"] in ("float16", "bfloat16") for item in operation.inputs
    )
    if half and time.monotonic() < end:
        with InFloat32():  # type: ignore[no-untyped-call]
            held = not trials.is_bad(batch)
        found.append(
            Remedy(override="compute in float32 (autocast off)", held=held, tried_updates=1, group="precision")
        )
    if samples and time.monotonic() < end:
        left = [position for position in range(count) if position not in set(samples)]
        held = not trials.is_bad(chosen(batch, count, left))
        what = f"leave out the samples {list(samples)}"
        found.append(Remedy(override=what, held=held, tried_updates=1, group="data"))
    if operation is not None and operation.line > 0 and time.monotonic() < end:
        # The lines of the forward are recorded for the backward.
        with torch.autograd.set_detect_anomaly(True, check_nan=False), MadeSafe(operation.file, operation.line):
            held = not trials.is_bad(batch)
        advice = SAFE.get(operation.name) or _OTHER.get(operation.name) or f"a finite value for {operation.name}"
        where = f"{operation.file}:{operation.line}"
        found.append(Remedy(override=f"{where}: {advice}", held=held, tried_updates=1, group="loss"))
    source = traced.origins[0] if traced.origins else None
    if source is not None and source.kind in ("parameter", "buffer") and time.monotonic() < end:
        with trials.finite_state():
            held = not trials.is_bad(batch)
        what = f"go back to a checkpoint in which {source.name} is finite, or initialise it"
        found.append(Remedy(override=what, held=held, tried_updates=1, group="model"))
    return tuple(found)


class MadeSafe(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets the operations of one line give 0 instead of NaN and Inf, forward and backward, as a safe one would."""

    def __init__(self, file: str, line: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._place = file, line

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and look at what it made."""
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor) and not is_finite(tensor) and place_of_operation() == self._place:
                tensor.nan_to_num_(0.0, 0.0, 0.0)
        return outputs


class InFloat32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes in float32 what asks for half precision."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation on wider numbers."""

        def wider(item: Any) -> Any:
            if isinstance(item, Tensor) and item.dtype in HALF:
                return item.float()
            return torch.float32 if item in HALF and isinstance(item, torch.dtype) else item

        return func(*tree_map(wider, args), **tree_map(wider, kwargs or {}))
