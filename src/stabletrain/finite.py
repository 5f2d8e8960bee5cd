"""Sizes of tensors, whether they are finite, and scaling them: each in one pass over a list."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from stabletrain.tree import is_distributed, local

LARGEST_SQUARE = math.sqrt(torch.finfo(torch.float32).max)  # a gradient beyond it fills a second moment with Inf


def sizes(tensors: Sequence[Tensor], order: float = 2.0, *, exact: bool = False) -> Tensor:
    """Return the norm of each tensor; a norm is NaN or Inf if an element is.

    Args:
        tensors: dense floating tensors of any shapes on one device; of a sharded one, this rank's part is measured.
        order: 2.0 for the Euclidean norm, `math.inf` for the largest magnitude.
        exact: sum in float64, so that squares of finite float32 elements can't overflow.

    Returns:
        Shape [len(tensors)], float64 when exact or any tensor is, else float32.

    Example:
        >>> sizes([torch.tensor([3.0, 4.0]), torch.tensor([float("inf")])])
        tensor([5., inf])
    """
    if not tensors:
        return torch.zeros(0)
    parts = [local(tensor) for tensor in tensors]
    wide = torch.float64 if exact or any(tensor.dtype == torch.float64 for tensor in parts) else torch.float32
    dtype = None if all(tensor.dtype == wide for tensor in parts) else wide
    return torch.stack([norm.to(wide) for norm in torch._foreach_norm(parts, order, dtype=dtype)])


def global_norm(tensors: Sequence[Tensor], *, exact: bool = False) -> Tensor:
    """Return the Euclidean norm of all elements of all tensors together.

    Sparse tensors count with their summed values. Tensors on several devices are measured where they are and
    combined on the first one's device. Sharded tensors are measured on all ranks, which have to ask at once.

    Args:
        tensors: floating tensors, dense, sparse COO or sharded.
        exact: sum in float64: a finite gradient of 3e19 has a finite norm then.

    Returns:
        Shape []; 0 for an empty list.

    Example:
        >>> float(global_norm([torch.tensor([3.0]), torch.tensor([4.0])]))
        5.0
        >>> large = [torch.tensor([3e19, 4e19])]
        >>> float(global_norm(large)), round(float(global_norm(large, exact=True)) / 5e19, 6)
        (inf, 1.0)
    """
    if not tensors:
        return torch.zeros(())
    if any(is_distributed(tensor) for tensor in tensors):
        return _norm_over_ranks(tensors, exact=exact)
    dense = [tensor.coalesce().values() if tensor.is_sparse else tensor for tensor in tensors]
    first = dense[0].device
    devices = {tensor.device for tensor in dense}
    if len(devices) == 1:
        norm: Tensor = torch.linalg.vector_norm(sizes(dense, exact=exact))
        return norm
    parts = [global_norm([t for t in dense if t.device == device], exact=exact).to(first) for device in devices]
    combined: Tensor = torch.linalg.vector_norm(torch.stack(parts))
    return combined


def whole_sizes(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of each tensor as a whole; of sharded ones over all ranks, which have to ask at once.

    Args:
        tensors: floating tensors, dense, sparse COO or sharded, on any devices.

    Returns:
        Shape [len(tensors)], float64 (float32 on devices without it), on the first one's device.

    Example:
        >>> whole_sizes([torch.tensor([3e19, 4e19]), torch.zeros(2)]).tolist()[1]
        0.0
    """
    if not tensors:
        return torch.zeros(0)
    dense = [tensor.coalesce().values() if tensor.is_sparse else tensor for tensor in tensors]
    first = dense[0].device
    found = torch.zeros(len(dense), dtype=torch.float32 if first.type == "mps" else torch.float64, device=first)
    places: dict[tuple[Any, torch.device], list[int]] = {}
    for number, tensor in enumerate(dense):
        places.setdefault((_divided_among(tensor), tensor.device), []).append(number)
    for (groups, device), numbers in places.items():
        norms = sizes([dense[number] for number in numbers], exact=device.type != "mps")
        if groups:
            norms = _summed(norms.square(), groups).sqrt()
        if len(places) == 1:
            return norms.to(found.dtype)
        found[torch.tensor(numbers, device=first)] = norms.to(first, found.dtype)
    return found


