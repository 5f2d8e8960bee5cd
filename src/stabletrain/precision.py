"""Numeric formats of the forward pass, and the loss scaler that float16 needs.

Parameters, gradients and the optimizer stay in float32; autocast lowers what is safe to lower.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.overrides import TorchFunctionMode

from stabletrain.errors import ConfigurationError
from stabletrain.randomness import keyed
from stabletrain.tree import map_tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Precision:
    """How a forward pass computes: autocast format, matrix product format, loss scale.

    Args:
        dtype: format under autocast: `float32` (no autocast), `bfloat16` or `float16`.
        matmul: products of float32 matrices: `ieee` (exact) or `tf32` (10 bits of mantissa, where the device has it).
        fallback: format to take where the device has no bfloat16.
        initial_scale: first loss scale of float16.
        growth_interval: updates without overflow after which the scale doubles.
        hysteresis: overflows that it takes to lower a scale that has found its level; 1: each one does.
        device: where the model is.

    Raises:
        ConfigurationError: for a format or scale that doesn't exist.

    Example:
        >>> precision = Precision("bfloat16")
        >>> with precision.autocast():
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.bfloat16
        >>> precision.scaler is None
        True
    """

    def __init__(
        self,
        dtype: str = "float32",
        *,
        matmul: Literal["ieee", "tf32"] = "ieee",
        fallback: str = "float16",
        initial_scale: float = 65536.0,
        growth_interval: int = 2000,
        hysteresis: int = 2,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value, allowed in (
            ("precision.dtype", dtype, DTYPES),
            ("precision.fallback", fallback, DTYPES),
            ("precision.matmul", matmul, ("ieee", "tf32")),
        ):
            if value not in allowed:
                raise ConfigurationError(f"{name} is {value!r}; allowed: {', '.join(allowed)}.")
        if not (math.isfinite(initial_scale) and initial_scale >= 1) or growth_interval < 1:
            raise ConfigurationError(
                f"the first loss scale is {initial_scale} and grows every {growth_interval} updates; both must be "
                "numbers of at least 1 (fp16_initial_scale, fp16_growth_interval)."
            )
        self.device = torch.device(device)
        self.matmul = matmul
        lacks_it = dtype == "bfloat16" and self.device.type == "cuda" and not torch.cuda.is_bf16_supported()
        self.dtype = DTYPES[fallback if lacks_it else dtype]
        self.scaler: GradScaler | None = None
        if self.dtype == torch.float16:
            self.scaler = LossScaler(
                self.device.type,
                init_scale=float(initial_scale),
                growth_interval=int(growth_interval),
                hysteresis=hysteresis,
            )

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Lower the format of what is computed inside; on the CPU, what it can't do so is computed in float32."""
        if self.dtype == torch.float32:
            yield
            return
        islands: AbstractContextManager[Any] = nullcontext()
        if self.device.type == "cpu":
            if self.dtype == torch.float16:
                islands = Float32Islands(_RECURRENT, _IN_FLOAT32)
            elif not _has_recurrent_kernels(self.dtype):
                islands = Float32Islands(_RECURRENT)
        with torch.autocast(self.device.type, self.dtype), islands:
            yield

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss to backpropagate: times the loss scale in float16, else unchanged."""
        return self.scaler.scale(loss) if self.scaler is not None else loss

    @contextmanager
    def active(self) -> Iterator[None]:
        """Set the format of float32 products for every backend inside the block, and put it back afterwards."""
        with ExitStack() as stack:
            for backend, accepts_tf32 in _product_backends():
                stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
                backend.fp32_precision = self.matmul if accepts_tf32 else "ieee"
            yield

    def state_dict(self) -> dict[str, Any]:
        """Return the loss scaler's state; empty without one."""
        return self.scaler.state_dict() if self.scaler is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the loss scaler's state; from another precision, the scaler starts afresh."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)


