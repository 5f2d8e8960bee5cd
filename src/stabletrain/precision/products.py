"""The format in which products of float32 are computed, for every backend, and put back exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch

Products = Literal["ieee", "tf32", "bf16"]
PRODUCTS: tuple[str, ...] = get_args(Products)


@contextmanager
def float32_products(products: str) -> Iterator[None]:
    """Set the format of float32 products inside the block; afterwards every setting is what it was, also an unset one.

    Only torch's `fp32_precision` is used: mixed with the older `allow_tf32`, torch 2.13 raises when either is read.

    Args:
        products: `ieee` (exact), `tf32` (10 bits of mantissa; cuBLAS and cuDNN) or `bf16` (7 bits; oneDNN, the CPU's).
            A backend that doesn't have it computes exactly.

    Example:
        >>> matmul = torch.backends.mkldnn.matmul
        >>> before = matmul.fp32_precision
        >>> with float32_products("bf16"):
        ...     matmul.fp32_precision
        'bf16'
        >>> matmul.fp32_precision == before
        True
    """
    backends: Any = torch.backends
    on_gpu = "tf32" if products == "tf32" else "ieee"
    on_cpu = "bf16" if products == "bf16" else "ieee"
    with ExitStack() as stack:

        def use(place: Any, value: str, afterwards: str) -> None:
            stack.callback(setattr, place, "fp32_precision", afterwards)
            place.fp32_precision = value

        gpu = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
        cpu = [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
        # `cudnn` is the parent of all three on the GPU. Its convolutions are tf32 as long as neither they nor a parent
        # was ever set, and once set can't be unset: so those that inherit are told through the parent.
        common = _own(backends.cudnn, backends, ("ieee", "tf32"))
        owned = [(place, _own(place, backends.cudnn, ("ieee", "tf32"))) for place in gpu]
        inherited = [(place, _own(place, backends, ("ieee", "bf16"))) for place in cpu]
        use(backends.cudnn, on_gpu, common or "none")
        for place, value in owned:
            if value is not None:
                use(place, on_gpu, value)
        for place, value in inherited:
            use(place, on_cpu, value or "none")
        yield


def lacking(products: str, device: torch.device) -> str | None:
    """Return in words that a device doesn't have a format, None if it does.

    Example:
        >>> lacking("tf32", torch.device("cpu"))
        'tf32 products exist on GPUs from NVIDIA Ampere on; on this device products of float32 are computed exactly'
    """
    exactly = "on this device products of float32 are computed exactly"
    if products == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        return f"tf32 products exist on GPUs from NVIDIA Ampere on; {exactly}"
    if products == "bf16" and (device.type != "cpu" or not _cpu_has_bfloat16()):
        return f"bf16 products of float32 exist in oneDNN, on CPUs with AVX-512 or the like; {exactly}"
    return None


def _cpu_has_bfloat16() -> bool:
    backends: Any = torch.backends
    return bool(backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _own(place: Any, parent: Any, values: tuple[str, str]) -> str | None:
    """Return what was set at a place itself; None where it goes by its parent: then it follows when that is changed."""
    before, found = _raw(parent), []
    for value in values:
        parent.fp32_precision = value
        found.append(str(place.fp32_precision))
    parent.fp32_precision = before
    return found[0] if found[0] == found[1] else None


def _raw(place: Any) -> str:
    """Return what was set at a parent itself, as it reads while the root of all says nothing."""
    root: Any = torch.backends
    if place is root:
        return str(root.fp32_precision)
    before = root.fp32_precision
    root.fp32_precision = "none"
    own = str(place.fp32_precision)
    root.fp32_precision = before
    return own
