"""Which samples of a batch are to blame: the smallest sets that fail beside samples that don't."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

IsBad = Callable[[Sequence[int]], bool]
_MOST = 4  # samples that may be bad together only; a larger set is the batch's, not theirs


def guilty(is_bad: IsBad, count: int, hints: Collection[int] = ()) -> list[int]:
    """Find the samples without which the step is healthy, each of them needed for it to be bad.

    Samples that are bad by themselves are found, and those that are bad in company, such as two equal ones whose
    distance is zero. Where the step is bad with any samples, none is to blame.

    Args:
        is_bad: runs the step with these samples alone.
        count: samples of the step, which is bad as a whole.
        hints: samples that look bad; they spare a search if they are.

    Returns:
        Positions in rising order.

    Source:
        Zeller and Hildebrandt 2002, "Simplifying and Isolating Failure-Inducing Input" (ddmin), for each set.

    Example:
        >>> guilty(lambda some: 3 in some or {5, 6} <= set(some), 8)
        [3, 5, 6]
    """
    everyone = range(count)
    suspects = sorted(set(hints) & set(everyone))
    if not 0 < len(suspects) < count or is_bad(_without(everyone, suspects)):
        suspects = _suspects(is_bad, everyone)
    calm = _without(everyone, suspects)
    if not suspects or not calm:
        return []

    def beside(some: Sequence[int]) -> bool:
        return is_bad(sorted([*calm, *some]))

    found = [one for one in suspects if beside([one])]
    rest = _without(suspects, found)
    while rest and beside(rest):
        together = smallest_failing(beside, rest)
        if len(together) > _MOST:
            return []
        found += together
        rest = _without(rest, together)
    return sorted(found)


def smallest_failing(is_bad: IsBad, members: Sequence[int]) -> list[int]:
    """Return a subset that is bad and of which no part is, from members that are bad together.

    Example:
        >>> smallest_failing(lambda some: {2, 9} <= set(some), range(16))
        [2, 9]
    """
    left, parts = list(members), 2
    while len(left) > 1:
        chunks = [left[len(left) * k // parts : len(left) * (k + 1) // parts] for k in range(parts)]
        smaller = next((chunk for chunk in chunks if is_bad(chunk)), None)
        if smaller is not None:
            left, parts = smaller, 2
            continue
        smaller = next((rest for chunk in chunks if is_bad(rest := _without(left, chunk))), None)
        if smaller is not None:
            left, parts = smaller, max(parts - 1, 2)
        elif parts >= len(left):
            break
        else:
            parts = min(len(left), 2 * parts)
    return left


def _suspects(is_bad: IsBad, everyone: Sequence[int]) -> list[int]:
    found: list[int] = []
    rest = list(everyone)
    while rest and is_bad(rest):
        together = smallest_failing(is_bad, rest)
        found += together
        rest = _without(rest, together)
        if len(together) > _MOST or 2 * len(found) > len(everyone):
            return []
    return found


def _without(members: Sequence[int], some: Collection[int]) -> list[int]:
    left_out = set(some)
    return [member for member in members if member not in left_out]


# ------------------------------------------------------------------------------------------------------------- batches


def count_of(batch: Any) -> int:
    """Return how many samples a batch holds: the length that most of its tensors and lists share.

    Example:
        >>> count_of((torch.zeros(5, 3), torch.zeros(5)))
        5
    """
    sizes = Counter(_lengths(batch))
    return sizes.most_common(1)[0][0] if sizes else 0


def _lengths(tree: Any, top: bool = True) -> Iterator[int]:
    if isinstance(tree, Tensor):
        if tree.dim() > 0:
            yield len(tree)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _lengths(item, False)
    elif isinstance(tree, (list, tuple)):
        if _is_list_of_samples(tree, top):
            yield len(tree)
        else:
            for item in tree:
                yield from _lengths(item, False)


def _is_list_of_samples(tree: Any, top: bool) -> bool:
    """A list of tensors of different lengths, as of bags or sequences, or below the top any list of tensors."""
    if not isinstance(tree, list) or len(tree) < 2 or not all(isinstance(item, Tensor) for item in tree):
        return False
    return not top or len({len(item) if item.dim() > 0 else 0 for item in tree}) > 1


def chosen(batch: Any, count: int, positions: Sequence[int]) -> Any:
    """Return the batch with these of its samples only.

    Tensors are cut along the first of their dimensions that has one entry a sample; a square matrix of all samples
    with each other, along both.
    """
    return _chosen(batch, count, torch.as_tensor(positions, dtype=torch.int64), top=True)


def _chosen(tree: Any, count: int, positions: Tensor, top: bool) -> Any:
    if isinstance(tree, Tensor):
        at = positions.to(tree.device)
        if tree.dim() == 2 and tuple(tree.shape) == (count, count):
            return tree.index_select(0, at).index_select(1, at)
        dimension = next((d for d in range(min(tree.dim(), 2)) if tree.shape[d] == count), None)
        return tree if dimension is None else tree.index_select(dimension, at)
    if isinstance(tree, dict):
        return type(tree)((key, _chosen(item, count, positions, False)) for key, item in tree.items())
    if isinstance(tree, list) and len(tree) == count and _is_list_of_samples(tree, top):
        return [tree[position] for position in positions.tolist()]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_chosen(item, count, positions, False) for item in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(_chosen(item, count, positions, False) for item in tree)
    return tree
