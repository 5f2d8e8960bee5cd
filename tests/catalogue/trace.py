"""Where a case's first bad value is made, found by hand-made instrumentation and proved by an intervention.

Forward: each call of a torch function is watched; a candidate is a statement whose call turns finite inputs into a
non-finite output, or a deliberate infinity (a fill value) into NaN. The candidate is to blame when the step becomes
healthy once that statement's outputs are replaced by ones from the first bad one on. Backward: the first node of the
graph with finite gradients coming in and a non-finite one going out. None of this uses what it judges.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from .case import Built, canonical

HERE = Path(__file__).resolve().parent
Place = tuple[str, int]


@dataclass(frozen=True)
class Found:
    """The first bad operation: its name, the file and line of the statement, and whether its derivative is to blame."""

    operation: str
    place: Place
    in_backward: bool


@dataclass(frozen=True)
class Step:
    """What a step left behind: whether loss, gradients and buffers are finite, and what was seen on the way."""

    loss: bool
    gradients: bool
    buffers: bool
    made: tuple[Found, ...]
    filled: tuple[Found, ...]
    backward: Found | None

    @property
    def healthy(self) -> bool:
        return self.loss and self.gradients and self.buffers


def finite(value: Any) -> bool:
    """Whether all floating-point tensors in a tree are finite."""
    leaves = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
    return all(bool(leaf.detach().isfinite().all()) for leaf in leaves if leaf.is_floating_point())


def in_catalogue(file: str) -> bool:
    return Path(file).parent == HERE and file != __file__


def calling_place() -> Place:
    """The innermost statement of a case that is running now."""
    frame = sys._getframe(1)
    while frame is not None:
        if in_catalogue(frame.f_code.co_filename):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
    return "", 0


class Watch(TorchFunctionMode):
    """Note which calls make non-finite values; at the place `healed` go on with ones instead."""

    def __init__(self, healed: Place | None = None) -> None:
        super().__init__()
        self.healed, self.healing = healed, False
        self.made: list[Found] = []
        self.filled: list[Found] = []
        self.deliberate: dict[int, Tensor] = {}  # the tensors are held, so that no other gets their id

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", str(function))
        if name in {"__get__", "empty", "empty_like", "new_empty", "backward", "register_hook"}:
            return function(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        bad = {id(leaf) for leaf in inputs if not finite(leaf)}
        scalar = any(isinstance(leaf, float) and not math.isfinite(leaf) for leaf in tree_leaves((args, kwargs)))
        output = function(*args, **kwargs)
        changed = [leaf for leaf in inputs if id(leaf) not in bad and not finite(leaf)]
        results = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and not finite(leaf)] + changed
        if self.healing and calling_place() == self.healed:
            return tree_map(replaced, output)
        if not results or not bad <= set(self.deliberate):
            return output
        place = calling_place()
        not_a_number = any(bool(leaf.detach().isnan().any()) for leaf in results)
        if not_a_number or not (scalar or bad or not inputs):
            self.made.append(Found(canonical(name), place, in_backward=False))
        else:
            self.filled.append(Found(canonical(name), place, in_backward=False))
            self.deliberate.update({id(leaf): leaf for leaf in results})
        if place != self.healed:
            return output
        self.healing = True
        with torch.no_grad():
            for leaf in changed:
                leaf.fill_(1.0)
        return tree_map(replaced, output)


def replaced(leaf: Any) -> Any:
    """Ones that hang on no graph, in the place of a floating-point tensor."""
    return torch.ones_like(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def nodes(root: Any) -> Iterator[Any]:
    """All nodes of a graph."""
    waiting, seen = [root], {root}
    while waiting:
        node = waiting.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


def forward_place(node: Any) -> Place:
    """The innermost statement of a case in the traceback that anomaly mode noted when the node was made."""
    for entry in reversed(node.metadata.get("traceback_", [])):
        head = entry.strip().splitlines()[0]
        file, line = head.removeprefix('File "').split('", line ')
        if in_catalogue(file):
            return file, int(line.split(",")[0])
    return "", 0


def run(built: Built, healed: Place | None = None) -> Step:
    """Make one step of a case and look at all that it leaves behind."""
    torch.manual_seed(0)
    built.model.zero_grad(set_to_none=True)
    watch, backward = Watch(healed), []
    with torch.autograd.detect_anomaly(check_nan=False):
        with watch:
            loss = built.loss(built.model, built.batch)
        if loss.requires_grad:
            handles = []
            for node in nodes(loss.grad_fn):

                def look(going_out: Any, coming_in: Any, node: Any = node) -> None:
                    if not backward and finite(coming_in) and not finite(going_out):
                        backward.append(Found(canonical(node.name()), forward_place(node), in_backward=True))

                handles.append(node.register_hook(look))
            loss.backward()
            for handle in handles:
                handle.remove()
    return Step(
        loss=finite(loss),
        gradients=finite([parameter.grad for parameter in built.model.parameters()]),
        buffers=finite(list(built.model.buffers())),
        made=tuple(watch.made),
        filled=tuple(watch.filled),
        backward=backward[0] if backward else None,
    )


def first_bad(build: Any, seed: int) -> Found | None:
    """The first operation whose non-finite value reaches loss, gradients or buffers; None for a bad source."""
    step = run(build(seed))
    seen = set()
    for candidate in step.made + step.filled:
        if candidate.place not in seen and run(build(seed), healed=candidate.place).healthy:
            return candidate
        seen.add(candidate.place)
    return step.backward if step.loss else None


def mend_sources(built: Built) -> bool:
    """Replace non-finite values in batch, parameters and buffers by 0, and say whether there were any."""
    leaves = [leaf for leaf in tree_leaves(built.batch) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    leaves += [*built.model.parameters(), *built.model.buffers()]
    found = False
    with torch.no_grad():
        for leaf in leaves:
            if not finite(leaf):
                leaf.nan_to_num_(0.0, 0.0, 0.0)
                found = True
    return found
