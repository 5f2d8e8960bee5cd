"""What is computed in float32 although autocast is on: CPUs don't do by themselves what GPUs do."""

from __future__ import annotations

import functools
from collections.abc import Set
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stabletrain.randomness import keyed
from stabletrain.tree import map_tensors


def cpu_islands(dtype: torch.dtype) -> Float32Islands:
    """Return the islands for autocast to a reduced format on the CPU."""
    without = _ATTENTION if dtype == torch.bfloat16 and _has_recurrent_kernels(dtype) else _ATTENTION | _RECURRENT
    return Float32Islands(without, _IN_FLOAT32)


class Float32Islands(TorchFunctionMode):
    """Computes in float32 what overflows or loses too much in a reduced format, or has no kernel in it.

    Autocast does the first by itself on CUDA, but not on the CPU: there, softmax, normalisations, sums and powers stay
    in the reduced format, where 300 squared is already Inf (float16) and 256 + 1 is 256 (bfloat16). The second are
    recurrent layers: no CPU has them in float16, and only some in bfloat16.

    Args:
        without_autocast: functions that get float32 arguments, and no autocast to lower them again.
        widened: functions that get float32 arguments.

    Example:
        >>> with Float32Islands(set(), {Tensor.pow, Tensor.sum}):
        ...     torch.full((4,), 300.0, dtype=torch.float16).pow(2).sum().item()
        360000.0
    """

    def __init__(self, without_autocast: Set[Any], widened: Set[Any] = frozenset()) -> None:
        super().__init__()
        self._without_autocast, self._widened = without_autocast, widened

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Widen the reduced arguments of the functions in question."""
        kwargs = kwargs or {}
        if func in self._without_autocast and kwargs.get("need_weights", True):
            with torch.autocast("cpu", enabled=False):
                return func(*map_tensors(_widen, args), **map_tensors(_widen, kwargs))
        if func in self._widened and not (func in _WITH_STATISTICS and _has_reduced(args[1:3])):
            args, kwargs = map_tensors(_widen, args), map_tensors(_widen, kwargs)
        return func(*args, **kwargs)


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _has_reduced(values: tuple[Any, ...]) -> bool:
    """Whether one of the running statistics is reduced: it is written in place, and a widened copy would lose that."""
    return any(isinstance(value, Tensor) and _widen(value) is not value for value in values)


@functools.cache
def _has_recurrent_kernels(dtype: torch.dtype) -> bool:
    """Return whether this CPU can run recurrent layers in a reduced format; it depends on its instructions."""
    with keyed(0):  # its weights are drawn, and nobody else's numbers may move for it
        layer = torch.nn.LSTM(1, 1)
    try:
        with torch.no_grad(), torch.autocast("cpu", dtype):
            layer(torch.zeros(1, 1, 1))
    except RuntimeError:
        return False
    return True


_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}
# The softmax within it can't be seen from outside; without the weights it is a fused kernel, float32 inside.
_ATTENTION = {F.multi_head_attention_forward}
_WITH_STATISTICS = {F.batch_norm, F.instance_norm}
_IN_FLOAT32 = {
    *(F.softmax, F.log_softmax, F.softmin, F.logsigmoid, F.softplus, F.normalize, F.cosine_similarity),
    *(F.batch_norm, F.instance_norm, F.layer_norm, F.group_norm, F.rms_norm, F.local_response_norm),
    *(F.gaussian_nll_loss, F.multilabel_soft_margin_loss),  # the other losses are widened by autocast itself
    *(torch.softmax, torch.log_softmax, torch.logsumexp, torch.sum, torch.mean, torch.prod, torch.cumsum),
    *(torch.exp, torch.log, torch.pow, torch.square, torch.rsqrt, torch.reciprocal, torch.var, torch.std, torch.norm),
    *(torch.linalg.vector_norm, torch.linalg.norm),
    *(Tensor.softmax, Tensor.log_softmax, Tensor.logsumexp, Tensor.sum, Tensor.mean, Tensor.prod, Tensor.cumsum),
    *(Tensor.exp, Tensor.log, Tensor.pow, Tensor.__pow__, Tensor.square, Tensor.rsqrt, Tensor.reciprocal),
    *(Tensor.var, Tensor.std, Tensor.norm),
}
