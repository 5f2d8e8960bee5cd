"""Comparing what was saved."""

from __future__ import annotations

from typing import Any

import torch


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Return where two trees differ in a bit."""
    if type(one) is not type(other):
        return [f"{place}: {type(one)} and {type(other)}"]
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [place]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{place}: {sorted(map(str, one.keys() ^ other.keys()))}"]
        return [found for name in one for found in differences(one[name], other[name], f"{place}.{name}")]
    if isinstance(one, (list, tuple)) and len(one) == len(other):
        return [
            found for n, pair in enumerate(zip(one, other, strict=True)) for found in differences(*pair, f"{place}.{n}")
        ]
    return [] if one == other else [f"{place}: {one!r} and {other!r}"]