class LossScaler(GradScaler):
    """Torch's loss scaler, patient with a lone overflow: one alone leaves a scale that has found its level.

    While the scale finds its level (at the start, after it was lowered and after it has grown, until the next applied
    step) each overflow lowers it at once. Later the first `hysteresis` - 1 overflows leave it, and the next one lowers
    it. The scale grows after `growth_interval` updates without overflow, as before, so that overflows further apart
    than that count as lone ones. All of it is decided on the device.

    Args:
        device: type of the device, such as `cpu` or `cuda`.
        hysteresis: overflows that it takes to lower a scale that has found its level, at least 1.
        options: as for `torch.amp.GradScaler`.

    Raises:
        ConfigurationError: for a hysteresis that is no whole number from 1.

    Source:
        `hysteresis` of Megatron-LM's `DynamicGradScaler` and `delayed_shift` of DeepSpeed's `DynamicLossScaler`, which
        forgive the first overflow of a run too. Here the scale falls without delay until it fits.

    Example:
        >>> scaler = LossScaler("cpu", init_scale=8.0)
        >>> weight = torch.ones(1, requires_grad=True)
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> scales = []
        >>> for gradient in (float("inf"), 1.0, float("inf"), 1.0, float("inf"), float("inf")):
        ...     weight.grad = scaler.scale(torch.tensor([gradient]))
        ...     scaler.unscale_(optimizer)
        ...     scaler.update()
        ...     scales.append(scaler.get_scale())
        >>> scales
        [4.0, 4.0, 4.0, 4.0, 2.0, 1.0]
    """

    def __init__(self, device: str, *, hysteresis: int = 2, **options: Any) -> None:
        if isinstance(hysteresis, bool) or not isinstance(hysteresis, int) or hysteresis < 1:
            raise ConfigurationError(f"precision.hysteresis is {hysteresis!r}; it must be a whole number, 1 or more.")
        super().__init__(device, **options)
        self.hysteresis = hysteresis
        self._initial_patience = -1
        self.patience: Tensor | None = None  # overflows that leave the scale; -1: it is finding its level

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Let the scale react to the gradients that were unscaled, or set it, which leaves the patience as it is."""
        if new_scale is not None or not self.is_enabled():
            super().update(new_scale)
            return
        assert self._scale is not None and self._growth_tracker is not None and self.patience is not None
        before, patience = self._scale.clone(), self.patience
        super().update()
        overflow = self._scale < before
        forgiven = overflow & (patience > 0)
        self._scale.copy_(torch.where(forgiven, before, self._scale))
        grown = ~overflow & (self._growth_tracker == 0)
        settled = torch.where(patience < 0, self.hysteresis - 1, patience)
        moved = torch.where(overflow | grown, -1, settled)
        patience.copy_(torch.where(forgiven, patience - 1, moved))

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state and the patience left; waits for the device."""
        patience = self._initial_patience if self.patience is None else int(self.patience)
        return {**super().state_dict(), "patience": patience}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; from torch's own scaler, the scale is taken to find its level."""
        super().load_state_dict(state)
        self._initial_patience = int(state.get("patience", -1))
        if self.patience is not None:
            self.patience.fill_(self._initial_patience)

    def _lazy_init_scale_growth_tracker(self, dev: torch.device) -> None:
        super()._lazy_init_scale_growth_tracker(dev)
        self.patience = torch.full((), self._initial_patience, dtype=torch.int32, device=dev)


def _product_backends() -> list[tuple[Any, bool]]:
    """List where torch keeps the format of float32 products, and whether tf32 exists there."""
    backends: Any = torch.backends
    return [
        (backends.cuda.matmul, True),
        (backends.cudnn.conv, True),
        (backends.cudnn.rnn, True),
        (backends.mkldnn.matmul, False),
        (backends.mkldnn.conv, False),
        (backends.mkldnn.rnn, False),
    ]


class Float32Islands(TorchFunctionMode):
    """Computes in float32 what overflows or loses too much in float16, or has no kernel in a reduced format.

    Autocast does the first by itself on CUDA, but not on the CPU: there, softmax, normalisations, sums and powers of
    float16 stay in float16, where 300 squared is already Inf. The second are recurrent layers: no CPU has them in
    float16, and only some in bfloat16.

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
        if func in self._without_autocast:
            with torch.autocast("cpu", enabled=False):
                return func(*map_tensors(_widen, args), **map_tensors(_widen, kwargs))
        if func in self._widened:
            args, kwargs = map_tensors(_widen, args), map_tensors(_widen, kwargs)
        return func(*args, **kwargs)


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


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
_IN_FLOAT32 = {
    *(F.softmax, F.log_softmax, F.softmin, F.layer_norm, F.group_norm, F.rms_norm, F.normalize, F.cosine_similarity),
    *(torch.softmax, torch.log_softmax, torch.logsumexp, torch.sum, torch.mean, torch.prod, torch.cumsum),
    *(torch.exp, torch.log, torch.pow, torch.square, torch.rsqrt, torch.reciprocal, torch.var, torch.std, torch.norm),
    *(torch.linalg.vector_norm, torch.linalg.norm),
    *(Tensor.softmax, Tensor.log_softmax, Tensor.logsumexp, Tensor.sum, Tensor.mean, Tensor.prod, Tensor.cumsum),
    *(Tensor.exp, Tensor.log, Tensor.pow, Tensor.__pow__, Tensor.square, Tensor.rsqrt, Tensor.reciprocal),
    *(Tensor.var, Tensor.std, Tensor.norm),
}
