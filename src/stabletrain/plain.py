"""What a file of ours may hold: tensors, numbers, text and plain containers, which load without running any code."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

_AS_THEY_ARE = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)
_NUMPY_KINDS = "biufc"  # booleans, whole numbers, floating point, complex


def in_host_memory(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Return the tensor without its gradient and in the CPU's memory, shared where it is there already."""
    return tensor.detach().cpu()


def plain(value: Any, name: str, tensor: Callable[[torch.Tensor, str], torch.Tensor] = in_host_memory) -> Any:
    """Return `value` with everything that a file of ours can't hold turned into what it can.

    Containers are made anew, numpy numbers become Python's, numpy arrays become tensors, frozen sets become sets.

    Args:
        value: a tree of dictionaries, lists, tuples and sets.
        name: what to call it in an error.
        tensor: what becomes of each tensor, which it gets together with the tensor's name.

    Raises:
        TypeError: something in it has a type that needs code to load; says where.

    Example:
        >>> plain({"rate": np.float64(0.5), "seen": np.arange(2)}, "state")
        {'rate': 0.5, 'seen': tensor([0, 1])}
    """
    kind = type(value)
    # Exact types: a subclass (an enumeration that is also a number) would be saved as itself, and not load.
    if kind in _AS_THEY_ARE:
        return value
    if kind in (torch.Tensor, torch.nn.Parameter):
        return tensor(value, name)
    if kind in (dict, defaultdict):
        return {_key(item, name): plain(content, f"{name}[{item!r}]", tensor) for item, content in value.items()}
    if kind is OrderedDict:
        return _ordered(value, name, tensor)
    if kind in (list, tuple):
        return kind(plain(content, f"{name}[{position}]", tensor) for position, content in enumerate(value))
    if kind in (set, frozenset):
        return {plain(content, f"an item of {name}") for content in value}
    if isinstance(value, np.generic) and type(value.item()) in _AS_THEY_ARE:
        return value.item()
    if kind is np.ndarray and value.dtype.kind in _NUMPY_KINDS and value.dtype != np.longdouble:
        return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))
    raise TypeError(
        f"{name} is a {kind.__module__}.{kind.__qualname__}; what is saved must be tensors, numbers, text and "
        "dictionaries, lists, tuples and sets of them: return one of these from state_dict"
    )


def _key(key: Any, name: str) -> Any:
    return plain(key, f"a key of {name}")


def _ordered(value: OrderedDict[Any, Any], name: str, tensor: Callable[..., torch.Tensor]) -> OrderedDict[Any, Any]:
    result = OrderedDict(
        (_key(item, name), plain(content, f"{name}[{item!r}]", tensor)) for item, content in value.items()
    )
    # A module's state_dict notes there which version of each module wrote it.
    for attribute, content in vars(value).items():
        setattr(result, attribute, plain(content, f"{name}.{attribute}"))
    return result