def _divided_among(tensor: Tensor) -> tuple[Any, ...]:
    """Return the process groups among which a tensor is divided; none if this rank holds all of it."""
    if not is_distributed(tensor):
        return ()
    mesh, placements = tensor.device_mesh, tensor.placements
    return tuple(mesh.get_group(axis) for axis, place in enumerate(placements) if place.is_shard())


def _summed(squares: Tensor, groups: Sequence[Any]) -> Tensor:
    """Add up over the ranks of each group, in place."""
    import torch.distributed as dist

    for group in groups:
        dist.all_reduce(squares, group=group)
    return squares


def _norm_over_ranks(tensors: Sequence[Tensor], *, exact: bool) -> Tensor:
    """Combine the shards' norms, by one reduction for each way in which tensors are divided."""
    divided: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        divided.setdefault(_divided_among(tensor), []).append(local(tensor))
    squares = []
    for groups, parts in divided.items():
        squares.append(_summed(global_norm(parts, exact=exact).double().square(), groups))
    norm: Tensor = torch.stack(squares).sum().sqrt()
    return norm if exact else norm.float()


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return whether every element of every floating tensor is finite, as a tensor on their device (no wait).

    Example:
        >>> bool(all_finite([torch.ones(2), torch.tensor([float("nan")])]))
        False
    """
    parts = [local(tensor) for tensor in tensors]
    floating = [tensor for tensor in parts if tensor.is_floating_point() and tensor.numel() > 0]
    return torch.isfinite(sizes(floating, math.inf)).all() if floating else torch.ones((), dtype=torch.bool)


def is_finite(tensor: Tensor) -> bool:
    """Return whether every element is finite; whole numbers are. It waits for the device.

    Example:
        >>> is_finite(torch.ones(2)), is_finite(torch.tensor([1.0, float("inf")])), is_finite(torch.tensor([1]))
        (True, False, True)
    """
    values = tensor.detach()
    if values.layout != torch.strided:
        values = values.coalesce().values() if values.is_sparse else values.to_dense()
    return not (values.is_floating_point() or values.is_complex()) or bool(torch.isfinite(values).all())


def first_nonfinite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Describe the first tensor that isn't finite: its name, how many elements, and which value.

    Example:
        >>> first_nonfinite([("weight", torch.ones(3)), ("bias", torch.tensor([1.0, float("nan")]))])
        'bias: 1 of 2 elements NaN'
    """
    for name, tensor in named:
        values = tensor.coalesce().values() if tensor.is_sparse else local(tensor)
        if not values.is_floating_point():
            continue
        nan, inf = int(torch.isnan(values).sum()), int(torch.isinf(values).sum())
        if nan + inf > 0:
            kinds = "NaN" if inf == 0 else "Inf" if nan == 0 else "NaN or Inf"
            return f"{name}: {nan + inf} of {values.numel()} elements {kinds}"
    return None


def scale_all(gradients: Sequence[Tensor], factor: float | Tensor) -> None:
    """Multiply every gradient by `factor` in place, each on its own device.

    Example:
        >>> gradient = torch.ones(2)
        >>> scale_all([gradient], 0.5)
        >>> gradient
        tensor([0.5000, 0.5000])
    """
    dense = [local(gradient) for gradient in gradients if not gradient.is_sparse]
    for gradient in gradients:
        if gradient.is_sparse:
            gradient.mul_(factor)
    if not isinstance(factor, Tensor):
        if dense:
            torch._foreach_mul_(dense, factor)
        return
    for device in {gradient.device for gradient in dense}:
        torch._foreach_mul_([gradient for gradient in dense if gradient.device == device], factor.to(device))


def limit_norm(gradients: Sequence[Tensor], norm: float | Tensor, max_norm: float) -> None:
    """Scale all gradients together in place so that their norm is at most `max_norm`.

    The factor is min(1, max_norm / (norm + 1e-6)), as in torch. With `norm` on the host, nothing is touched when
    there is nothing to limit; with `norm` on the device, nothing waits for it.

    Args:
        gradients: tensors of any shapes.
        norm: their finite Euclidean norm, measured before; a number or shape [].
        max_norm: the limit.

    Example:
        >>> gradient = torch.tensor([3.0, 4.0])
        >>> limit_norm([gradient], 5.0, 1.0)
        >>> gradient
        tensor([0.6000, 0.8000])
    """
    if isinstance(norm, Tensor):
        scale_all(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    elif norm > max_norm:
        scale_all(gradients, max_norm / (norm + 1e-6))
