"""How the forward and backward passes compute: the format under autocast, of matrix products, of parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from stabletrain.errors import ConfigurationError
from stabletrain.precision.islands import cpu_islands
from stabletrain.precision.masters import in_masters_place
from stabletrain.precision.products import PRODUCTS, Products, float32_products, lacking
from stabletrain.precision.scaler import LossScaler

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Precision:
    """How a forward pass computes: autocast format, matrix product format, loss scale.

    Args:
        dtype: format under autocast: `float32` (no autocast), `bfloat16` or `float16`.
        matmul: products of float32: `ieee` (exact), `tf32` (10 bits of mantissa, on GPUs) or `bf16` (7 bits, on CPUs);
            exact where the device doesn't have it.
        parameters: format of parameters and gradients in the passes: `float32`, or `bfloat16` with float32 masters,
            which are what the model holds outside of them.
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
        matmul: Products = "ieee",
        parameters: str = "float32",
        fallback: str = "float16",
        initial_scale: float = 65536.0,
        growth_interval: int = 2000,
        hysteresis: int = 2,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value, allowed in (
            ("precision.dtype", dtype, DTYPES),
            ("precision.fallback", fallback, DTYPES),
            ("precision.matmul", matmul, PRODUCTS),
            ("precision.parameters", parameters, ("float32", "bfloat16")),
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
        self.wanted = DTYPES[dtype]
        self.dtype = available(dtype, fallback, self.device)
        self.parameters = DTYPES[parameters]
        if self.parameters not in (torch.float32, self.dtype):
            autocast = str(self.dtype).removeprefix("torch.")
            raise ConfigurationError(
                f"precision.parameters is {parameters!r}, but precision.dtype is {autocast} "
                "(on a device without bfloat16 the fallback). Reduced parameters need the same format under autocast: "
                "give precision.dtype=bfloat16 and a device that has it, or precision.parameters=float32."
            )
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
        islands = cpu_islands(self.dtype) if self.device.type == "cpu" else nullcontext()
        with torch.autocast(self.device.type, self.dtype), islands:
            yield

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss to backpropagate: times the loss scale in float16, else unchanged."""
        return self.scaler.scale(loss) if self.scaler is not None else loss

    def lowered(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return the context for the passes: parameters and gradients may be reduced in it (`in_masters_place`)."""
        return nullcontext() if self.parameters == torch.float32 else in_masters_place(model, self.parameters)

    def active(self) -> AbstractContextManager[None]:
        """Set the format of float32 products for every backend inside the block, and put it back afterwards."""
        return float32_products(self.matmul)

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled."""
        return self.scaler is not None

    @property
    def notes(self) -> list[str]:
        """What the user should know about these settings on this device."""
        found = lacking(self.matmul, self.device)
        lacks = "this device has no bfloat16, so the run computes in "
        other = [] if self.dtype == self.wanted else [lacks + str(self.dtype).removeprefix("torch.")]
        return [*other, *([found] if found is not None else [])]

    def state_dict(self) -> dict[str, Any]:
        """Return the loss scaler's state; empty without one."""
        return self.scaler.state_dict() if self.scaler is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the loss scaler's state; from another precision, the scaler starts afresh."""
        if self.scaler is not None and "scale" in state:
            self.scaler.load_state_dict(state)


def available(dtype: str, fallback: str, device: torch.device) -> torch.dtype:
    """Return a format, or another one where it is bfloat16 and the device doesn't have that.

    Example:
        >>> available("bfloat16", "float16", torch.device("cpu"))
        torch.bfloat16
    """
    lacks_it = dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported()
    return DTYPES[fallback if lacks_it else dtype]
